"""What compares two rows of log-probabilities: pure functions over the last axis, in nats.

Each takes the student first, the teacher second, both ``(..., outcomes)`` and normalised, and returns ``(...,)``.
Outcomes of probability 0 (log-probability -inf) are legal on either side: they add exactly 0 wherever the mathematics
is finite, with finite gradients, and the value is +inf where it is not (`forward_kl` of a student that excludes what
the teacher allows). Nothing is smoothed or clamped.

These functions neither mask, average nor apply a temperature: a support makes the rows (`distill.supports`), a loss
mode weights and sums the values (`distill.losses`). To add one: write the function, add its line to `DIVERGENCES`, its
slope to `distill.slopes`, and its name to `COARSENING` if merging outcomes can never increase it; the tests are
parametrised over the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distill.errors import UserError

NEVER = float("-inf")
HEAD = 256  # outcomes among which `adaptive_kl` looks for the teacher's head before it sorts them all


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
    check_share("jsd", "weight", weight)
    mixture = _log_mixture(student_logp, teacher_logp, weight)
    return weight * _kl(teacher_logp, mixture) + (1 - weight) * _kl(student_logp, mixture)


def tvd(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Total variation: half the sum of absolute differences, in [0, 1] (f-DISTILL, arXiv 2307.15190)."""
    return 0.5 * (student_logp.exp() - teacher_logp.exp()).abs().sum(-1)


