"""What compares two rows of log-probabilities: pure functions over the last axis, in nats.

Each takes the student first, the teacher second, both ``(..., outcomes)`` and normalised, and returns ``(...,)``.
Outcomes of probability 0 (log-probability -inf) are legal on either side: they add exactly 0 wherever the mathematics
is finite, with finite gradients, and the value is +inf where it is not (`forward_kl` of a student that excludes what
the teacher allows). Nothing is smoothed or clamped.

These functions neither mask, average nor apply a temperature: a support makes the rows (`distill.supports`), a loss
mode weights and sums the values (`distill.losses`). To add one: write the function, add its line to `DIVERGENCES`; the
tests are parametrised over the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distill.errors import UserError

NEVER = float("-inf")


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(teacher || student): covers all that the teacher does. The usual soft-target loss (Hinton et al. 2015)."""
    return _kl(teacher_logp, student_logp)


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(student || teacher): avoids what the teacher never does (MiniLLM, arXiv 2306.08543)."""
    return _kl(student_logp, teacher_logp)


def jsd(student_logp: Tensor, teacher_logp: Tensor, *, weight: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon: w KL(t || m) + (1 - w) KL(s || m), m = w t + (1 - w) s (GKD, arXiv 2306.13649).

    It goes to 0 at both ends of `weight`, as the formula says; GKD's code replaces it there by a KL, this does not.

    Raises:
        UserError: `weight` is not strictly between 0 and 1.
    """
    if not 0 < weight < 1:
        raise UserError(
            f"jsd: weight must be strictly between 0 and 1, not {weight}; for a KL name forward_kl or reverse_kl"
        )
    mixture = _log_mixture(student_logp, teacher_logp, weight)
    return weight * _kl(teacher_logp, mixture) + (1 - weight) * _kl(student_logp, mixture)


def tvd(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Total variation: half the sum of absolute differences, in [0, 1] (f-DISTILL, arXiv 2307.15190)."""
    return 0.5 * (student_logp.exp() - teacher_logp.exp()).abs().sum(-1)


def skew_forward_kl(student_logp: Tensor, teacher_logp: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(t || a t + (1 - a) s): at most -log a, with bounded gradients (DistiLLM, arXiv 2402.03898, eq. 4)."""
    _check_skew("skew_forward_kl", alpha)
    return _kl(teacher_logp, _log_mixture(student_logp, teacher_logp, alpha))


def skew_reverse_kl(student_logp: Tensor, teacher_logp: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(s || (1 - a) t + a s): the skew reverse KL of DistiLLM (arXiv 2402.03898, section 3.1)."""
    _check_skew("skew_reverse_kl", alpha)
    return _kl(student_logp, _log_mixture(student_logp, teacher_logp, 1 - alpha))


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "tvd": tvd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
}


def entropy(logp: Tensor) -> Tensor:
    """Return the entropy in nats over the last axis, 0 log 0 = 0."""
    return -(logp.exp() * logp.masked_fill(logp == NEVER, 0.0)).sum(-1)


def _kl(p_logp: Tensor, q_logp: Tensor) -> Tensor:
    # Both arguments are replaced *before* the arithmetic: a mask on the result alone would leave 0 * inf = nan
    # in the backward pass.
    impossible = p_logp == NEVER
    p, q = p_logp.masked_fill(impossible, 0.0), q_logp.masked_fill(impossible, 0.0)
    return (p.exp().masked_fill(impossible, 0.0) * (p - q)).sum(-1)


def _log_mixture(student_logp: Tensor, teacher_logp: Tensor, teacher_share: float) -> Tensor:
    # logaddexp(-inf, -inf) has a nan gradient, so outcomes that neither side allows take no part.
    impossible = (student_logp == NEVER) & (teacher_logp == NEVER)
    student = student_logp.masked_fill(impossible, 0.0) + math.log1p(-teacher_share)
    teacher = teacher_logp.masked_fill(impossible, 0.0) + math.log(teacher_share)
    return torch.logaddexp(student, teacher).masked_fill(impossible, NEVER)


def _check_skew(name: str, alpha: float) -> None:
    if not 0 < alpha < 1:
        raise UserError(f"{name}: alpha must be strictly between 0 and 1, not {alpha}")
