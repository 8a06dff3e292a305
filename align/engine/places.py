"""Which row of the student meets which of the teacher: the spans of a batch as indices into what a loss has of each.

The student's rows are those of `Batch.trained()`, N of them; the teacher's are those of its tokens in spans, M of them,
span after span, which is also the order of stored numbers. A row is named by the token it predicts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.kernels.prefixes import interior_rows
from distill.batch import Batch


@dataclass(frozen=True, slots=True)
class Places:
    """The comparisons of a batch; index tensors are int64 and on the CPU.

    Attributes:
        teacher_rows, teacher_positions: (M,) where in (B, U) the teacher's tokens in spans are.
        span: (M,) the span of each.
        student_span: (N,) the span of each trained token, -1 for none.
        following: (N,) bool, whether the next trained row is that of the next token.
        student, teacher: (S,) the row of either side at the beginning of each span, of N and of M.
        behind: (S,) bool, whether on both sides the row before that one predicts the token that ends there.
        interior: the boundaries inside tokens; empty where they were not asked for.
    """

    teacher_rows: Tensor
    teacher_positions: Tensor
    span: Tensor
    student_span: Tensor
    following: Tensor
    student: Tensor
    teacher: Tensor
    behind: Tensor
    interior: Interior


@dataclass(frozen=True, slots=True)
class Interior:
    """P boundaries of one side inside a token of the other, by the student's row.

    Attributes:
        student, teacher: (P,) the two rows, of N and of M.
        token: (P,) the id that runs over the boundary: the student's where `coarser`, else the teacher's.
        cut: (P,) bytes of it before the boundary.
        coarser: (P,) bool.
    """

    student: Tensor
    teacher: Tensor
    token: Tensor
    cut: Tensor
    coarser: Tensor


def places(batch: Batch, *, lengths: tuple[np.ndarray, np.ndarray] | None = None) -> Places:
    """Return the comparisons of a batch with `other`.

    Args:
        lengths: (V_S,) and (V_T,) bytes of each token, where boundaries inside tokens are wanted.
    """
    assert batch.other is not None, "an alignment's batches name the teacher's tokens"
    row, begin, end, teacher_begin, teacher_end = batch.other.spans.cpu().numpy().T
    width, teacher_width = batch.input_ids.shape[1], batch.other.input_ids.shape[1]
    trained = (batch.weights.cpu().numpy()[:, 1:] > 0).ravel()
    index = np.full(batch.input_ids.shape, -1)
    index[:, 1:] = np.where(trained, trained.cumsum() - 1, -1).reshape(len(index), -1)
    own, number = _ranges(row * width + begin, end - begin)
    student_span = np.full(int(trained.sum()), -1)
    student_span[index.ravel()[own]] = number
    position = np.flatnonzero(index.ravel() >= 0)
    following = np.append(np.diff(position) == 1, False)[: len(position)]
    others, span = _ranges(row * teacher_width + teacher_begin, teacher_end - teacher_begin)
    place = np.full(batch.other.input_ids.numel(), -1)
    place[others] = np.arange(len(others))
    none = torch.zeros(0, dtype=torch.int64)
    interior = Interior(none, none, none, none, none.bool())
    if lengths is not None:
        ids = [side.cpu().numpy().ravel() for side in (batch.input_ids, batch.other.input_ids)]
        spans = [
            np.stack([row * wide + first, row * wide + last], 1)
            for wide, first, last in ((width, begin, end), (teacher_width, teacher_begin, teacher_end))
        ]
        sizes = [table[side] for table, side in zip(lengths, ids, strict=True)]
        inside = interior_rows(*spans, *sizes)
        token = np.where(inside.coarser, ids[0][inside.student], ids[1][inside.teacher])
        rows = index.ravel()[inside.student]
        parts = (rows, place[inside.teacher], token, inside.cut, inside.coarser)
        order = np.argsort(rows, kind="stable")
        interior = Interior(*(torch.from_numpy(part[order]) for part in parts))
    begins = index[row, begin], place[row * teacher_width + teacher_begin]
    next_ = np.append(np.diff(others) == 1, False)[: len(others)]  # no span begins at the first token of a row
    last = begins[0] - 1, begins[1] - 1
    behind = (begins[0] > 0) & (begins[1] > 0) & following[last[0]] & (student_span[last[0]] >= 0) & next_[last[1]]
    return Places(
        teacher_rows=torch.from_numpy(others // teacher_width),
        teacher_positions=torch.from_numpy(others % teacher_width),
        span=torch.from_numpy(span),
        student_span=torch.from_numpy(student_span),
        following=torch.from_numpy(following),
        student=torch.from_numpy(begins[0]),
        teacher=torch.from_numpy(begins[1]),
        behind=torch.from_numpy(behind),
        interior=interior,
    )


def _ranges(begins: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of ranges, one after another, and which range each is of."""
    number = np.repeat(np.arange(len(sizes)), sizes)
    return begins[number] + np.arange(len(number)) - (np.cumsum(sizes) - sizes)[number], number
