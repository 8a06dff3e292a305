"""Every divergence with its derivative by the student in closed form: training without an autograd graph over (N, V).

A *slope* is dD / d student_logp, each log-probability a variable of its own. Since a row of logits moves all of them,
dD / d student_logits = slope - softmax(student) * sum(slope): `logit_gradient` goes the whole way from two models'
logits to that, in their own memory. `SLOPES` is what a support with its own log-probabilities needs.

Memory traffic and fresh pages are the cost here more than arithmetic: one exponential per logit makes the
probabilities, whatever is no longer needed is overwritten, and rows go through in blocks small enough for a processor's
cache. Outcomes of probability 0 mean what they mean in `distill.divergences`. To add a divergence, write its function
and its line in `_SLOPES`; the tests hold it against autograd. Nothing here scales, masks or averages positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.divergences import DIVERGENCES, NEVER, check_powers, check_share, entropy, gap_shares
from distill.tables import bind, lookup

# Numbers in one block of rows: the five buffers of a block stay in a processor's cache, or keep a GPU busy.
CPU_BLOCK, GPU_BLOCK = 2**20, 2**25


class _Rows(NamedTuple):
    """One model's rows; a slope may overwrite all but the student's `p`.

    `logp` is 0, not -inf, where an outcome has probability 0, so that products with `p` are 0 there and not nan.
    """

    p: Tensor  # (..., outcomes)
    logp: Tensor  # (..., outcomes)
    impossible: Tensor | None  # (..., outcomes) bool; None where every outcome is possible


@torch.no_grad()
def logit_gradient(
    name: str, student_logits: Tensor, teacher_logits: Tensor, *, options: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a divergence, its gradient by the student's logits, and both entropies; OVERWRITES both arguments.

    Args:
        name: a name of `DIVERGENCES`, or ``pkg.mod:function``, which is differentiated by autograd.
        student_logits: ``(N, V)`` float32 or float64, already divided by the temperature; -inf excludes an outcome.
        teacher_logits: ``(N, V)``, over the same outcomes.
        options: the divergence's keyword-only arguments.

    Returns:
        value ``(N,)``; gradient of its sum ``(N, V)``, in the memory of `student_logits`; the student's and the
        teacher's entropy, ``(N,)`` each. All in nats.

    Raises:
        UserError: unknown divergence or option, or a value it does not take.
    """
    assert student_logits.shape == teacher_logits.shape
    assert student_logits.dtype == teacher_logits.dtype
    # The user's own function is not in the table; it is looked up as a divergence.
    function = _SLOPES[name] if name in _SLOPES else lookup(DIVERGENCES, name, "divergence")
    bound = bind(function, options or {}, f"divergence {name!r}")
    block = partial(_closed_form if name in _SLOPES else _by_autograd, bound)
    rows = max(1, (CPU_BLOCK if student_logits.device.type == "cpu" else GPU_BLOCK) // student_logits.shape[-1])
    per_row = student_logits.new_empty(3, len(student_logits))
    for student, teacher, numbers in zip(
        student_logits.split(rows), teacher_logits.split(rows), per_row.split(rows, dim=1), strict=True
    ):
        block(student, teacher, numbers)
    value, student_entropy, teacher_entropy = per_row
    return value, student_logits, student_entropy, teacher_entropy


def _closed_form(slope_of: Callable[..., Any], student_logits: Tensor, teacher_logits: Tensor, numbers: Tensor) -> None:
    student, teacher = _from_logits(student_logits), _from_logits(teacher_logits)
    torch.stack([_dot(student.p, student.logp).neg_(), _dot(teacher.p, teacher.logp).neg_()], out=numbers[1:])
    numbers[0], slope = slope_of(student, teacher)
    torch.addcmul(slope, student.p, slope.sum(-1, keepdim=True), value=-1, out=student_logits)


def _by_autograd(
    compare: Callable[..., Tensor], student_logits: Tensor, teacher_logits: Tensor, numbers: Tensor
) -> None:
    with torch.enable_grad():
        student = student_logits.detach().requires_grad_()
        student_logp, teacher_logp = student.log_softmax(-1), teacher_logits.log_softmax(-1)
        value = compare(student_logp, teacher_logp)
        (gradient,) = torch.autograd.grad(value.sum(), student)
    torch.stack([value, entropy(student_logp), entropy(teacher_logp)], out=numbers)
    student_logits.copy_(gradient)


def _from_logits(logits: Tensor) -> _Rows:
    # Cheaper than log_softmax and exp, and more exact: over 150k outcomes both of torch's softmaxes add float32 numbers
    # to ever larger ones and end up 5e-6 away from 1, where `sum` adds in pairs.
    p = logits.softmax(-1)
    p.div_(p.sum(-1, keepdim=True))
    impossible = _impossible(logits)
    # The likeliest outcome tells the normaliser. Its logit is taken off first: the sum of both would lose the digits of
    # a log-probability near 0.
    logits.sub_(logits.amax(-1, keepdim=True)).add_(p.amax(-1, keepdim=True).log_())
    return _Rows(p, _fill(logits, impossible, 0.0), impossible)


def _from_logp(slope: Callable[..., Any], student_logp: Tensor, teacher_logp: Tensor, **options: Any) -> Any:
    masks = _impossible(student_logp), _impossible(teacher_logp)
    student, teacher = (
        _Rows(logp.exp(), _fill(logp, mask, 0.0), mask)
        for logp, mask in zip((student_logp, teacher_logp), masks, strict=True)
    )
    return slope(student, teacher, **options)


def _forward_kl(student: _Rows, teacher: _Rows) -> tuple[Tensor, Tensor]:
    value, _ = _kl(teacher, student)
    return value, teacher.p.neg_()


def _reverse_kl(student: _Rows, teacher: _Rows) -> tuple[Tensor, Tensor]:
    value, gap = _kl(student, teacher)
    return value, gap.add_(1).mul_(student.p)


def _jsd(student: _Rows, teacher: _Rows, *, weight: float = 0.5) -> tuple[Tensor, Tensor]:
    check_share("jsd", "weight", weight)
    log_mixture = _mixture(student, teacher, weight).log_()
    to_teacher = _dot(teacher.p, teacher.logp.sub_(log_mixture))
    gap = student.logp.sub_(log_mixture)
    to_student = _dot(student.p, gap)
    return weight * to_teacher + (1 - weight) * to_student, gap.mul_(student.p).mul_(1 - weight)


def _tvd(student: _Rows, teacher: _Rows) -> tuple[Tensor, Tensor]:
    gap = torch.sub(student.p, teacher.p, out=teacher.p)
    value = gap.abs().sum(-1).mul_(0.5)
    return value, gap.sign_().mul_(student.p).mul_(0.5)


def _skew_forward_kl(student: _Rows, teacher: _Rows, *, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    check_share("skew_forward_kl", "alpha", alpha)
    mixture = _mixture(student, teacher, alpha)
    value = _dot(teacher.p, teacher.logp.sub_(mixture.log()))
    return value, teacher.p.div_(mixture).mul_(student.p).mul_(alpha - 1)


def _skew_reverse_kl(student: _Rows, teacher: _Rows, *, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    check_share("skew_reverse_kl", "alpha", alpha)
    mixture = _mixture(student, teacher, 1 - alpha)
    gap = student.logp.sub_(mixture.log())
    value = _dot(student.p, gap)
    return value, gap.add_(teacher.p.div_(mixture), alpha=1 - alpha).mul_(student.p)


def _alpha_beta(student: _Rows, teacher: _Rows, *, alpha: float = 0.2, beta: float = 0.7) -> tuple[Tensor, Tensor]:
    check_powers(alpha, beta)
    total = alpha + beta
    power = _fill(student.logp.mul(beta).exp_(), student.impossible, 0.0)
    difference = _fill(student.logp.mul_(alpha).exp_(), student.impossible, 0.0)
    own = _dot(power, difference) / (alpha * total)
    teacher_power = _fill(torch.mul(teacher.logp, alpha, out=teacher.p).exp_(), teacher.impossible, 0.0)
    cross = _dot(power, teacher_power) / (alpha * beta)
    slope = difference.sub_(teacher_power).mul_(power).mul_(1 / alpha)
    teachers = _fill(teacher.logp.mul_(total).exp_(), teacher.impossible, 0.0).sum(-1) / (beta * total)
    return teachers + own - cross, slope


def _adaptive_kl(student: _Rows, teacher: _Rows, *, head_mass: float = 0.5) -> tuple[Tensor, Tensor]:
    check_share("adaptive_kl", "head_mass", head_mass)
    head, tail = gap_shares(student.p, teacher.p, head_mass=head_mass)
    forward, _ = _kl(teacher._replace(logp=teacher.logp.clone()), student)
    reverse, gap = _kl(student, teacher)
    value = (head * forward).masked_fill_(head == 0, 0.0) + (tail * reverse).masked_fill_(tail == 0, 0.0)
    slope = gap.add_(1).mul_(student.p).mul_(tail.unsqueeze(-1))
    return value, slope.sub_(teacher.p.mul_(head.unsqueeze(-1)))


_SLOPES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "tvd": _tvd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "alpha_beta": _alpha_beta,
    "adaptive_kl": _adaptive_kl,
}

# name -> f(student_logp, teacher_logp, *, the divergence's options) -> (value (...,), slope (..., outcomes)), which may
# overwrite both arguments. To be called without gradients.
SLOPES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    name: partial(_from_logp, slope) for name, slope in _SLOPES.items()
}


def _impossible(logp: Tensor) -> Tensor | None:
    # On a CPU a look at the minimum is far cheaper than a mask; on a GPU it would make the host wait.
    if logp.device.type == "cpu" and logp.numel() and logp.amin() > NEVER:
        return None
    return logp == NEVER


def _fill(tensor: Tensor, where: Tensor | None, value: float) -> Tensor:
    return tensor if where is None else tensor.masked_fill_(where, value)


def _kl(p: _Rows, q: _Rows) -> tuple[Tensor, Tensor]:
    # KL(p || q) and log p - log q, in the memory of log p: inf where q excludes what p allows.
    gap = p.logp.sub_(q.logp)
    value = _dot(p.p, gap)
    if q.impossible is None:
        return value, gap
    infinite = q.impossible if p.impossible is None else q.impossible & ~p.impossible
    return value.masked_fill_(infinite.any(-1), math.inf), gap.masked_fill_(infinite, math.inf)


def _mixture(student: _Rows, teacher: _Rows, teacher_share: float) -> Tensor:
    # The smallest normal number instead of 0: both sides' p is 0 there, and multiplies the logarithm or the quotient.
    return torch.lerp(student.p, teacher.p, teacher_share).clamp_(min=torch.finfo(student.p.dtype).tiny)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)
