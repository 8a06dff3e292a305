"""Token boundaries of one side inside a token of the other, and what the running token's model says there.

At a boundary inside a token the text up to it is known to both models, but only one of them *stands* there and has a
row: the other's token *runs over* it. What that model thinks of the next bytes is in the row that began the token: of
the tokens that begin with the same bytes (`cut` of them, the running token's), each says what follows by its remaining
bytes, and the one that ends there says that another begins, it is not known which. So there are *interior rows* both
ways:

- the student is finer: its own row at the boundary, and the teacher's row that began the token running over it,
- the student is coarser: the teacher's row at the boundary, and the student's row that began its token.

`interior_rows` finds them in aligned tokens, `Inside` lists the tokens that count there on both sides. The bytes up to
a boundary are named by a token and a length, so that nothing has to be numbered and any process can name them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from align.byte_view import ByteView

# f(N tokens, place) -> (N,) int64, the cell of what the other side writes at a byte of each; NO_CELL, or EXCLUDED
CellsAt = Callable[[Sequence[bytes], int], np.ndarray]
# f(beginning, (N,) ids of the other side) -> (N,) bool
RunsOver = Callable[[bytes, np.ndarray], np.ndarray]
NO_CELL, EXCLUDED = -1, -2
LONGEST = 2**10  # bytes of a token, at most
SPAN = 32  # bits of a byte's place in its span


class InteriorRows(NamedTuple):
    """P boundaries inside a token, those of the finer student first, each kind in the order of the text.

    Attributes:
        student, teacher: (P,) int64, the positions of the tokens that the two rows predict.
        cut: (P,) int64, bytes of the running token before the boundary.
        coarser: (P,) bool, whether it is the student's token that runs over the boundary.
    """

    student: np.ndarray
    teacher: np.ndarray
    cut: np.ndarray
    coarser: np.ndarray

    def __len__(self) -> int:
        return len(self.cut)


class Pairs(NamedTuple):
    """The same P boundaries in a block of rows, with the running tokens.

    Attributes:
        student, teacher: (P,) int64, rows of the block, of what the two models say of it.
        token: (P,) int64, the running token: the student's id where `coarser`, else the teacher's.
        cut, coarser: see `InteriorRows`.
    """

    student: Tensor
    teacher: Tensor
    token: Tensor
    cut: Tensor
    coarser: Tensor


def interior_rows(
    student_spans: np.ndarray, teacher_spans: np.ndarray, student_lengths: np.ndarray, teacher_lengths: np.ndarray
) -> InteriorRows:
    """Return the boundaries of one side that lie inside a token of the other.

    Args:
        student_spans, teacher_spans: (S, 2) the first token of each span and the one behind its last, in order; the
            spans need not cover everything.
        student_lengths, teacher_lengths: (T,) and (U,) the bytes of each token.
    """
    sides = (_offsets(student_spans, student_lengths), _offsets(teacher_spans, teacher_lengths))
    found = []
    for coarser, own, other in ((False, sides[0], sides[1]), (True, sides[1], sides[0])):
        # `own` has the boundary: the token of `other` that begins at or before it begins before it.
        place = np.searchsorted(other.begin, own.begin, side="right") - 1
        begin = other.begin[place]
        inside = (begin < own.begin) & (begin >> SPAN == own.begin >> SPAN)
        rows = (own.token[inside], other.token[place[inside]])
        cut = (own.begin - begin)[inside]
        found.append(InteriorRows(*(rows[::-1] if coarser else rows), cut, np.full(len(cut), coarser)))
    return InteriorRows(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


class _Offsets(NamedTuple):
    """The tokens of all spans: their positions, and the byte each begins at, those of different spans far apart."""

    token: np.ndarray
    begin: np.ndarray


def _offsets(spans: np.ndarray, lengths: np.ndarray) -> _Offsets:
    spans = np.asarray(spans, np.int64).reshape(-1, 2)
    sizes = spans[:, 1] - spans[:, 0]
    number = np.repeat(np.arange(len(spans)), sizes)
    token = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes) + spans[number, 0]
    behind = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return _Offsets(token, behind[token] - behind[spans[number, 0]] + (number << SPAN))


class Inside:
    """What two sides know of the tokens at a boundary that one side's token runs over, by the bytes up to there.

    Args:
        running: the vocabulary whose tokens run over the boundary.
        cells_at: f(its tokens, place) -> the cell of what the other side writes at that byte of each: NO_CELL where
            that is none of text, and where a token ends there; EXCLUDED where the token is not to count.
        standing: (V,) int64, the cell of each id of the other side.
        runs_over: f(beginning, ids of the other side) -> whether a token of the running side would run over the
            boundary behind the beginning if one of these came next; None counts all.
    """

    def __init__(
        self, running: ByteView, cells_at: CellsAt, standing: np.ndarray, runs_over: RunsOver | None = None
    ) -> None:
        self.running, self.cells_at, self.runs_over = running, cells_at, runs_over
        self._standing = standing
        self._sorted = SortedTokens(running)
        self._known: dict[bytes, tuple[_List, _List]] = {}

    def look_up(self, token: Tensor, cut: Tensor) -> tuple[Listed, Listed]:
        """Return the running side's tokens and the standing side's at P boundaries.

        Args:
            token, cut: (P,) int64, the running token and how many of its bytes lie before the boundary.
        """
        beginnings = [self.running.of([i])[0][:n] for i, n in zip(token.tolist(), cut.tolist(), strict=True)]
        found = [self._look_up(beginning) for beginning in beginnings]
        return _listed([running for running, _ in found], token), _listed([other for _, other in found], token)

    def lengths(self, token: Tensor) -> Tensor:
        """Return the bytes of (P,) running tokens."""
        return torch.tensor([len(text) for text in self.running.of(token.tolist())], device=token.device)

    def _look_up(self, beginning: bytes) -> tuple[_List, _List]:
        known = self._known.get(beginning)
        if known is None:
            known = self._known[beginning] = self._find(beginning)
        return known

    def _find(self, beginning: bytes) -> tuple[_List, _List]:
        texts, ids = self._sorted.beginning_with(beginning)
        cells = self.cells_at(texts, len(beginning))
        counts = cells != EXCLUDED
        order = np.argsort(ids[counts], kind="stable")
        running = _List(ids[counts][order], cells[counts][order])
        standing = np.flatnonzero(np.isin(self._standing, running.cells[running.cells != NO_CELL]))
        if self.runs_over is not None:
            standing = standing[self.runs_over(beginning, standing)]
        return running, _List(standing, self._standing[standing])


class SortedTokens:
    """The tokens of a vocabulary in the order of their bytes, so that those with one beginning are neighbours."""

    def __init__(self, view: ByteView) -> None:
        ranked = sorted((token, index) for index, token in enumerate(view.tokens) if token)
        self.texts = [token for token, _ in ranked]
        self.ids = np.array([index for _, index in ranked], np.int64)

    def beginning_with(self, beginning: bytes) -> tuple[list[bytes], np.ndarray]:
        """Return the tokens that begin with some bytes (themselves included), and their ids (E,)."""
        first = bisect_left(self.texts, beginning)
        last = bisect_left(self.texts, _behind(beginning), lo=first)
        return self.texts[first:last], self.ids[first:last]


class Listed(NamedTuple):
    """The tokens that count at P boundaries, F in all, a boundary's together in the order of their ids.

    Attributes:
        pair, ids, cells: (F,) int64, which boundary, which token, and its cell there or NO_CELL.
    """

    pair: Tensor
    ids: Tensor
    cells: Tensor

    def cells_of(self, ids: Tensor, size: int) -> Tensor:
        """Return for (P, K) ids of a vocabulary of `size` their cells (P, K), EXCLUDED for those that do not count."""
        if not len(self.pair):
            return torch.full_like(ids, EXCLUDED)
        keys = self.pair * size + self.ids
        wanted = torch.arange(len(ids), device=ids.device)[:, None] * size + ids
        place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return self.cells[place].masked_fill(keys[place] != wanted, EXCLUDED)


class _List(NamedTuple):
    ids: np.ndarray
    cells: np.ndarray


def _listed(lists: list[_List], like: Tensor) -> Listed:
    pair = np.repeat(np.arange(len(lists)), np.array([len(each.ids) for each in lists], np.int64))
    none = np.empty(0, np.int64)
    ids = np.concatenate([none, *(each.ids for each in lists)])
    cells = np.concatenate([none, *(each.cells for each in lists)])
    return Listed(*(torch.from_numpy(part).to(like.device) for part in (pair, ids, cells)))


def _behind(beginning: bytes) -> bytes:
    """Return a byte string that in order stands behind all that begin with some bytes, and before all others behind."""
    kept = beginning.rstrip(b"\xff")
    # Behind a run of the highest byte there is nothing but longer runs.
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else b"\xff" * (len(beginning) + LONGEST)
