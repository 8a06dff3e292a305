"""Two vocabularies coarsened onto one set of cells: a static table per side, from token id to cell.

A cell is an event that both models can say: summing each side's probabilities by cell gives two distributions over the
same outcomes, and merging outcomes never increases an f-divergence (data processing). Three tables:

`shared_cells`
    A token both sides have, byte for byte, is a cell of its own. All others are one cell more.
`prefix_cells`
    BPM (arXiv 2607.22334): each student token is a cell; a teacher token counts for the longest student token that its
    bytes begin with.
`consistent_cells`
    CSPC: a cell is a connected component of "these tokens can begin the same text". Every teacher token is joined with
    the first token that the student's own tokenizer makes of its bytes, and the other way round, also where they run
    into a mark of reasoning that is one token of the other side. What both models know of the next bytes is then the
    same event on both sides, whichever way each of them splits it; which of the splits is likelier is not compared, and
    no student is told to prefer its teacher's.

Cells are of *text*. The tokens that end an answer, on both sides, are one cell; special tokens with the same role are a
cell per role; a cell that one side has no token for is pooled with all others like it, of both sides, in the *bottom*
cell. Kept apart they would be mass where the other side has none, and every KL infinite. Where only one side has such
tokens there is nothing to compare them with: they get no cell, and a distribution is taken over the others, as it is
over the ids that no token has (padding).

Nothing here looks at a model or at a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.byte_view import REASONING_MARKS, ByteView
from align.kernels.first_tokens import Splits, longest_prefixes
from distill.errors import UserError

NONE, STOP = -1, -2  # labels: without a counterpart; ends an answer. A role is -3 and less, an id nobody has UNUSED
UNUSED = np.iinfo(np.int64).min


@dataclass(frozen=True, slots=True)
class Cells:
    """C cells of a student's and a teacher's vocabulary.

    Attributes:
        student: (V_S,) int64, by id its cell; -1 for none: the id is left out before the softmax, as padding is.
        teacher: (V_T,) int64, the same for the teacher.
        count: C; each cell has at least one id on either side.
        bottom: the cell of everything without a counterpart; -1 where there is none.
        stop: the cell that ends an answer; -1 where none was named.
    """

    student: Tensor
    teacher: Tensor
    count: int
    bottom: int
    stop: int

    @property
    def exact(self) -> bool:
        """Whether every cell is one id on either side: the vocabularies are one, up to order and padding."""
        return all(int((side >= 0).sum()) == self.count for side in (self.student, self.teacher))

    def to(self, device: torch.device | str) -> Cells:
        """Return the tables on another device."""
        return Cells(self.student.to(device), self.teacher.to(device), self.count, self.bottom, self.stop)


def shared_cells(
    student: ByteView,
    teacher: ByteView,
    *,
    stops: tuple[Iterable[int], Iterable[int]] = ((), ()),
    specials: Mapping[int, int] | None = None,
) -> Cells:
    """Return a cell per byte string that both vocabularies have a token for, and the bottom cell.

    Args:
        student, teacher: the two vocabularies.
        stops: the ids that end an answer, the student's first.
        specials: student id -> teacher id of special tokens that mean the same.

    Raises:
        UserError: a stop or a special that is not an id of its side; ids that end an answer on one side only.
    """
    node = _Nodes(student, teacher)
    return _cells(student, teacher, node.of(student.tokens), node.of(teacher.tokens), stops, specials)


def prefix_cells(
    student: ByteView,
    teacher: ByteView,
    *,
    stops: tuple[Iterable[int], Iterable[int]] = ((), ()),
    specials: Mapping[int, int] | None = None,
) -> Cells:
    """Return a cell per student token that is the longest beginning of some teacher token: BPM's phi.

    Arguments and errors: `shared_cells`. The student's other tokens are in the bottom cell.
    """
    node = _Nodes(student, teacher)
    known = {token for token in student.tokens if token}
    return _cells(
        student, teacher, node.of(student.tokens), node.of(longest_prefixes(teacher.tokens, known)), stops, specials
    )


def consistent_cells(
    student: ByteView,
    teacher: ByteView,
    *,
    student_splits: Splits,
    teacher_splits: Splits,
    stops: tuple[Iterable[int], Iterable[int]] = ((), ()),
    specials: Mapping[int, int] | None = None,
    longest: bool = True,
) -> Cells:
    """Return the cells of CSPC.

    Args:
        student, teacher, stops, specials: see `shared_cells`, and its errors.
        student_splits: how the student's tokenizer splits some bytes; likewise `teacher_splits`.
        longest: also join each token with the longest beginning of it that both sides have.
    """
    node = _Nodes(student, teacher)
    sides = (student.tokens, teacher.tokens)
    shared = {token for token in sides[0] if token} & {token for token in sides[1] if token}
    shared |= {bytes([byte]) for byte in range(256)}
    parent = np.arange(len(node))
    for tokens, other, running, splits in (
        (sides[0], sides[1], student_splits, teacher_splits),
        (sides[1], sides[0], teacher_splits, student_splits),
    ):
        own = [token for token in tokens if token]
        begins = splits.first(own)
        ends = [other[index] if index >= 0 else None for index in begins.tolist()]
        _join(parent, node.of(own), node.of(ends))
        _join(parent, *map(node.of, _before_marks(own, running, splits)))
        if longest:
            _join(parent, node.of(own), node.of(longest_prefixes(own, shared)))
    labels = [_roots(parent, node.of(tokens)) for tokens in sides]
    return _cells(student, teacher, labels[0], labels[1], stops, specials)


def _before_marks(tokens: Sequence[bytes], own: Splits, other: Splits) -> tuple[list[bytes], list[bytes]]:
    """Return tokens of one side that run into a mark of reasoning of the other, and what that side begins them with.

    A tokenizer finds its added tokens first: where `</think>` is one, ".</think>" is "." and `</think>`, even if there
    is a token ".</", with which a tokenizer that has no such mark begins. Other added tokens are left out, and so are
    tokens that end with "<" alone: they begin too much else.
    """
    running, begins = [], []
    for mark in (other.view.tokens[index] or b"" for index in other.view.added):
        if mark.decode(errors="replace") not in REASONING_MARKS:
            continue
        ends = [mark[:size] for size in range(2, len(mark) + 1)]
        for token in (each for each in tokens if each.endswith(tuple(ends))):
            before = token.removesuffix(max((end for end in ends if token.endswith(end)), key=len))
            first, begin = (
                side.view.tokens[split] if split >= 0 else None
                for side, split in ((own, own.first([before + mark])[0]), (other, other.first([before])[0]))
            )
            if before and first == token and begin:
                running.append(token)
                begins.append(begin)
    return running, begins


class _Nodes:
    """Numbers for the byte strings of two vocabularies, and for all single bytes; -1 for None."""

    def __init__(self, *sides: ByteView) -> None:
        texts = [bytes([byte]) for byte in range(256)]
        texts += [token for side in sides for token in side.tokens if token]
        self._number = {text: number for number, text in enumerate(dict.fromkeys(texts))}

    def __len__(self) -> int:
        return len(self._number)

    def of(self, texts: Sequence[bytes | None]) -> np.ndarray:
        """Return (N,) int64."""
        return np.fromiter((self._number[text] if text else NONE for text in texts), np.int64, len(texts))


def _join(parent: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Join nodes in a forest, in place; a pair with NONE in it joins nothing."""
    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        if one == other or NONE in (one, other):
            continue
        one, other = _root(parent, one), _root(parent, other)
        parent[max(one, other)] = min(one, other)


