"""Where two tokenisations of one text meet: the smallest spans of tokens that cover the same bytes on both sides.

A *sync boundary* is a byte offset where both sides have a token boundary; a *span* is what lies between two that
follow each other. So spans partition the text, none can be split, and each side's tokens belong to exactly one. Only
the bytes of the tokens count: how a tokenizer would have split the text does not matter, and characters may be cut.
Time and memory grow with the bytes of the text, and nothing is searched: both sides' boundaries are marked on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from align.byte_view import alteration, byte_view, tokenise
from distill.errors import UserError


class Spans(NamedTuple):
    """S spans of one text, in order.

    Attributes:
        student, teacher: (S, 2) int64, the first token of each span and the one behind its last.
    """

    student: np.ndarray
    teacher: np.ndarray

    def __len__(self) -> int:
        return len(self.student)


def spans_of(student: Sequence[bytes], teacher: Sequence[bytes]) -> Spans:
    """Align two tokenisations of the same bytes.

    A token without bytes belongs to the span it stands in: at a boundary to the span behind it, at the end of the text
    to the last. A text without bytes has no spans.

    Args:
        student, teacher: the bytes of each token, in order.

    Raises:
        ValueError: the two sides are not the same bytes.
    """
    text = b"".join(student)
    if text != b"".join(teacher):
        raise ValueError("the two tokenisations do not stand for the same bytes")
    sides = student, teacher
    reached = [_reached(side, len(text)) for side in sides]
    (boundaries,) = np.nonzero(reached[0] * reached[1])
    return Spans(*(_between(at[boundaries], len(side)) for at, side in zip(reached, sides, strict=True)))


def common_spans(student: Any, teacher: Any, text: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the spans of a text between two tokenizers: ((begin, end), (begin, end)) ranges of their tokens.

    The tokens are those of the text from its beginning, without special tokens: the spelling of one in the text is
    text (`align.byte_view.tokenise`). A space that sentencepiece puts before it is left out of the comparison.

    Raises:
        UserError: a tokenizer changes the text, so the two sides are not the same bytes.
    """
    sides = []
    for tokenizer in (student, teacher):
        view = byte_view(tokenizer)
        tokens = tokenise(tokenizer, view, text)
        if tokens is None:
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise UserError(f"the tokenizer {name} changes this text: it {alteration(tokenizer, view, text)}")
        sides.append(tokens.pieces)
    spans = spans_of(*sides)
    return [((a, b), (c, d)) for (a, b), (c, d) in zip(spans.student.tolist(), spans.teacher.tolist(), strict=True)]


def _reached(tokens: Sequence[bytes], size: int) -> np.ndarray:
    """Return (size + 1,): by byte offset, how many tokens it takes to get there; 0 where no token ends, and at 0."""
    lengths = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
    (last,) = np.nonzero(lengths)  # a token without bytes ends where the one before it does
    at = np.zeros(size + 1, dtype=np.int64)
    at[np.cumsum(lengths)[last]] = last + 1
    return at


def _between(stops: np.ndarray, count: int) -> np.ndarray:
    """Return (S, 2) ranges that follow each other, given where each stops; the last takes what is left of `count`."""
    ranges = np.zeros((len(stops), 2), dtype=np.int64)
    ranges[:, 1] = stops
    ranges[-1:, 1] = count
    ranges[1:, 0] = stops[:-1]
    return ranges
