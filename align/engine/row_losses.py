"""Losses over rows of two vocabularies: the fused loss with comparisons, merged spans, and states through both heads.

Each is ``f(method, pair, options, student, teacher, batch, *, inner, named options) -> LossOutput``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from align.engine.merged import merged_loss
from align.engine.places import Places, places
from align.engine.rows import Running, Source, Stored, Target, block_rows, rows_loss
from align.engine.span_losses import aligned, teacher_labels
from align.methods.dskd import Rows
from align.methods.entry import Method, Pair
from distill.batch import Batch, Trained
from distill.errors import UserError
from distill.forward import Forward
from distill.fused import CHUNK, fused_loss
from distill.losses.base import Inner, LossOutput

Options = Mapping[str, Any]


def rows(
    method: Method,
    pair: Pair,
    options: Options,
    student: Forward,
    teacher: Forward | None,
    batch: Batch,
    *,
    inner: Inner,
    temperature: float = 1.0,
    hard_label_weight: float = 0.0,
    chunk_tokens: int | None = None,
) -> LossOutput:
    """Return ``sum w_t [sum of the comparisons of row t + hard_label_weight * CE_t]`` over the trained tokens.

    Metrics (sums): `divergence`; `cross_entropy` and `token_accuracy` when the hard labels take part; `aligned`, the
    share of the trained tokens that are in a span.
    """
    met, trained = places(batch, lengths=pair.lengths), batch.trained()
    outcomes, theirs = len(pair.student.view), len(pair.teacher.view)
    tables = inner.plan if inner.plan is None else inner.plan.to(student.hidden.device)
    target = Target(
        _source(pair, teacher, batch, met, temperature),
        method.compare(pair, tables, met, batch, **given(method, temperature=temperature), **options),
        trained.weights,
        temperature,
        block_rows(student.hidden.device, max(outcomes, theirs)),
    )
    total, metrics = rows_loss(
        student.hidden[:, :-1][trained.rows],
        student.head,
        trained.labels,
        trained.weights,
        target,
        num_outcomes=outcomes,
        teacher_outcomes=theirs,
        hard_weight=hard_label_weight,
        chunk_tokens=chunk_tokens,
    )
    return LossOutput(total, trained.weights.sum(), metrics | aligned(met, trained.weights))


def merged(
    method: Method,
    pair: Pair,
    options: Options,
    student: Forward,
    teacher: Forward | None,
    batch: Batch,
    *,
    inner: Inner,
    temperature: float = 1.0,
    hard_label_weight: float = 0.0,
    chunk_tokens: int | None = None,
) -> LossOutput:
    """Return ``sum w value`` over the spans' last rows, plus ``hard_label_weight`` times the cross-entropy.

    Metrics as in `_rows`.
    """
    met, trained = places(batch), batch.trained()
    tables = inner.plan.to(student.hidden.device)
    hidden = student.hidden[:, :-1][trained.rows]
    assert batch.other is not None

    def merge(logits: Tensor, rows: Any, student_prior: Tensor, teacher_prior: Tensor) -> Tensor:
        given = {"student_prior": student_prior, "teacher_prior": teacher_prior}
        return method.compare(logits, rows, tables, **given, **options)

    total = merged_loss(
        student,
        hidden,
        trained.labels,
        trained.weights,
        _source(pair, teacher, batch, met, temperature),
        teacher_labels(batch, met),
        None if batch.signal is None else batch.signal.realised,
        met,
        merge,
        num_outcomes=len(pair.student.view),
        temperature=temperature,
        tokens=chunk_tokens or max(1, CHUNK // (4 * max(len(pair.student.view), len(pair.teacher.view)))),
    )
    return _beside(total, hard_label_weight, student, hidden, trained, aligned(met, trained.weights))


def states(
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
    """Return ``sum w value`` over the rows where both sides have a boundary, w that of a span's first token.

    Metrics as in `rows`, and the method's own.
    """
    assert teacher is not None, "a method of states declares that it needs a teacher that runs"
    met, trained, device = places(batch), batch.trained(), student.hidden.device
    hidden = student.hidden[:, :-1][trained.rows]
    own, others = met.student.to(device), met.teacher.to(device)
    read = teacher.hidden[met.teacher_rows.to(device), met.teacher_positions.to(device) - 1].detach()
    total, metrics = method.compare(
        Rows(hidden[own], student.head, trained.labels[own], len(pair.student.view)),
        Rows(read[others], teacher.head, teacher_labels(batch, met)[others], len(pair.teacher.view)),
        trained.weights[own],
        inner.modules,
        chunk_tokens=chunk_tokens,
        **options,
    )
    total = total + student.hidden.flatten()[:1].sum().float() * 0.0  # the graph of a batch without spans
    known = aligned(met, trained.weights) | metrics
    return _beside(total, hard_label_weight, student, hidden, trained, known)


def given(method: Method, **known: Any) -> dict[str, Any]:
    """Return what the engine knows and a method's function asks for."""
    asked = inspect.signature(method.compare).parameters
    return {name: value for name, value in known.items() if name in asked}


def _beside(
    total: Tensor, weight: float, student: Forward, hidden: Tensor, trained: Trained, metrics: dict[str, Tensor]
) -> LossOutput:
    """Return a method's total with the hard labels beside it."""
    metrics = {"divergence": total.detach()} | metrics
    if weight:
        hard, numbers = fused_loss(hidden, student.head, trained.labels, trained.weights, None, hard_weight=weight)
        total, metrics = total + hard, metrics | numbers
    return LossOutput(total, trained.weights.sum(), metrics)


def _source(pair: Pair, teacher: Forward | None, batch: Batch, met: Places, temperature: float) -> Source:
    outcomes = len(pair.teacher.view)
    if teacher is not None:
        device = teacher.hidden.device
        rows = teacher.hidden[met.teacher_rows.to(device), met.teacher_positions.to(device) - 1]
        return Running(rows, teacher.head, num_outcomes=outcomes, temperature=temperature)
    assert batch.signal is not None, "the mode declares that it needs a teacher or its signal"
    if temperature != 1.0:
        raise UserError("a stored signal is at temperature 1: take temperature 1, or let the teacher run")
    return Stored(batch.signal, num_outcomes=outcomes, came=teacher_labels(batch, met))