def _root(parent: np.ndarray, node: int) -> int:
    while (above := int(parent[node])) != node:
        parent[node] = parent[above]
        node = above
    return node


def _roots(parent: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Return (N,) the root of each node, NONE for NONE."""
    top = parent
    while not np.array_equal(above := top[top], top):
        top = above
    return np.where(nodes == NONE, NONE, top[nodes])


def _cells(
    student: ByteView,
    teacher: ByteView,
    student_labels: np.ndarray,
    teacher_labels: np.ndarray,
    stops: tuple[Iterable[int], Iterable[int]],
    specials: Mapping[int, int] | None,
) -> Cells:
    """Number labels as cells: those of both sides in order, then the bottom cell."""
    sides = [("student", student, student_labels, list(stops[0])), ("teacher", teacher, teacher_labels, list(stops[1]))]
    if bool(sides[0][3]) != bool(sides[1][3]):
        raise UserError(f"only one side has tokens that end an answer: student {stops[0]}, teacher {stops[1]}")
    roles = [list(pairs) for pairs in zip(*(specials or {}).items(), strict=True)] or [[], []]
    for (who, view, labels, ends), ids in zip(sides, roles, strict=True):
        unknown = [index for index in (*ends, *ids) if not 0 <= index < len(view)]
        if unknown:
            raise UserError(f"the {who}'s vocabulary has ids up to {len(view) - 1}, and not {unknown[0]}")
        nobody = [index for index, token in enumerate(view.tokens) if token is None and index not in view.special]
        labels[nobody] = UNUSED
        labels[ids] = STOP - 1 - np.arange(len(ids))
        labels[ends] = STOP
    common = np.intersect1d(student_labels, teacher_labels)
    common = common[(common != NONE) & (common != UNUSED)]
    tables = []
    for labels in (student_labels, teacher_labels):
        place = np.searchsorted(common, labels).clip(max=max(len(common) - 1, 0))
        tables.append(np.where(np.isin(labels, common), place, np.where(labels == UNUSED, UNUSED, NONE)))
    pooled = all((table == NONE).any() for table in tables)
    if not len(common):
        raise UserError("student and teacher have no token in common: they cannot be compared")
    bottom = len(common) if pooled else -1
    cells = [torch.from_numpy(np.where(table == NONE, bottom, table.clip(min=-1))) for table in tables]
    stop = int(np.searchsorted(common, STOP)) if STOP in common else -1
    return Cells(cells[0], cells[1], len(common) + pooled, bottom, stop)
