"""What makes two models' outputs comparable: a pair of log-probability rows over the same outcomes.

A support takes the student's logits first and what is known of the teacher second, and returns
``(student_logp, teacher_logp)``, both ``(..., outcomes)``, float32 or wider, so that any function of
`distill.divergences` applies.

`dense`
    The whole vocabulary.
`top_k_with_tail`
    K + 1 outcomes: the K that the teacher finds most likely, each with its own probability, and *all others together*
    with the rest of both models' mass. Merging outcomes never increases an f-divergence, so the value is at most the
    dense one, and it grows towards it with K. This is not the renormalised top-K (both models' K probabilities scaled
    to sum to one, which says nothing about the mass outside and can exceed the dense value), nor the truncated sum.
`sampled`
    The outcomes that N draws from the teacher hit, with their shares of the draws (random sampling knowledge
    distillation, arXiv 2503.16870). The student keeps its whole distribution: what was not drawn is one more outcome,
    of teacher mass 0. Linear in the teacher, the gradient of `forward_kl` is then that of `dense` in expectation.
`sampled_target_corrected`
    The same outcomes, each with the weight t / (1 - (1 - t)^N): its probability over the chance that N draws hit it
    (Horvitz & Thompson 1952). Unbiased as well, and exact for outcomes that are all but sure to be drawn.

Upcasting happens here, once. Nothing here weights or averages positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distill.batch import TeacherRows
from distill.divergences import NEVER, entropy
from distill.errors import UserError

# The least mass of "all others" where it is what stored log-probabilities leave of 1: half of the 16-bit numbers'
# rounding (about 1e-4 in the sum), below which it is not known, and might be negative.
TAIL_FLOOR = 2.0**-14


class Outcomes(NamedTuple):
    """A teacher's masses on K outcomes and on all others together.

    Attributes:
        ids: (N, K) int64, filled from the left with one at least; -1 in empty places.
        logp: (N, K + 1) log-masses, all others last; -inf in empty places. They sum to one, but for
            `sampled_target_corrected`, where they do so in expectation.
        offset: (N,) nats that make ``forward_kl(student, logp) + offset`` an unbiased estimate of the dense value; None
            where the value is not an estimate, or where the draws' probabilities are not known and it cannot be one.
        entropy: (N,) nats, what is known of the teacher's entropy: for `top_k_with_tail` the K + 1 outcomes' own, a
            lower bound; for draws of known probability an unbiased estimate; None otherwise.
    """

    ids: Tensor
    logp: Tensor
    offset: Tensor | None = None
    entropy: Tensor | None = None

    def rows(self, piece: slice) -> Outcomes:
        """Return some of the N rows."""
        known = {name: part[piece] for name, part in self._asdict().items() if part is not None}
        return Outcomes(**known)


def dense(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    num_outcomes: int,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return both models' log-probabilities over the first `num_outcomes` entries of a shared vocabulary.

    Models of one family pad the same vocabulary to different widths (Qwen2.5: 151936 and 152064 logits for 151665
    tokens). Entries from `num_outcomes` on are padding: they are dropped *before* the softmax, so no probability is
    spent on them and the widths may differ.

    Args:
        student_logits: ``(..., V_student)``.
        teacher_logits: ``(..., V_teacher)``, the same leading shape.
        num_outcomes: entries that mean a token, normally ``len(tokenizer)``.
        student_temperature: divides the student's logits; likewise `teacher_temperature`. No T² factor is applied.

    Raises:
        UserError: a model has fewer logits than `num_outcomes`.
    """
    for who, logits in (("student", student_logits), ("teacher", teacher_logits)):
        check_width(who, logits.shape[-1], num_outcomes)
    return (
        _log_softmax(student_logits[..., :num_outcomes], student_temperature),
        _log_softmax(teacher_logits[..., :num_outcomes], teacher_temperature),
    )