def skew_forward_kl(student_logp: Tensor, teacher_logp: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(t || a t + (1 - a) s): at most -log a, with bounded gradients (DistiLLM, arXiv 2402.03898, eq. 4)."""
    check_share("skew_forward_kl", "alpha", alpha)
    return _kl(teacher_logp, _log_mixture(student_logp, teacher_logp, alpha))


def skew_reverse_kl(student_logp: Tensor, teacher_logp: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(s || (1 - a) t + a s): the skew reverse KL of DistiLLM (arXiv 2402.03898, section 3.1)."""
    check_share("skew_reverse_kl", "alpha", alpha)
    return _kl(student_logp, _log_mixture(student_logp, teacher_logp, 1 - alpha))


def alpha_beta(student_logp: Tensor, teacher_logp: Tensor, *, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """Alpha-beta divergence: powers of both sides (ABKD, arXiv 2505.04560; Cichocki et al. 2011).

    D = sum_i [t^(a+b) / (b (a+b)) + s^(a+b) / (a (a+b)) - t^a s^b / (a b)], alpha the teacher's power and beta the
    student's. It tends to `forward_kl` as (alpha, beta) goes to (1, 0) and to `reverse_kl` as it goes to (0, 1); at
    (1/2, 1/2) it is 4 (1 - sum sqrt(s t)), four times the squared Hellinger distance, and at (1, 1) half the squared
    Euclidean distance. The defaults lie between the two KLs.

    Raises:
        UserError: alpha or beta is not positive. The formula divides by alpha, beta and their sum, and with a negative
            power every outcome of probability 0 makes it infinite.
    """
    check_powers(alpha, beta)
    total = alpha + beta
    teacher = (total * teacher_logp).exp() / (beta * total)
    student = (total * student_logp).exp() / (alpha * total)
    return (teacher + student - (alpha * teacher_logp + beta * student_logp).exp() / (alpha * beta)).sum(-1)


def adaptive_kl(student_logp: Tensor, teacher_logp: Tensor, *, head_mass: float = 0.5) -> Tensor:
    """AKL: forward KL for the gap in the teacher's head, reverse KL for the gap in its tail (arXiv 2404.02657).

    The head is the teacher's likeliest outcomes (of equal ones any) up to a mass of `head_mass`, at least one; the
    gap of a part is its sum of absolute differences of probability; each KL is weighted by its part's share of the gap.
    As in the authors' code, the outcome that crosses `head_mass` is in the tail, and the shares are constants to the
    gradient. Where there is no gap both KLs are 0, and so are the value and its gradient.

    Raises:
        UserError: `head_mass` is not strictly between 0 and 1.
    """
    check_share("adaptive_kl", "head_mass", head_mass)
    head, tail = gap_shares(student_logp.detach().exp(), teacher_logp.detach().exp(), head_mass=head_mass)
    # A share of 0 drops its KL, even one that is infinite.
    return (head * forward_kl(student_logp, teacher_logp)).masked_fill(head == 0, 0.0) + (
        tail * reverse_kl(student_logp, teacher_logp)
    ).masked_fill(tail == 0, 0.0)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "tvd": tvd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "alpha_beta": alpha_beta,
    "adaptive_kl": adaptive_kl,
}

# Merging outcomes never increases these f-divergences (data processing), so their value over the K most likely outcomes
# and one tail is a lower bound of the one over the whole vocabulary. For the others it can lie on either side: for
# `adaptive_kl`, and for `alpha_beta` with alpha + beta above 1.
COARSENING = frozenset({"forward_kl", "reverse_kl", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl"})


def check_share(name: str, option: str, value: float) -> None:
    """Refuse a value of a divergence's option that is not strictly between 0 and 1."""
    if not 0 < value < 1:
        raise UserError(
            f"{name}: {option} must be strictly between 0 and 1, not {value}; for a KL name forward_kl or reverse_kl"
        )


def check_powers(alpha: float, beta: float) -> None:
    """Refuse powers that `alpha_beta` cannot take."""
    for option, value in (("alpha", alpha), ("beta", beta)):
        if not 0 < value < math.inf:
            raise UserError(
                f"alpha_beta: {option} must be positive, not {value}; for a KL name forward_kl or reverse_kl"
            )


def entropy(logp: Tensor) -> Tensor:
    """Return the entropy in nats over the last axis, 0 log 0 = 0."""
    return -(logp.exp() * logp.masked_fill(logp == NEVER, 0.0)).sum(-1)


def gap_shares(student: Tensor, teacher: Tensor, *, head_mass: float) -> tuple[Tensor, Tensor]:
    """Return the shares of the gap in the teacher's head and in its tail: see `adaptive_kl`.

    Args:
        student: ``(..., outcomes)`` probabilities, not their logarithms; likewise `teacher`.

    Returns:
        Both ``(...,)``, adding up to 1, or both 0 where there is no gap.
    """
    gap = (student - teacher).abs_()
    # Sorting a vocabulary costs more than all the rest together, and nearly every head is among the likeliest few.
    for size in (min(HEAD, teacher.shape[-1]), teacher.shape[-1]):
        likeliest, order = teacher.topk(size, dim=-1)
        mass = likeliest.cumsum(-1)
        if (mass[..., -1] > head_mass).all():
            break
    in_tail = mass > head_mass
    in_tail[..., 0] = False
    likeliest_gap = gap.gather(-1, order)
    head = likeliest_gap.masked_fill(in_tail, 0.0).sum(-1)
    tail = gap.scatter_(-1, order, likeliest_gap.masked_fill_(~in_tail, 0.0)).sum(-1)
    total = head + tail
    total.masked_fill_(total == 0, 1.0)
    return head / total, tail / total


def _kl(p_logp: Tensor, q_logp: Tensor) -> Tensor:
    # Both arguments are replaced *before* the arithmetic: a mask on the result alone would leave 0 * inf = nan
    # in the backward pass.
    impossible = p_logp == NEVER
    p, q = p_logp.masked_fill(impossible, 0.0), q_logp.masked_fill(impossible, 0.0)
    gap = p - q
    # Where p is too small for the dtype, exp(p) is 0, and 0 * inf = nan would hide that q excludes what p allows.
    return (p.exp().masked_fill(impossible, 0.0) * gap).masked_fill(gap == math.inf, math.inf).sum(-1)


def _log_mixture(student_logp: Tensor, teacher_logp: Tensor, teacher_share: float) -> Tensor:
    # logaddexp(-inf, -inf) has a nan gradient, so outcomes that neither side allows take no part.
    impossible = (student_logp == NEVER) & (teacher_logp == NEVER)
    student = student_logp.masked_fill(impossible, 0.0) + math.log1p(-teacher_share)
    teacher = teacher_logp.masked_fill(impossible, 0.0) + math.log(teacher_share)
    return torch.logaddexp(student, teacher).masked_fill(impossible, NEVER)
