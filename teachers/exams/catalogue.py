"""Exams by name: where a usual test lies on the hub, which split and columns it has, and which verifier judges it.

`gsm8k` as a SRC is the hub's data set; `gsm8k:FILE` the same rows from a file, or from `hf:` at another place, in the
data set's own columns. An exam is stricter than a file: a row without its columns is unusable, not guessed at. Where
a data set has problems to train on, whoever trains gets those and whoever evaluates gets the test; where it has none,
training on it is training on the test, and that is said. What a row's question and gold are is the business of
teachers/prompts.py; no problem of any exam is stored here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distill.errors import UserError
from distill.progress import say
from teachers.prompt_readers import read_rows
from teachers.row_meta import OPTION_COLUMNS

TEST = "heldout"  # what `read_prompts` calls the split that is not trained on
CHOICE_COLUMNS = ("answer", "gold", "answerKey", "correct", "answer_index", "label")  # of the right option


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """One exam: its place on the hub, and what its rows have."""

    hub: str | None  # NAME[:CONFIG]; None: only ever a file
    test: str | None = None  # its splits on the hub
    train: str | None = None
    columns: tuple[str, ...]  # a row needs each of them, of A|B one
    verifier: str
    between: float  # omega^2 of distill/power.py, a rough figure that fits published scores of pairs of models


MIDDLING = 0.06  # omega^2 on GPQA-Diamond and LiveCodeBench; contests have more, what most models solve has less

EXAMS: dict[str, Exam] = {
    "gsm8k": Exam(
        hub="openai/gsm8k:main",
        test="test",
        train="train",
        columns=("question", "answer"),
        verifier="math",
        between=0.03,
    ),
    "math-500": Exam(
        hub="HuggingFaceH4/MATH-500", test="test", columns=("problem", "answer"), verifier="math", between=0.03
    ),
    "aime24": Exam(
        hub="HuggingFaceH4/aime_2024", test="train", columns=("problem", "answer"), verifier="math", between=0.10
    ),
    "aime25": Exam(hub="math-ai/aime25", test="test", columns=("problem", "answer"), verifier="math", between=0.10),
    "svamp": Exam(
        hub="ChilleD/SVAMP",
        test="test",
        train="train",
        columns=("Body", "Question", "Answer"),
        verifier="math",
        between=0.03,
    ),
    "mcq": Exam(
        hub=None,
        columns=("question", "|".join(OPTION_COLUMNS), "|".join(CHOICE_COLUMNS)),
        verifier="choice",
        between=MIDDLING,
    ),
}


def exam_of(source: str) -> Exam | None:
    """Return the exam that a SRC names, None where it is another kind of source."""
    return EXAMS.get(source.partition(":")[0])


def exam_rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yield an exam's rows with where each stands; a row that lacks a column of the exam is a ValueError.

    Args:
        source: `NAME`, or `NAME:` and a file or `hf:` source with rows in the data set's columns.
        split: "train" or "heldout", for the hub; a file is taken whole.

    Raises:
        UserError: the exam has no place on the hub, or its rows cannot be read.
    """
    name, colon, place = source.partition(":")
    exam = EXAMS[name]
    if not place:
        if exam.hub is None or colon:
            raise UserError(f"--prompts {source} names no file: give {name}:FILE")
        if split != TEST and exam.train is None:
            say(f"{name} has no problems to train on: these are the exam's own, no measure of whoever learns them")
        hub, _, config = exam.hub.partition(":")
        place = f"hf:{hub}:{config}:{exam.test if split == TEST else exam.train or exam.test}"
    return ((where, _checked(name, exam, row)) for where, row in read_rows(place))


def _checked(name: str, exam: Exam, row: Any) -> Any:
    """Return the row's columns that the exam knows, or why the row is none of its rows."""
    if not isinstance(row, Mapping):
        return row
    found: dict[str, Any] = {}
    for column in exam.columns:
        there = [key for key in column.split("|") if row.get(key) not in (None, "", [], {})]
        if not there:
            having = ", ".join(repr(str(key)) for key in list(row)[:8]) or "no columns"
            return ValueError(f"{name} rows have {', '.join(exam.columns)}; this one lacks {column}: it has {having}")
        found |= {key: row[key] for key in there}
    return found | {key: row[key] for key in ("level", "difficulty", "type", "subject") if key in row}
