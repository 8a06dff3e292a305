"""Microseconds per token of aligning two tokenisations of the same answers: this house, TRL's GOLD and NeMo-RL.

Everyone starts from the encodings that both tokenizers made of the same texts, so that tokenising, which is its own
line, is in nobody's time. Ours: `ByteView.of` and `align.spans.spans_of`, bytes checked. GOLD: its byte offsets from
the encodings, and its walk over them. NeMo-RL: `TokenAligner.align` (canonical strings, anchors, Needleman-Wunsch),
one text at a time, so that it has no padding to align. They take turns; a ratio is the median over rounds.

What they find is in the table, too: how many spans, and what share of the student's tokens is in a span that has the
same bytes on both sides, as every span should.

NeMo-RL is not a dependency: --nemo-rl names its token_aligner.py or a folder that has it. Without --student and
--teacher two small tokenizers are trained on the data, one with single digits, so that it runs on a bare machine.
The file is not called align.py, because Python would then find it in place of the package.

usage: python benchmarks/alignment.py [--student MODEL --teacher MODEL] [--data FILE.jsonl] [--nemo-rl PATH]
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align_case import Case, arguments, in_turns, ratio, read_case
from rich.console import Console
from rich.table import Table

Encodings = list[tuple[Any, Any]]  # of each text, by the student's tokenizer and by the teacher's
Ranges = list[tuple[int, int, int, int]]  # of one text: the student's tokens from, to; the teacher's


class Encoded:
    """A tokenizer that has already encoded the texts; in everything else it is the real one."""

    def __init__(self, backend: Any, encodings: Sequence[Any]) -> None:
        self.backend, self.encodings = backend, encodings

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> Sequence[Any]:
        return self.encodings


def tokenising(case: Case) -> Encodings:
    sides = (
        tokenizer.backend_tokenizer.encode_batch(case.texts, add_special_tokens=False)
        for tokenizer in (case.student, case.teacher)
    )
    return list(zip(*sides, strict=True))


def ours(case: Case, encodings: Encodings) -> Callable[[], list[Any]]:
    from align.byte_view import byte_view
    from align.spans import spans_of

    student, teacher = byte_view(case.student), byte_view(case.teacher)
    return lambda: [spans_of(student.of(own.ids), teacher.of(other.ids)) for own, other in encodings]


def our_ranges(found: Any) -> list[Ranges]:
    return [[(*a, *b) for a, b in zip(spans.student.tolist(), spans.teacher.tolist(), strict=True)] for spans in found]


def gold(case: Case, encodings: Encodings) -> Callable[[], list[Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gold.gold_trainer import ULDLoss
        from trl.experimental.utils import encode_with_byte_offsets

    student, teacher = (
        Encoded(tokenizer.backend_tokenizer, side)
        for tokenizer, side in zip((case.student, case.teacher), zip(*encodings, strict=True), strict=True)
    )

    def run() -> list[Any]:
        own, other = (encode_with_byte_offsets(backend, case.texts) for backend in (student, teacher))
        return [ULDLoss._align_by_byte_offsets(a, b) for (_, a), (_, b) in zip(own, other, strict=True)]

    return run


def gold_ranges(found: Any) -> list[Ranges]:
    return [[(a[0], a[-1] + 1, b[0], b[-1] + 1) for a, b in zip(*groups, strict=True) if a and b] for groups in found]


def nemo(case: Case, encodings: Encodings, path: Path) -> Callable[[], list[Any]]:
    import torch

    file = path if path.is_file() else next(path.rglob("x_token/token_aligner.py"))
    spec = importlib.util.spec_from_file_location("token_aligner", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["token_aligner"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    aligner = module.TokenAligner(case.student, case.teacher, projection_matrix_path="")
    ids = [(torch.tensor([own.ids]), torch.tensor([other.ids])) for own, other in encodings]
    return lambda: [aligner.align(own, other) for own, other in ids]


def nemo_ranges(found: Any) -> list[Ranges]:
    texts = []
    for batch in found:
        sides = [chunks[0].tolist() for chunks in (batch.student_chunk_id, batch.teacher_chunk_id)]
        ranges = []
        for chunk in range(int(batch.num_chunks[0])):
            own, other = ([i for i, name in enumerate(side) if name == chunk] for side in sides)
            if own and other:
                ranges.append((own[0], own[-1] + 1, other[0], other[-1] + 1))
        texts.append(ranges)
    return texts


def exact(case: Case, encodings: Encodings, ranges: list[Ranges]) -> tuple[int, float]:
    """Return how many spans there are, and the share of the student's tokens in spans with the same bytes."""
    from align.byte_view import byte_view

    views = byte_view(case.student), byte_view(case.teacher)
    spans = good = total = 0
    for (own, other), text in zip(encodings, ranges, strict=True):
        pieces = views[0].of(own.ids), views[1].of(other.ids)
        total, spans = total + len(own.ids), spans + len(text)
        for a, b, c, d in text:
            same = sum(map(len, pieces[0][:a])) == sum(map(len, pieces[1][:c]))
            good += (b - a) * (same and b"".join(pieces[0][a:b]) == b"".join(pieces[1][c:d]))
    return spans, good / total


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, answers=1000)
    parser.add_argument("--nemo-rl", type=Path, help="NeMo-RL's token_aligner.py, or a folder that has it")
    options = parser.parse_args()
    case = read_case(options)
    encodings = tokenising(case)
    tokens = sum(len(own.ids) for own, _ in encodings)
    runs: dict[str, Callable[[], Any]] = {"tokenising both": lambda: tokenising(case)}
    runs["distill"] = ours(case, encodings)
    ranges: dict[str, Callable[[Any], list[Ranges]]] = {"distill": our_ranges}
    missing = {}
    try:
        runs["TRL GOLD"], ranges["TRL GOLD"] = gold(case, encodings), gold_ranges
    except ImportError:
        missing["TRL GOLD"] = "not installed"
    if options.nemo_rl is None:
        missing["NeMo-RL"] = "no --nemo-rl"
    else:
        runs["NeMo-RL"], ranges["NeMo-RL"] = nemo(case, encodings, options.nemo_rl), nemo_ranges

    seconds, results = in_turns(runs, options.rounds)
    table = Table(title=f"aligning {case.name}: {tokens:,} tokens of the student")
    table.add_column("")
    for column in ("us per token", "time", "spans", "tokens in exact spans"):
        table.add_column(column, justify="right", no_wrap=True)
    for contender, taken in seconds.items():
        counted = ("", "")
        if contender in ranges:
            spans, share = exact(case, encodings, ranges[contender](results[contender]))
            counted = (f"{spans:,}", f"{share:.2%}")
        each = statistics.median(taken) / tokens * 1e6
        table.add_row(contender, f"{each:.2f}", ratio(taken, seconds["distill"]), *counted)
    for contender, why in missing.items():
        table.add_row(contender, why)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
