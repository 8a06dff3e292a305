"""Seconds and memory of a loss across two vocabularies and its gradients, beside soft-logits with one vocabulary.

Real token ids of the same answers, random hidden states: what is measured is everything behind the two models' decoders
(places, both heads, the comparison, gradients by the student's hidden states and head). `one vocabulary` is soft-logits
with the same student and a teacher of the same width that has the student's vocabulary; `the teacher's` with the same
teacher and a student that has its vocabulary, on its tokens: what this teacher costs without another tokenizer.
`products alone` are the
products of this pair's heads, which no loss can avoid: a teacher with three times the vocabulary costs three times the
product, whatever the method. `once` is making a method's tables, for a whole run.

Memory is the process's peak beyond what it had before, gradients included (Linux only). The title says what the logits
of both sides would take if they were held at once. Contenders take turns; a ratio is the median over rounds.

usage: python benchmarks/align_step.py [--student MODEL --teacher MODEL] [--answers N] [--methods NAME ...]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from align_case import Case, arguments, in_turns, ratio, read_case
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

ROWS = 512  # of a piece of the products


def alignments(case: Case, methods: Sequence[str]) -> dict[str, Any]:
    from align.engine.token_alignment import token_alignment

    ends = {
        "student_stops": [case.student.eos_token_id],
        "teacher_stops": [case.teacher.eos_token_id],
    }
    sides = {"student_tokenizer": case.student, "teacher_tokenizer": case.teacher}
    return {name: token_alignment(name, "measured", **sides, **ends) for name in methods}


def paired(case: Case, alignment: Any) -> Any:
    """Return the batch of the answers in both sides' tokens."""
    from distill.batch import collate
    from distill.render import render_plain

    pairs = (alignment.pair(render_plain(case.student, "A:", text), ("A:", text)) for text in case.texts)
    return collate([example for example in pairs if example is not None], pad_id=0)


def forward(shape: Sequence[int], width: int, outcomes: int, *, trained: bool) -> Any:
    """Return random hidden states and a head."""
    from distill.forward import Forward
    from distill.head import Head

    head = nn.Linear(width, outcomes, bias=False).requires_grad_(trained)
    return Forward(torch.randn(*shape, width).requires_grad_(trained), Head(head))


def products(hidden: Tensor, weight: Tensor, other_hidden: Tensor, other_weight: Tensor) -> None:
    """Make the four products of a loss in pieces: both sides' logits, and the student's gradients."""
    by_weight, by_hidden = torch.zeros_like(weight), torch.empty_like(hidden)
    for start in range(0, len(other_hidden), ROWS):
        other_hidden[start : start + ROWS] @ other_weight.t()
    for start in range(0, len(hidden), ROWS):
        piece = slice(start, start + ROWS)
        logits = hidden[piece] @ weight.t()
        torch.mm(logits, weight, out=by_hidden[piece])
        by_weight.addmm_(logits.t(), hidden[piece])


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Return the process's peak beyond what it has now, None where the system does not say."""
    status = Path("/proc/self/status")

    def read(name: str) -> int:
        line = next(text for text in status.read_text().splitlines() if text.startswith(name))
        return int(line.split()[1]) * 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = read("VmRSS")
    except OSError:
        return None
    run()
    return max(0, read("VmHWM") - before)


def main() -> None:
    """Print the table."""
    from align.engine.places import places
    from distill.losses import LOSSES

    parser = arguments(__doc__, answers=16)
    parser.add_argument("--width", type=int, default=576, help="of both models' hidden states")
    parser.add_argument("--methods", nargs="+", default=["cspc", "bpm", "shared_kl", "xtoken", "gold", "uld", "alm"])
    options = parser.parse_args()
    torch.manual_seed(0)
    case = read_case(options)
    made = alignments(case, options.methods)
    batch = paired(case, next(iter(made.values())))
    alone = replace(batch, other=None)
    sizes = len(case.student), len(case.teacher)
    student = forward(batch.input_ids.shape, options.width, sizes[0], trained=True)
    same = forward(batch.input_ids.shape, options.width, sizes[0], trained=False)
    teacher = forward(batch.other.input_ids.shape, options.width, sizes[1], trained=False)
    like_teacher = batch.other.batch()
    for row, begin in enumerate(batch.other.begins.tolist()):
        like_teacher.weights[row, begin:] = batch.other.attention_mask[row, begin:].float()
    wide = forward(batch.other.input_ids.shape, options.width, sizes[1], trained=True)
    met = places(batch)
    rows = student.hidden[:, :-1][batch.trained().rows].detach()
    other_rows = teacher.hidden[met.teacher_rows, met.teacher_positions - 1]
    heads = [side.head.linear.weight.detach() for side in (student, teacher)]

    once: dict[str, float] = {}
    runs: dict[str, Callable[[], Any]] = {
        "one vocabulary": lambda: LOSSES["soft_logits"].fn(student, same, alone, num_outcomes=sizes[0]).total,
        "the teacher's": lambda: LOSSES["soft_logits"].fn(wide, teacher, like_teacher, num_outcomes=sizes[1]).total,
        "products alone": lambda: products(rows, heads[0], other_rows, heads[1]),
    }
    for name, alignment in made.items():
        mode = alignment.modes["soft_logits"]
        start = time.perf_counter()
        inner = mode.inner(None, None)
        once[name] = time.perf_counter() - start
        runs[name] = lambda mode=mode, inner=inner: mode.fn(student, teacher, batch, inner=inner).total

    def step(run: Callable[[], Any]) -> Callable[[], None]:
        def whole() -> None:
            for side in (student, wide):
                side.hidden.grad = side.head.linear.weight.grad = None
            total = run()
            if total is not None:
                total.backward()

        return whole

    steps = {name: step(run) for name, run in runs.items()}
    seconds, _ = in_turns(steps, options.rounds)
    both = 4 * (len(rows) * sizes[0] + len(other_rows) * sizes[1]) / 2**20
    title = f"{case.name}: {len(rows):,} and {len(other_rows):,} rows, {sizes[0]:,} and {sizes[1]:,} outcomes, "
    table = Table(title=f"{title}width {options.width}; both sides' logits: {both:,.0f} MiB")
    table.add_column("")
    for column in ("seconds", "to one vocabulary", "to products", "peak MiB", "once, s"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, taken in seconds.items():
        peak = peak_bytes(steps[name])
        table.add_row(
            name,
            f"{statistics.median(taken):.2f}",
            ratio(taken, seconds["one vocabulary"]),
            ratio(taken, seconds["products alone"]),
            "" if peak is None else f"{peak / 2**20:,.0f}",
            f"{once[name]:.1f}" if name in once else "",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
