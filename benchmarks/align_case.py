"""What `alignment.py` and `align_step.py` measure on: texts, two tokenizers, and contenders that take turns."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
DATA = Path(__file__).resolve().parents[1] / "recipes/problems/gsm8k_train_300.jsonl"


class Case(NamedTuple):
    """Texts that both tokenizers leave as they are, the tokenizers, and a name for a table's title."""

    texts: list[str]
    student: Any
    teacher: Any
    name: str


def arguments(about: str | None, *, answers: int) -> argparse.ArgumentParser:
    """Return a parser with the options of both programs."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="MODEL whose tokenizer is the student's")
    parser.add_argument("--teacher", help="MODEL whose tokenizer is the teacher's")
    parser.add_argument("--data", type=Path, default=DATA, help="a .jsonl file with the column answer")
    parser.add_argument("--answers", type=int, default=answers, help="of the file's, from its beginning")
    parser.add_argument("--rounds", type=int, default=3, help="times the contenders take turns")
    return parser


def read_case(options: argparse.Namespace) -> Case:
    """Return the case; without two models, tokenizers of 2,000 and 4,000 tokens trained on the texts."""
    from align.byte_view import byte_view, tokenise
    from distill.models import load_tokenizer

    lines = options.data.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["answer"] for line in lines]
    if options.student and options.teacher:
        student, teacher = load_tokenizer(options.student), load_tokenizer(options.teacher)
        names = f"{Path(options.teacher).name} -> {Path(options.student).name}"
    else:
        student, teacher = _trained(texts, 2000, r"\d"), _trained(texts, 4000, r"\d{1,3}")
        names = "two small tokenizers trained on the data"
    sides = [(tokenizer, byte_view(tokenizer)) for tokenizer in (student, teacher)]
    kept = [text for text in texts[: options.answers] if all(tokenise(*side, text, continued=True) for side in sides)]
    return Case(kept, student, teacher, f"{len(kept):,} answers, {names}")


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return the seconds of every turn, and what each contender returned in a first one that is not counted."""
    results = {name: run() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds, results


def ratio(mine: list[float], reference: list[float]) -> str:
    """Return the median over rounds of how many times the reference's time something took."""
    return f"{statistics.median(a / b for a, b in zip(mine, reference, strict=True)):.2f}x"


def _trained(texts: list[str], size: int, digits: str) -> Any:
    """Return a byte-level tokenizer made of the texts; `digits` is how numbers are cut."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(digits), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