def top_k_with_tail(student_logits: Tensor, teacher: TeacherRows, *, num_outcomes: int) -> tuple[Tensor, Tensor]:
    """Return ``(N, K + 1)`` log-probabilities of the teacher's K most likely outcomes, and of all others together.

    Args:
        student_logits: ``(N, V)``, temperature 1: the teacher's rest is known at no other.
        teacher: with `ids` and `logprobs`, and `tail` if that is known better than as what they leave of 1. There
            the rest is at least `TAIL_FLOOR`, unless the K outcomes are all there are.
        num_outcomes: see `dense`.

    Raises:
        UserError: the student has fewer logits than `num_outcomes`; the signal is one of draws without probabilities.
    """
    check_width("student", student_logits.shape[-1], num_outcomes)
    outcomes = top_k_outcomes(teacher, num_outcomes=num_outcomes)
    return _student(student_logits, outcomes, num_outcomes), outcomes.logp


def sampled(student_logits: Tensor, teacher: TeacherRows, *, num_outcomes: int) -> tuple[Tensor, Tensor]:
    """Return ``(N, K + 1)`` log-probabilities of drawn outcomes, the teacher's being their shares of the draws.

    `forward_kl` of the two has an unbiased gradient. Its *value* is too high, by the KL from the shares to the teacher
    in expectation; `Outcomes.offset` removes that where the draws' probabilities are known.

    Args:
        student_logits: ``(N, V)``, temperature 1.
        teacher: with `ids` and `counts`.
        num_outcomes: see `dense`.

    Raises:
        UserError: the student has fewer logits than `num_outcomes`; the signal is not one of draws.
    """
    check_width("student", student_logits.shape[-1], num_outcomes)
    outcomes = sampled_outcomes(teacher, num_outcomes=num_outcomes)
    return _student(student_logits, outcomes, num_outcomes), outcomes.logp


def sampled_target_corrected(
    student_logits: Tensor, teacher: TeacherRows, *, num_outcomes: int
) -> tuple[Tensor, Tensor]:
    """Return ``(N, K + 1)`` log-masses of drawn outcomes, the teacher's being Horvitz-Thompson weights.

    The weights sum to one in expectation only, so the value of `forward_kl` may be negative; with `Outcomes.offset` it
    is an unbiased estimate, sum of w (log t - log s), as the gradient is without it.

    Args:
        student_logits: ``(N, V)``, temperature 1.
        teacher: with `ids`, `counts` and `logprobs`.
        num_outcomes: see `dense`.

    Raises:
        UserError: the student has fewer logits than `num_outcomes`; the signal is not one of draws, or their
            probabilities were not stored.
    """
    check_width("student", student_logits.shape[-1], num_outcomes)
    outcomes = corrected_outcomes(teacher, num_outcomes=num_outcomes)
    return _student(student_logits, outcomes, num_outcomes), outcomes.logp


def top_k_outcomes(teacher: TeacherRows, *, num_outcomes: int) -> Outcomes:
    """Return the masses that `top_k_with_tail` compares with."""
    if teacher.logprobs is None or teacher.counts is not None:
        raise UserError("the signal holds random draws and not the most likely outcomes: take sampled")
    logprobs, tail = teacher.logprobs, teacher.tail
    if tail is None:
        tail = (1 - logprobs.exp().sum(-1)).clamp(min=TAIL_FLOOR).log()
    # Where every token is listed there are no others: what is left of 1 is the rounding of the stored numbers.
    everything = (teacher.ids >= 0).sum(-1) >= num_outcomes
    logp = torch.cat([logprobs, tail.masked_fill(everything, NEVER)[:, None]], -1).log_softmax(-1)
    return Outcomes(teacher.ids, logp, entropy=entropy(logp))


def sampled_outcomes(teacher: TeacherRows, *, num_outcomes: int) -> Outcomes:
    """Return the masses that `sampled` compares with; `num_outcomes` is not looked at."""
    counts = _counts(teacher)
    log_shares = (counts / counts.sum(-1, keepdim=True)).log()
    return _drawn(teacher.ids, log_shares, teacher.logprobs)


