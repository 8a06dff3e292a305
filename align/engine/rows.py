"""A method over rows as the target of a fused loss: of neither vocabulary do the logits of all rows exist at once.

A `Comparison` is a list of the student's rows, each with a row of the teacher's: where both have a token boundary,
where one of them has one inside a token of the other (`align.engine.places`), or whatever else a method looks at. A row
of the student may be in none, one or several; its value is their sum. The kernels run under autograd on a block of the
student's logits, and its gradient is written in their place, as `distill.fused` asks of a target. A kernel may also
read the row before each of its own: blocks come from the last to the first, and what the row before a block owes to it
is kept until that row's own block comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from align.kernels.teacher_rows import Teacher
from distill.batch import TeacherRows
from distill.fused import CHUNK, CPU_BLOCK, GPU_BLOCK, fused_loss
from distill.fused_heads import projection, vocabulary_width
from distill.head import Head
from distill.supports import check_width

# (student_logits (n, V_S), (p,) rows of them, teacher of m rows, (p,) rows of it, which of the P) -> (p,) nats; one
# that asks no teacher must not look at its rows
Kernel = Callable[[Tensor, Tensor, Teacher, Tensor, slice | Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Comparison:
    """P rows of the student, each with one of the teacher's, and what compares them.

    Attributes:
        student: (P,) int64 of the N trained rows, ascending; on the CPU.
        teacher: (P,) int64 of the teacher's M rows; on the CPU. None where the teacher is not asked.
        kernel: compares those in a block.
        weight: of its values, beside other comparisons.
        reach: how many rows before these the kernel reads on both sides, 0 or 1.
    """

    student: Tensor
    teacher: Tensor | None
    kernel: Kernel
    weight: float = 1.0
    reach: int = 0


class Source(Protocol):
    """What the teacher says at M rows."""

    def load(self, piece: slice) -> None:
        """Make rows ready."""

    def rows(self, piece: slice) -> Teacher:
        """Return some of the rows last made ready."""


class Running:
    """A teacher that runs: hidden states (M, D'), projected a chunk at a time.

    Raises:
        UserError: its head is narrower than its tokenizer.
    """

    def __init__(self, hidden: Tensor, head: Head, *, num_outcomes: int, temperature: float) -> None:
        check_width("teacher", vocabulary_width(head), num_outcomes)
        self.head, self.num_outcomes, self.temperature = head, num_outcomes, temperature
        self.projection = projection(head, hidden.detach(), trained=False)
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.buffer = hidden.new_empty(0, num_outcomes, dtype=self.dtype)
        self.start = 0

    def load(self, piece: slice) -> None:
        size = piece.stop - piece.start
        if len(self.buffer) < size:
            self.buffer = self.buffer.new_empty(size, self.num_outcomes)
        self.projection.project(piece, self.buffer[:size])
        self.head.transform_(self.buffer[:size])
        self.start = piece.start

    def rows(self, piece: slice) -> Teacher:
        logits = self.buffer[piece.start - self.start : piece.stop - self.start]
        return Teacher.dense(logits, num_outcomes=self.num_outcomes, temperature=self.temperature)


class Stored:
    """What a teacher said once of M rows.

    Raises:
        UserError: see `Teacher.stored`.
    """

    def __init__(self, rows: TeacherRows, *, num_outcomes: int, came: Tensor) -> None:
        self.teacher = Teacher.stored(rows, num_outcomes=num_outcomes, came=came)

    def load(self, piece: slice) -> None:
        """There is nothing to project."""

    def rows(self, piece: slice) -> Teacher:
        return self.teacher.rows(piece)


@dataclass(slots=True)
class Target:
    """The comparisons of a batch, as `distill.fused` takes a target.

    Attributes:
        source: what the teacher says.
        comparisons: which rows meet, and how.
        weights: (N,) of the student's rows.
        temperature: divides the student's logits.
        block_rows: rows compared at once.
    """

    source: Source
    comparisons: Sequence[Comparison]
    weights: Tensor
    temperature: float
    block_rows: int
    _owed: Tensor | None = None  # (V,) to the last row that comes next

    @property
    def reach(self) -> int:
        """How many rows before a block are read."""
        return max(each.reach for each in self.comparisons)

    def load(self, piece: slice) -> None:
        """Make ready what the teacher says to a chunk of the student's rows."""
        rows = self._teacher_rows(piece)
        if rows.stop > rows.start:
            self.source.load(rows)

    def compare(
        self, student: Tensor, first: int, rows: slice, picked: slice, before: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the values of a block, (n,) as `divergence`, and leave the gradient in place of its logits."""
        values = student.new_zeros(len(student))
        for start in reversed(range(0, len(student), self.block_rows)):
            stop = min(start + self.block_rows, len(student))
            if not self.reach:
                block, lead = student[start:stop], 0
            elif start:
                block, lead = student[start - 1 : stop], 1
            else:
                block = student[:stop] if before is None else torch.cat([before, student[:stop]])
                lead = len(block) - stop
            gradient = self._compare(block, values[start:stop], rows.start + start, lead)
            if self._owed is not None:
                gradient[-1] += self._owed
            self._owed = gradient[0].clone() if lead else None
            student[start:stop] = gradient[lead:]
        return {"divergence": values}

    def _compare(self, student: Tensor, values: Tensor, start: int, lead: int) -> Tensor:
        """Fill the values (n,) of rows from `start` on; return the gradient by logits (lead + n, V)."""
        here = slice(start, start + len(values))
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            logits = leaf if self.temperature == 1.0 else leaf / self.temperature
            parts = list(self._values(logits, here, lead))
            if not parts:
                return torch.zeros_like(student)
            # A row's gradient is multiplied by its own weight later, whichever row's value it is of.
            weights = self.weights[here.start - lead : here.stop] if self.reach else None
            sums = [value.sum() if weights is None else weights[own] @ value for own, value in parts]
            (gradient,) = torch.autograd.grad(torch.stack(sums).sum(), leaf)
        for own, value in parts:
            values.index_add_(0, own - lead, value.detach().to(values.dtype))
        return gradient if weights is None else gradient.div_(weights[:, None])

    def _values(self, logits: Tensor, here: slice, lead: int) -> Iterator[tuple[Tensor, Tensor]]:
        needed, device = self._teacher_rows(here), logits.device
        teacher = self.source.rows(needed)
        for each in self.comparisons:
            piece = _within(each.student, here)
            if piece.stop > piece.start:
                own = (each.student[piece] - here.start + lead).to(device)
                others = own if each.teacher is None else (each.teacher[piece] - needed.start).to(device)
                yield own, each.weight * each.kernel(logits, own, teacher, others, piece)

    def _teacher_rows(self, piece: slice) -> slice:
        """Return the teacher's rows between the first and the last that some rows of the student meet."""
        asked = [each for each in self.comparisons if each.teacher is not None]
        rows = [each.teacher[_within(each.student, piece)] - each.reach for each in asked]  # type: ignore[index]
        rows += [each + most.reach for each, most in zip(rows, asked, strict=True)]
        met = torch.cat(rows)
        return slice(int(met.min()), int(met.max()) + 1) if len(met) else slice(0, 0)


def rows_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    weights: Tensor,
    target: Target,
    *,
    num_outcomes: int,
    teacher_outcomes: int,
    hard_weight: float,
    chunk_tokens: int | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``sum_n w_n [value_n + hard_weight * CE_n]`` with its graph, and metrics: see `distill.fused.fused_loss`.

    Args:
        hidden, head, labels, weights: of the student's N trained rows.
        num_outcomes, teacher_outcomes: ids of either side; logits beyond are padding.

    Raises:
        UserError: the student's head is narrower than its tokenizer.
    """
    width = vocabulary_width(head)
    check_width("student", width, num_outcomes)
    rows = chunk_tokens or max(1, CHUNK // (4 * max(width, teacher_outcomes)))
    return fused_loss(
        hidden,
        head,
        labels,
        weights,
        target,
        num_outcomes=num_outcomes,
        hard_weight=hard_weight,
        chunk_tokens=rows,
    )


def block_rows(device: torch.device, outcomes: int) -> int:
    """Return how many rows of so many logits are compared at once: as many as a processor's cache takes."""
    return max(1, (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK) // outcomes)


def _within(ascending: Tensor, piece: slice) -> slice:
    """Return where in ascending numbers those of a slice stand."""
    bounds = torch.tensor([piece.start, piece.stop], dtype=ascending.dtype)
    start, stop = torch.searchsorted(ascending, bounds).tolist()
    return slice(start, stop)
