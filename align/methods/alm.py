"""ALM: the likelihoods of aligned chunks of text, compared as the chances of a coin (arXiv 2503.20083, section 3).

A chunk's likelihood is one number on each side, whatever its tokens: p = exp(sum of the realised tokens' log-probs). As
"this chunk or anything else" it is a distribution over two outcomes that both models speak of, and is compared as one.
A temperature tau takes p^(1 / tau) instead: the chunks' log-likelihoods are many nats apart, and at tau = 100 what is
minimised is close to a squared difference of them.

It needs no more of a teacher than the log-probabilities of the realised tokens, and says no more: one scalar a chunk.

The published default, `binary_ce`, is a cross-entropy: at equality its gradient is 0 and its value is the entropy of
the teacher's coin, which is not 0. `binary_kl` is that less the entropy, with the same gradient. Both differ from a
divergence of exact likelihoods by `margin`, which the published code takes off both sides' logarithms (1e-6): a student
that is certain of a chunk would otherwise have an infinite loss and slope where its teacher is not.

A model says of a chunk that it ends *in a token boundary*, which is another event for two tokenizers. Debiasing
multiplies each side's likelihood by its chance that a new word begins behind the chunk (`boundary_logp`), and joins
chunks at whose ends the teacher thinks that unlikely (`joined_spans`).

Not here: the paper's hidden-state loss and GradMag weights, and its other functions of the two likelihoods.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from align.byte_view import ByteView
from align.kernels.pooling import log1mexp
from distill.divergences import NEVER
from distill.errors import UserError

DIVERGENCES = ("binary_ce", "binary_kl")


def alm(
    student_logp: Tensor,
    teacher_logp: Tensor,
    *,
    divergence: str = "binary_ce",
    tau: float = 100.0,
    margin: float = 1e-6,
    student_boundary: Tensor | None = None,
    teacher_boundary: Tensor | None = None,
) -> Tensor:
    """Return ``(S,)`` losses in nats, which differentiate by the student's likelihoods only.

    A chunk that the student excludes and the teacher allows costs +inf, as any KL of it would.

    Args:
        student_logp, teacher_logp: (S,) log-likelihoods of the chunks: `align.kernels.chain.span_sums`.
        divergence: a name of `DIVERGENCES`.
        tau: divides the log-likelihoods.
        margin: nats taken off both after that.
        student_boundary, teacher_boundary: (S,) `boundary_logp` behind each chunk, both or neither.

    Raises:
        UserError: an unknown divergence, a tau or margin that is not positive, one side's boundary without the other's.
    """
    if divergence not in DIVERGENCES:
        raise UserError(f"alm: unknown divergence {divergence!r}: known are {', '.join(DIVERGENCES)}")
    if not (0 < tau < math.inf and 0 < margin < math.inf):
        raise UserError(f"alm: tau and margin must be positive, not {tau} and {margin}")
    if (student_boundary is None) != (teacher_boundary is None):
        raise UserError("alm: give the boundaries of both sides, or of neither")
    wide = torch.promote_types(student_logp.dtype, torch.float32)
    student, teacher = student_logp.to(wide), teacher_logp.detach().to(wide)
    if student_boundary is not None and teacher_boundary is not None:
        student, teacher = student + student_boundary, teacher + teacher_boundary.detach()
    student, teacher = student / tau - margin, teacher / tau - margin
    loss = _cross_entropy(student, teacher)
    return loss if divergence == "binary_ce" else loss - _cross_entropy(teacher, teacher)


def boundary_logp(next_logp: Tensor, begins: Tensor) -> Tensor:
    """Return ``(S,)`` log-chances that a new word begins behind each chunk.

    Args:
        next_logp: (S, V) one side's rows behind the chunks' last tokens.
        begins: (V,) bool, `begins_word`.
    """
    return next_logp[:, : len(begins)].masked_fill(~begins, NEVER).logsumexp(-1)


def begins_word(view: ByteView, *, stops: Collection[int] = ()) -> Tensor:
    """Return ``(V,)`` bool: tokens whose first byte is white space, and those that end the text.

    Raises:
        UserError: there are none.
    """
    begins = [bool(token) and token[:1].isspace() for token in view.tokens]  # type: ignore[index]
    for token in stops:
        begins[token] = True
    if not any(begins):
        raise UserError("alm: no token of this vocabulary begins with white space, so nothing says where a word ends")
    return torch.tensor(begins)


def joined_spans(boundary: Tensor, sequence: Tensor, *, least: float = 0.1) -> Tensor:
    """Return ``(S,)`` int64 the new number of each chunk, when those with an unlikely end are joined with the next.

    Args:
        boundary: (S,) the teacher's `boundary_logp` behind each chunk.
        sequence: (S,) int64 the text each chunk belongs to; two texts are never joined.
        least: the chance from which an end is one.
    """
    first = torch.ones_like(sequence, dtype=torch.bool)
    first[1:] = (boundary[:-1] >= math.log(least)) | (sequence[1:] != sequence[:-1])
    return first.cumsum(0) - 1


def _cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Return (S,) -[t log s + (1 - t) log(1 - s)] of two coins given by their logarithms below 0; 0 log 0 = 0."""
    impossible = teacher == NEVER
    heads = teacher.exp() * student.masked_fill(impossible, 0.0)
    return -(heads - torch.expm1(teacher) * log1mexp(student))
