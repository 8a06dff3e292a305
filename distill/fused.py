"""lm_head x loss by chunks of rows, with the gradients made in the same pass: (tokens, vocabulary) never exists.

The plain way holds both models' logits of every token, their log-softmax, and as much again for the backward pass. Here
some hundred rows at a time are projected into one buffer per model; the loss overwrites it with its gradient by the
logits, and that is multiplied back to the hidden states and the head at once. A dense loss is then four products
(student, teacher, hidden states, weight) and one exponential per logit; peak memory beyond the gradients themselves is
those buffers, whatever the number of tokens. Hard labels ride along on the same logits.

The gradients exist when the forward pass returns, scaled by 1; the backward pass multiplies them by what it is given,
once, and hands them over. So there is no second backward pass through the same graph and no double backward. Without
gradients enabled only the logits are made.

Which rows are trained is decided by the caller, who gives no others; weights are multiplied here, nothing is divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.batch import TeacherRows
from distill.errors import UserError
from distill.fused_heads import Projection, projection, vocabulary_width
from distill.fused_targets import Comparison, Running, Stored, Target, cap_slope, cross_entropy
from distill.head import Head
from distill.supports import DRAWS, STORED, check_width, stored_support
from distill.tables import suggest

# One model's logits of a chunk, in bytes: products are slower on fewer rows, and hardly faster on more.
CHUNK = 2**27
# Numbers in a block of a chunk: what is done to logits between the products stays in a processor's cache.
CPU_BLOCK, GPU_BLOCK = 2**20, 2**23
OVERLAP_ROWS = 64  # rows per call whose likeliest outcomes are compared: finding them costs more than the loss


class TeacherHidden(NamedTuple):
    """A running teacher: its hidden states (N, D') at the trained rows, and its head. Any device, width and padding."""

    rows: Tensor
    head: Head


def fused_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    weights: Tensor,
    target: TeacherHidden | TeacherRows | Target | None,
    *,
    num_outcomes: int | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    divergence: str = "forward_kl",
    divergence_options: Mapping[str, Any] | None = None,
    support: str = "auto",
    top_k: int | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    share: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``sum_n w_n [soft_weight * D(student_n, teacher_n) + hard_weight * CE_n]`` with its graph, and metrics.

    Metrics are weighted sums, detached: `divergence`; `student_entropy` of the whole distribution, at the temperature
    compared; `teacher_entropy` and `top1_agreement` (to the student nothing is likelier than what the teacher finds
    likeliest) where they are known; with `hard_weight` also `cross_entropy` and `token_accuracy`. And `top_k_overlap`,
    a sum and the weight it belongs to, over `OVERLAP_ROWS` rows at even distances: the share of the teacher's 8
    likeliest outcomes that are among the student's 8.

    Args:
        hidden: (N, D) the student's hidden states at the trained rows; N may be 0, which gives 0 with its graph.
        head: the student's head, tied or not, with LoRA or not. One that is not known to be matrices is called.
        labels: (N,) int64; read with `hard_weight` only.
        weights: (N,) of each row.
        target: what the student is compared with; None leaves the hard labels alone. A `Target` of one's own brings
            its comparison along: of the options below it takes `num_outcomes`, `soft_weight` and `hard_weight`.
        num_outcomes: tokens of the shared vocabulary: logits beyond are padding, to the soft part. The hard labels'
            softmax goes over the student's full width, as the model's own loss does. None: the full width is shared.
        soft_weight, hard_weight: of the two parts. No T² factor is applied here.
        divergence, divergence_options: a name of `DIVERGENCES`, or ``pkg.mod:function``, and its arguments.
        support: a name of `distill.supports`; "auto" is "dense" for a running teacher, else the best one for what the
            signal holds.
        top_k: K, for a running teacher with "top_k_with_tail".
        student_temperature, teacher_temperature: divide the logits inside the divergence. Signals are at 1.
        share: TAID, see `distill.taid.interpolated_target`; None compares with the teacher itself.
        chunk_tokens: rows projected at once; None chooses by bytes.

    Raises:
        UserError: a model narrower than `num_outcomes`; an unknown divergence, support or option; a combination
            without meaning: a signal at another temperature, draws with another divergence than `forward_kl`, TAID
            on anything but "dense", a support that the target cannot give.
    """
    assert hard_weight if target is None else soft_weight, "a loss of nothing"
    width = vocabulary_width(head)
    outcomes = width if num_outcomes is None else num_outcomes
    check_width("student", width, outcomes)
    student = projection(head, hidden, trained=torch.is_grad_enabled())
    wide = torch.promote_types(hidden.dtype, torch.float32)
    job = _Job(head, student, labels, weights.to(wide), hard_weight, width if hard_weight else outcomes)
    job.chunk = chunk_tokens or max(1, CHUNK // (job.columns * wide.itemsize))
    if target is not None and not isinstance(target, TeacherHidden | TeacherRows):
        job.target, job.outcomes, job.soft, job.slope = target, outcomes, soft_weight, soft_weight
    elif target is not None:
        comparison = Comparison(divergence, divergence_options or {}, student_temperature, teacher_temperature, share)
        support = _support(target, support, top_k, comparison)
        job.soft, job.slope = soft_weight, soft_weight / student_temperature
        if isinstance(target, TeacherHidden):
            check_width("teacher", vocabulary_width(target.head), outcomes)
            buffer = torch.empty(min(job.chunk, len(hidden)), outcomes, dtype=wide, device=target.rows.device)
            teacher = projection(target.head, target.rows.detach(), trained=False)
            job.target = Running(comparison, teacher, target.head, buffer, top_k)
        else:
            masses = STORED[support](target, num_outcomes=outcomes)
            job.target = Stored(comparison, masses, ranked=support not in DRAWS)
        job.outcomes = outcomes
    return _Fused.apply(job, *student.inputs), job.metrics


class _Fused(torch.autograd.Function):
    """Runs a job, whose gradients are then there, and hands them over in the backward pass."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *inputs: Tensor) -> Tensor:
        with torch.autocast(job.student.device.type, enabled=False):  # the products' types are chosen already
            total = job.run()
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.gradients, job.student.gradients = job.student.gradients, []
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("a fused loss goes backward once: its gradients were handed over; compute it again")
        # Nothing else may refer to a gradient that is returned: autograd then keeps it, and makes no copy.
        for place, dtype in enumerate(ctx.dtypes):
            if gradients[place] is not None:
                gradients[place] = gradients[place].mul_(by_total).to(dtype)
        return None, *gradients


@dataclass(slots=True)
class _Job:
    """One call's work over N rows, chunk by chunk. `slope` is the soft part's weight by the student's logits."""

    head: Head
    student: Projection
    labels: Tensor
    weights: Tensor
    hard: float
    columns: int
    chunk: int = 1
    target: Target | None = None
    outcomes: int = 0
    soft: float = 0.0
    slope: float = 0.0
    numbers: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def run(self) -> Tensor:
        """Return the total (), leave the metrics here and the gradients with the student."""
        count, reach = len(self.weights), 0 if self.target is None else self.target.reach
        logits = self.weights.new_empty(min(self.chunk, count) + reach, self.columns)
        block = max(1, (CPU_BLOCK if logits.device.type == "cpu" else GPU_BLOCK) // self.columns)
        # Constants of a row are multiplied to its hidden state's side of the products, not to its logits.
        factor = self.weights * (self.slope or self.hard) * self.head.scale
        trains = any(gradient is not None for gradient in self.student.gradients)
        # From the last row to the first, so that what a row owes to the one behind it is known when its turn comes. Of
        # no rows once, for the metrics' names.
        for start in reversed(range(0, max(1, count), self.chunk)):
            stop, lead = min(start + self.chunk, count), min(start, reach)
            whole = logits[: stop - start + lead]
            self.student.project(slice(start - lead, stop), whole)
            chunk = whole[lead:]
            if self.target is not None:
                self.target.load(slice(start, stop))
            for first in reversed(range(0, max(1, len(chunk)), block)):
                before = whole[first + lead - reach : first + lead] if reach and start + first else None
                self._block(chunk[first : first + block], first, start + first, before)
            if trains:  # the leading row's turn is yet to come: nothing of it is pulled back here
                whole[:lead] = 0.0
                self.student.pull_back(slice(start - lead, stop), whole, factor[start - lead : stop])
        return self._sums()

    def _block(self, logits: Tensor, first: int, start: int, before: Tensor | None) -> None:
        # `first` is the block's first row in the chunk, `start` in all rows. Leaves the gradient by the head's products
        # in `logits`, but for the factor of the row.
        rows = slice(start, start + len(logits))
        numbers: dict[str, Tensor] = {}
        self.head.transform_(logits)
        capped = None if self.head.softcap is None else logits.clone()
        if self.hard:
            p, numbers = cross_entropy(logits, self.labels[rows])
        if self.target is not None:
            picked = slice(-start % self._distance, None, self._distance)
            if before is not None:
                before = self.head.transform_(before.clone())[:, : self.outcomes]
            numbers |= self.target.compare(logits[:, : self.outcomes], first, rows, picked, before)
        if self.hard:
            unit = self.hard / self.slope if self.target is not None else 1.0
            logits[:, self.outcomes :] = 0.0
            logits.add_(p, alpha=unit)
            logits.scatter_add_(-1, self.labels[rows, None], logits.new_full((len(logits), 1), -unit))
        if capped is not None and self.head.softcap is not None:
            logits.mul_(cap_slope(capped, self.head.softcap))
        for name, values in numbers.items():
            if name not in self.numbers:
                self.numbers[name] = self.weights.new_zeros(len(self.weights))
            self.numbers[name][rows] = values

    @property
    def _distance(self) -> int:
        return max(1, -(-len(self.weights) // OVERLAP_ROWS))

    def _sums(self) -> Tensor:
        self.metrics = {name: self.weights @ values for name, values in self.numbers.items()}
        if "top_k_overlap" in self.metrics:
            compared = self.weights[:: self._distance].sum()
            self.metrics["top_k_overlap"] = torch.stack([self.metrics["top_k_overlap"], compared])
        parts = [(self.soft, "divergence"), (self.hard, "cross_entropy")]
        return torch.stack([weight * self.metrics[name] for weight, name in parts if name in self.metrics]).sum()


def _support(target: TeacherHidden | TeacherRows, name: str, top_k: int | None, comparison: Comparison) -> str:
    """Return the name of the support; refuse what has no meaning with it."""
    running = isinstance(target, TeacherHidden)
    if name == "auto":
        name = "dense" if isinstance(target, TeacherHidden) else stored_support(target)
    allowed = ("dense", "top_k_with_tail") if running else tuple(STORED)
    if name not in allowed:
        what = "a running teacher" if running else "a stored signal"
        raise UserError(f"no support {name!r} with {what}: there are {', '.join(allowed)}{suggest(name, allowed)}")
    if (top_k is not None) != (running and name == "top_k_with_tail") or (top_k is not None and top_k < 1):
        raise UserError(
            f"top_k={top_k} with the support {name!r}: it is the number of outcomes, 1 or more, that top_k_with_tail "
            "keeps of a running teacher; a stored signal has its own"
        )
    if not running and (comparison.student_temperature, comparison.teacher_temperature) != (1.0, 1.0):
        raise UserError(
            "a stored signal is at temperature 1: what it does not hold has another mass at another temperature, which "
            "is not known; take temperature 1, or let the teacher run"
        )
    if name in DRAWS and comparison.divergence != "forward_kl":
        raise UserError(
            f"{comparison.divergence!r} with the support {name!r}: only forward_kl is linear in the teacher's "
            "probabilities, so that random draws give its gradient without bias; store the top-K for others"
        )
    if comparison.share is not None and name != "dense":
        raise UserError(f"TAID mixes whole rows of logits: it needs a running teacher and 'dense', not {name!r}")
    return name