def corrected_outcomes(teacher: TeacherRows, *, num_outcomes: int) -> Outcomes:
    """Return the masses that `sampled_target_corrected` compares with; `num_outcomes` is not looked at."""
    counts = _counts(teacher)
    if teacher.logprobs is None:
        raise UserError("sampled_target_corrected needs the draws' log-probabilities, and only counts were stored")
    logprobs = teacher.logprobs.clamp(max=0.0)  # 16-bit storage may say a little more than certain
    missed = counts.sum(-1, keepdim=True) * torch.log1p(-logprobs.exp())
    log_weights = (logprobs - (-torch.expm1(missed)).log()).masked_fill(teacher.ids < 0, NEVER)
    return _drawn(teacher.ids, log_weights, logprobs)


# name of a support that a stored signal can have -> what the teacher's side of it is made with
STORED: dict[str, Callable[..., Outcomes]] = {
    "top_k_with_tail": top_k_outcomes,
    "sampled": sampled_outcomes,
    "sampled_target_corrected": corrected_outcomes,
}

# those of random draws: only `forward_kl`, linear in the teacher's masses, has an unbiased gradient over them
DRAWS = frozenset({"sampled", "sampled_target_corrected"})


def stored_support(teacher: TeacherRows) -> str:
    """Return the name of the best support for what a signal holds: draws are corrected where that is possible."""
    if teacher.counts is None:
        return "top_k_with_tail"
    return "sampled" if teacher.logprobs is None else "sampled_target_corrected"


def coarsen(logits: Tensor, ids: Tensor) -> Tensor:
    """Return ``(N, K + 1)`` logits: those of the outcomes `ids`, and the logsumexp of all others, as one outcome.

    Their softmax is the distribution over the K + 1 outcomes, with no difference of near numbers anywhere: the rest is
    summed up, not subtracted from 1.

    Args:
        logits: ``(N, V)``.
        ids: ``(N, K)``, see `Outcomes`.
    """
    places = filled(ids)
    rest = logits.scatter(-1, places, NEVER).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, places).masked_fill(ids < 0, NEVER), rest], -1)


def filled(ids: Tensor) -> Tensor:
    """Return `ids` with each row's first outcome in its empty places, so that they can be gathered and scattered."""
    return torch.where(ids < 0, ids[:, :1], ids)


def check_width(who: str, width: int, num_outcomes: int) -> None:
    """Refuse a model with fewer logits than the vocabulary has tokens.

    Raises:
        UserError: it has.
    """
    if width < num_outcomes:
        raise UserError(
            f"the {who} has {width} logits for a vocabulary of {num_outcomes} tokens: resize its embeddings"
        )


def _student(logits: Tensor, outcomes: Outcomes, num_outcomes: int) -> Tensor:
    wide = logits[..., :num_outcomes].to(torch.promote_types(logits.dtype, torch.float32))
    return coarsen(wide, outcomes.ids).log_softmax(-1)


def _counts(teacher: TeacherRows) -> Tensor:
    if teacher.counts is None:
        raise UserError("the signal holds the most likely outcomes and no random draws: take top_k_with_tail")
    return teacher.counts.to(torch.float32 if teacher.logprobs is None else teacher.logprobs.dtype)


def _drawn(ids: Tensor, log_weights: Tensor, logprobs: Tensor | None) -> Outcomes:
    logp = torch.cat([log_weights, log_weights.new_full((len(ids), 1), NEVER)], -1)
    if logprobs is None:
        return Outcomes(ids, logp)
    empty = ids < 0
    weights, known = log_weights.exp(), logprobs.masked_fill(empty, 0.0)
    own = known - log_weights.masked_fill(empty, 0.0)
    return Outcomes(ids, logp, offset=(weights * own).sum(-1), entropy=-(weights * known).sum(-1))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide if temperature == 1.0 else wide / temperature, dim=-1)
