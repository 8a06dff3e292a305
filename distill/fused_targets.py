"""What a fused loss does with a block of rows: two models' logits to numbers per row and a gradient, in their memory.

Every function takes logits that it may overwrite and leaves the gradient by the student's logits in the student's
place. Nothing here projects, weights or sums rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.divergences import DIVERGENCES, NEVER, entropy
from distill.fused_heads import Projection
from distill.head import Head
from distill.slopes import logit_gradient
from distill.supports import Outcomes, filled
from distill.tables import bind, lookup
from distill.taid import interpolated_target

OVERLAP_OUTCOMES = 8


class Target(Protocol):
    """What the student's rows are compared with, a chunk and then a block at a time, from the last row to the first.

    Attributes:
        reach: how many rows before its own a block is compared with, 0 or 1. What these owe to it, the target adds to
            their gradient when their own block comes. Every row's gradient is multiplied by its own weight afterwards.
    """

    @property
    def reach(self) -> int:
        """See the class."""

    def load(self, piece: slice) -> None:
        """Make ready what is compared with a chunk of the N rows."""

    def compare(
        self, student: Tensor, first: int, rows: slice, picked: slice, before: Tensor | None
    ) -> dict[str, Tensor]:
        """Compare a block of logits (n, V), and leave the gradient of `divergence` in their place: see `Running`.

        Args:
            before: (reach, V) logits of the rows before; None if there are none.
        """


@dataclass(frozen=True, slots=True)
class Comparison:
    """A divergence and its temperatures.

    Attributes:
        divergence, options: see `distill.slopes.logit_gradient`.
        student_temperature, teacher_temperature: divide the logits.
        share: TAID's; None compares with the teacher itself.
    """

    divergence: str
    options: Mapping[str, Any]
    student_temperature: float
    teacher_temperature: float
    share: float | None

    def dense(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Compare ``(n, V)`` logits over whole vocabularies; return numbers (n,) by name."""
        _divide(student, self.student_temperature)
        _divide(teacher, self.teacher_temperature)
        if self.share is not None:
            teacher = interpolated_target(student, teacher, share=self.share)
        value, _, own, teachers = logit_gradient(self.divergence, student, teacher, options=self.options)
        return {"divergence": value, "student_entropy": own, "teacher_entropy": teachers}

    def coarse(self, student: Tensor, outcomes: Outcomes) -> dict[str, Tensor]:
        """Compare ``(n, V)`` student's logits with masses on K outcomes and the rest; return numbers (n,) by name.

        The student's logits become K + 1, `distill.supports.coarsen`; autograd runs over those only, and the gradient
        by the last one is spread over the rest in proportion to its probabilities.
        """
        _divide(student, self.student_temperature)
        compare = bind(
            lookup(DIVERGENCES, self.divergence, "divergence"), self.options, f"divergence {self.divergence!r}"
        )
        places, empty = filled(outcomes.ids), outcomes.ids < 0
        named = student.gather(-1, places).masked_fill_(empty, NEVER)
        lowest = torch.finfo(student.dtype).min
        rest = student.scatter_(-1, places, lowest)  # finite, so that its product with a probability of 0 is 0
        top = rest.amax(-1, keepdim=True)
        shares = torch.sub(rest, top).exp_()
        mass = shares.sum(-1, keepdim=True)
        nothing = top == lowest  # the K outcomes are all there are
        last = (top + mass.log()).masked_fill_(nothing, NEVER)
        with torch.enable_grad():
            logits = torch.cat([named, last], -1).requires_grad_()
            logp = logits.log_softmax(-1)
            value = compare(logp, outcomes.logp.to(logp.dtype))
            (gradient,) = torch.autograd.grad(value.sum(), logits)
        # The whole row's entropy is the logarithm of its normaliser less the mean logit.
        p = logp.detach().exp()
        mean_rest = (torch.linalg.vecdot(shares, rest)[:, None] / mass).masked_fill_(nothing, 0.0)
        mean = (p * torch.cat([named.masked_fill(p[:, :-1] == 0, 0.0), mean_rest], -1)).sum(-1)
        numbers = {"divergence": value.detach(), "student_entropy": logits.detach().logsumexp(-1) - mean}
        if outcomes.offset is not None:
            numbers["divergence"] = numbers["divergence"] + outcomes.offset
        if outcomes.entropy is not None:
            numbers["teacher_entropy"] = outcomes.entropy
        torch.mul(shares, (gradient[:, -1:] / mass).masked_fill_(nothing, 0.0), out=student)
        # Empty places hold the first outcome's id, and add 0 to it.
        student.scatter_(-1, places, 0.0).scatter_add_(-1, places, gradient[:, :-1].masked_fill(empty, 0.0))
        return numbers


