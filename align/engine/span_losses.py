"""Losses over spans as numbers: what either model says of the text of a span, and of nothing else.

Each is ``f(method, pair, options, student, teacher, batch, *, inner, named options) -> LossOutput``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.engine.places import Places, places
from align.engine.realised import realised
from align.engine.references import References
from align.kernels.chain import span_sums
from align.methods.entry import Method, Pair
from align.methods.opd_scalar import surrogate
from distill.batch import Batch
from distill.errors import UserError
from distill.forward import Forward
from distill.losses.base import Inner, LossOutput

Options = Mapping[str, Any]


def spans(
    method: Method,
    pair: Pair,
    options: Options,
    student: Forward,
    teacher: Forward | None,
    batch: Batch,
    *,
    inner: Inner,
    hard_label_weight: float = 0.0,
    chunk_tokens: int | None = None,
) -> LossOutput:
    """Return ``sum over spans of w value``, w that of a span's first token, plus the cross-entropy's share.

    Metrics (sums): `divergence`; `cross_entropy` when the hard labels take part; `aligned`.
    """
    read = _read(pair, student, teacher, batch, chunk_tokens)
    weights = read.weights[read.met.student.to(read.weights.device)]
    soft = (weights * method.compare(read.student, read.teacher, **options)).sum()
    metrics = {"divergence": soft.detach()} | aligned(read.met, read.weights)
    total = soft + read.anchor
    if hard_label_weight:
        hard = -(read.weights * read.of_all).sum()
        total, metrics = total + hard_label_weight * hard, metrics | {"cross_entropy": hard.detach()}
    return LossOutput(total, read.weights.sum(), metrics)


def advantages(
    method: Method,
    pair: Pair,
    options: Options,
    student: Forward,
    teacher: Forward | None,
    batch: Batch,
    *,
    inner: Inner,
    weak_reference: str | None = None,
    chunk_tokens: int | None = None,
) -> LossOutput:
    """Return a sum whose gradient is the policy gradient of the method's advantages.

    `weak_reference` names a model (`align.engine.references`), which `inner` has loaded.

    Metrics (sums): `reverse_kl`, what the student's own text is likelier to it than to the teacher, in nats; `aligned`;
    `limited`, the share of tokens whose advantage was clamped, and `left_out`, that of spans too long to be judged.
    """
    read = _read(pair, student, teacher, batch, chunk_tokens)
    with torch.no_grad():
        beside = _beside(inner.plan, pair, batch, read)
        found = method.compare(read.student, read.teacher, read.tokens, read.span, **beside, **options)
        first = read.weights[read.met.student.to(read.weights.device)]
        estimate = (first * (read.student - read.teacher)).sum()
        # What was clamped, and what was too long to be judged, as shares of tokens and of spans.
        limited = torch.stack([found.limited, found.limited.new_tensor(len(read.tokens))]).to(estimate.dtype)
        left_out = torch.stack([found.left_out, found.left_out.new_tensor(len(read.student))]).to(estimate.dtype)
    total = surrogate(read.tokens, found.values, read.weights[read.own]) + read.anchor
    metrics = {"reverse_kl": estimate, "limited": limited, "left_out": left_out}
    return LossOutput(total, read.weights.sum(), metrics | aligned(read.met, read.weights))


def _beside(further: References | None, pair: Pair, batch: Batch, read: _Read) -> dict[str, Tensor]:
    """Return what the further models say of each span (S,), by name."""
    if further is None:
        return {}
    sizes = len(pair.student.view), len(pair.teacher.view)
    first, weak = further.read(batch, read.met, teacher_labels(batch, read.met), sizes)
    count = len(read.student)
    return {
        "initial_logp": span_sums(first[read.own], read.span, count),
        "weak_logp": span_sums(weak, read.met.span.to(weak.device), count),
    }


class _Read(NamedTuple):
    """What both models say of the text of S spans: n tokens of the student's, in nats.

    `own` (n,) are their places among the N trained ones, `span` (n,) the span of each; `of_all` (N,) the
    log-probabilities of all trained tokens among all logits; `anchor` a zero that hangs on the student.
    """

    met: Places
    weights: Tensor
    student: Tensor
    teacher: Tensor
    tokens: Tensor
    own: Tensor
    span: Tensor
    of_all: Tensor
    anchor: Tensor


def _read(pair: Pair, student: Forward, teacher: Forward | None, batch: Batch, chunk_tokens: int | None) -> _Read:
    met, trained, device = places(batch), batch.trained(), student.hidden.device
    count = len(met.student)
    said = realised(
        student.hidden[:, :-1][trained.rows],
        student.head,
        trained.labels,
        who="student",
        num_outcomes=len(pair.student.view),
        chunk_tokens=chunk_tokens,
    )
    own = (met.student_span >= 0).nonzero()[:, 0].to(device)
    span = met.student_span.to(device)[own]
    tokens = said.logp[own]
    if teacher is None:
        assert batch.signal is not None
        if batch.signal.realised is None:
            raise UserError("the signal does not hold the log-probabilities of the tokens that came: score it anew")
        theirs = batch.signal.realised
    else:
        with torch.no_grad():
            theirs = realised(
                teacher.hidden[met.teacher_rows.to(device), met.teacher_positions.to(device) - 1],
                teacher.head,
                teacher_labels(batch, met),
                who="teacher",
                num_outcomes=len(pair.teacher.view),
                chunk_tokens=chunk_tokens,
            ).logp
    teacher_sums = span_sums(theirs, met.span.to(device), count)
    student_sums = span_sums(tokens, span, count)
    anchor = student.hidden.flatten()[:1].sum().float() * 0.0
    return _Read(met, trained.weights, student_sums, teacher_sums, tokens, own, span, said.of_all, anchor)


def teacher_labels(batch: Batch, met: Places) -> Tensor:
    """Return (M,) int64, the tokens that the teacher's rows were followed by."""
    assert batch.other is not None
    device = batch.other.input_ids.device
    return batch.other.input_ids[met.teacher_rows.to(device), met.teacher_positions.to(device)]


def aligned(met: Places, weights: Tensor) -> dict[str, Tensor]:
    """Return the share of the trained tokens that are in a span, as a metric."""
    inside = (met.student_span >= 0).to(weights.device)
    return {"aligned": torch.stack([weights[inside].sum(), weights.sum()])}