class Running:
    """A teacher that runs: its logits are made a chunk at a time, beside the student's.

    Args:
        buffer: (chunk, V) for a chunk's logits, on the teacher's device.
        top_k: compare the K most likely outcomes and the tail; None compares whole rows.
    """

    reach = 0

    def __init__(
        self, comparison: Comparison, teacher: Projection, head: Head, buffer: Tensor, top_k: int | None
    ) -> None:
        self.comparison, self.teacher, self.head, self.buffer, self.top_k = comparison, teacher, head, buffer, top_k

    def load(self, piece: slice) -> None:
        """Project the rows of a chunk."""
        self.teacher.project(piece, self.buffer[: piece.stop - piece.start])

    def compare(
        self, student: Tensor, first: int, rows: slice, picked: slice, before: Tensor | None
    ) -> dict[str, Tensor]:
        """Compare a block: see `Comparison`; also by name, (n,) each, what agrees.

        Args:
            student: (n, V) logits, overwritten with the gradient.
            first: the block's first row in the chunk.
            rows: its place in all rows.
            picked: which of its rows have their likeliest outcomes compared; 0 stands in the others' places.
        """
        teacher = self.head.transform_(self.buffer[first : first + len(student)]).to(student.device)
        best = teacher[picked].topk(min(OVERLAP_OUTCOMES, teacher.shape[-1]), dim=-1).indices
        numbers = _agreement(student, teacher.argmax(-1), best, picked)
        if self.top_k is None:
            return numbers | self.comparison.dense(student, teacher)
        _divide(teacher, self.comparison.teacher_temperature)
        return numbers | self.comparison.coarse(student, most_likely(teacher, self.top_k))


class Stored:
    """What a teacher said once: masses on K outcomes of each row.

    Args:
        outcomes: of all N rows.
        ranked: whether a row's outcomes are the teacher's most likely, in order.
    """

    reach = 0

    def __init__(self, comparison: Comparison, outcomes: Outcomes, *, ranked: bool) -> None:
        self.comparison, self.outcomes, self.ranked = comparison, outcomes, ranked

    def load(self, piece: slice) -> None:
        """There is nothing to project."""

    def compare(
        self, student: Tensor, first: int, rows: slice, picked: slice, before: Tensor | None
    ) -> dict[str, Tensor]:
        """Compare a block: see `Running.compare`."""
        outcomes = self.outcomes.rows(rows)
        numbers = {}
        if self.ranked:
            enough = outcomes.ids.shape[-1] >= OVERLAP_OUTCOMES
            best = outcomes.ids[picked, :OVERLAP_OUTCOMES] if enough else None
            numbers = _agreement(student, outcomes.ids[:, 0], best, picked)
        return numbers | self.comparison.coarse(student, outcomes)


def most_likely(teacher: Tensor, size: int) -> Outcomes:
    """Return the `size` most likely of ``(n, V)`` logits with the tail; OVERWRITES them."""
    best, ids = teacher.topk(min(size, teacher.shape[-1]), dim=-1)
    rest = teacher.scatter_(-1, ids, NEVER).logsumexp(-1, keepdim=True)
    logp = torch.cat([best, rest], -1).log_softmax(-1)
    return Outcomes(ids, logp, entropy=entropy(logp))


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the probabilities ``(n, V)``, and -log p(label) and whether no token is likelier, (n,) by name."""
    p = logits.softmax(-1)
    best, own = logits.amax(-1), logits.gather(-1, labels[:, None])[:, 0]
    # The largest probability is at least 1 / V, so its logarithm is exact; the label's own may be 0.
    return p, {"cross_entropy": best - own - p.amax(-1).log(), "token_accuracy": (own == best).to(p.dtype)}


def cap_slope(logits: Tensor, softcap: float) -> Tensor:
    """Return d softcap(x) / dx, ``(n, V)``, from the capped logits."""
    return logits.div(softcap).square_().neg_().add_(1.0)


def _agreement(student: Tensor, best_id: Tensor, best: Tensor | None, picked: slice) -> dict[str, Tensor]:
    top = student.gather(-1, best_id[:, None])[:, 0] == student.amax(-1)
    numbers = {"top1_agreement": top.to(student.dtype)}
    if best is not None:
        own = student[picked].topk(best.shape[-1], dim=-1).indices
        overlap = student.new_zeros(len(student))
        overlap[picked] = (own[:, :, None] == best[:, None]).any(1).to(student.dtype).mean(-1)
        numbers["top_k_overlap"] = overlap
    return numbers


def _divide(logits: Tensor, temperature: float) -> None:
    if temperature != 1.0:
        logits.div_(temperature)
