"""The loss modes that stand in for those of one vocabulary: `soft_logits`, `on_policy`, `features`, `relations`.

A method of rows goes through the fused loss with a target of its own (`align.rows`); one of merged spans sees the last
row of each (`align.merged`); one of spans two numbers for each, the log-probabilities that either model gives to its
text (`align.realised`). Features and relations compare states at which both models have read the same text, whatever
the method (`distill.span_states`).

A mode's options are those of its method beside those named here: unknown ones are refused with the list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.chain import span_sums
from align.merged import merged_loss
from align.methods import Method, Pair
from align.methods.opd_scalar import surrogate
from align.places import Places, places
from align.realised import realised
from align.rows import Running, Source, Stored, Target, block_rows, rows_loss
from distill.batch import Batch
from distill.errors import UserError
from distill.forward import Forward
from distill.fused import CHUNK, fused_loss
from distill.losses import LOSSES, LossMode
from distill.losses.base import Inner, LossOutput
from distill.losses.on_policy import on_policy_inner
from distill.losses.relations import relations_inner
from distill.rollouts import Rollouts

Options = dict[str, Any]


def loss_modes(method: Method, pair: Pair) -> dict[str, LossMode]:
    """Return the modes of a method for a pair of tokenizers, under the names of those they stand in for."""
    loss = {"rows": _rows, "merged": _merged, "spans": _spans, "advantages": _advantages}[method.kind]
    modes = {"features": LOSSES["features"], "relations": _without_context(LOSSES["relations"])}
    for name in ("on_policy",) if method.kind == "advantages" else ("soft_logits", "on_policy"):
        # On the student's own completions the reverse KL is what the modes of one vocabulary minimise, too.
        defaults = {"divergence": "reverse_kl"} if name == "on_policy" else {}
        fn = _with_options(partial(loss, method, pair), loss, method, defaults)
        modes[name] = LossMode(fn, LOSSES[name].needs, inner=partial(_inner, method, pair))
    return modes


def _rows(
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
        method.compare(pair, tables, met, batch, **options),
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
    return LossOutput(total, trained.weights.sum(), metrics | _aligned(met, trained.weights))


def _merged(
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
        _teacher_labels(batch, met),
        None if batch.signal is None else batch.signal.realised,
        met,
        merge,
        num_outcomes=len(pair.student.view),
        temperature=temperature,
        tokens=chunk_tokens or max(1, CHUNK // (4 * max(len(pair.student.view), len(pair.teacher.view)))),
    )
    metrics = {"divergence": total.detach()} | _aligned(met, trained.weights)
    if hard_label_weight:
        hard, numbers = fused_loss(
            hidden, student.head, trained.labels, trained.weights, None, hard_weight=hard_label_weight
        )
        total, metrics = total + hard, metrics | numbers
    return LossOutput(total, trained.weights.sum(), metrics)


def _spans(
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
    metrics = {"divergence": soft.detach()} | _aligned(read.met, read.weights)
    total = soft + read.anchor
    if hard_label_weight:
        hard = -(read.weights * read.of_all).sum()
        total, metrics = total + hard_label_weight * hard, metrics | {"cross_entropy": hard.detach()}
    return LossOutput(total, read.weights.sum(), metrics)


def _advantages(
    method: Method,
    pair: Pair,
    options: Options,
    student: Forward,
    teacher: Forward | None,
    batch: Batch,
    *,
    inner: Inner,
    chunk_tokens: int | None = None,
) -> LossOutput:
    """Return a sum whose gradient is the policy gradient of the method's advantages.

    Metrics (sums): `reverse_kl`, what the student's own text is likelier to it than to the teacher, in nats; `aligned`;
    `limited`, the share of tokens whose advantage was clamped, and `left_out`, that of spans too long to be judged.
    """
    read = _read(pair, student, teacher, batch, chunk_tokens)
    with torch.no_grad():
        found = method.compare(read.student, read.teacher, read.tokens, read.span, **options)
        first = read.weights[read.met.student.to(read.weights.device)]
        estimate = (first * (read.student - read.teacher)).sum()
        # What was clamped, and what was too long to be judged, as shares of tokens and of spans.
        limited = torch.stack([found.limited, found.limited.new_tensor(len(read.tokens))]).to(estimate.dtype)
        left_out = torch.stack([found.left_out, found.left_out.new_tensor(len(read.student))]).to(estimate.dtype)
    total = surrogate(read.tokens, found.values, read.weights[read.own]) + read.anchor
    metrics = {"reverse_kl": estimate, "limited": limited, "left_out": left_out}
    return LossOutput(total, read.weights.sum(), metrics | _aligned(read.met, read.weights))


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
                _teacher_labels(batch, met),
                who="teacher",
                num_outcomes=len(pair.teacher.view),
                chunk_tokens=chunk_tokens,
            ).logp
    teacher_sums = span_sums(theirs, met.span.to(device), count)
    student_sums = span_sums(tokens, span, count)
    anchor = student.hidden.flatten()[:1].sum().float() * 0.0
    return _Read(met, trained.weights, student_sums, teacher_sums, tokens, own, span, said.of_all, anchor)


def _source(pair: Pair, teacher: Forward | None, batch: Batch, met: Places, temperature: float) -> Source:
    outcomes = len(pair.teacher.view)
    if teacher is not None:
        device = teacher.hidden.device
        rows = teacher.hidden[met.teacher_rows.to(device), met.teacher_positions.to(device) - 1]
        return Running(rows, teacher.head, num_outcomes=outcomes, temperature=temperature)
    assert batch.signal is not None, "the mode declares that it needs a teacher or its signal"
    if temperature != 1.0:
        raise UserError("a stored signal is at temperature 1: take temperature 1, or let the teacher run")
    return Stored(batch.signal, num_outcomes=outcomes)


def _teacher_labels(batch: Batch, met: Places) -> Tensor:
    assert batch.other is not None
    device = batch.other.input_ids.device
    return batch.other.input_ids[met.teacher_rows.to(device), met.teacher_positions.to(device)]


def _aligned(met: Places, weights: Tensor) -> dict[str, Tensor]:
    inside = (met.student_span >= 0).to(weights.device)
    return {"aligned": torch.stack([weights[inside].sum(), weights.sum()])}


def _without_context(mode: LossMode) -> LossMode:
    """Return relations without those to a prompt, whose tokens are not aligned."""

    def inner(student_model: Any, teacher_model: Any, **options: Any) -> Inner:
        made = relations_inner(student_model, teacher_model, **options)
        needing = [name for name, relation in made.plan.kinds.items() if relation.context]
        if needing:
            raise UserError(f"relations: {needing[0]} compares with the prompt, which two tokenizers do not share")
        return made

    return LossMode(mode.fn, mode.needs, mode.reads_head, inner)


def _inner(
    method: Method,
    pair: Pair,
    student_model: Any,
    teacher_model: Any,
    *,
    rollouts: Rollouts | None = None,
    **options: Any,
) -> Inner:
    if method.kind == "advantages":
        return on_policy_inner(student_model, teacher_model, rollouts=rollouts, kind="policy_gradient")
    if method.tables is None:
        return Inner()
    accepted = _keywords(method.tables)
    return Inner(plan=method.tables(pair, **{key: value for key, value in options.items() if key in accepted}))


ENGINES = frozenset({"student_prior", "teacher_prior"})  # what a method is given, and no option of its own


def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY and each.name not in ENGINES}


def _with_options(
    loss: Callable[..., LossOutput], like: Callable[..., LossOutput], method: Method, defaults: Mapping[str, Any]
) -> Callable[..., LossOutput]:
    """Return a mode whose keyword-only arguments are those of `like` and the method's options."""
    own = _keywords(method.compare)
    own |= {name: each.replace(default=defaults[name]) for name, each in own.items() if name in defaults}
    of_tables = {} if method.tables is None else _keywords(method.tables)
    changed = {name: each.default for name, each in own.items() if name in defaults}

    def mode(student: Forward, teacher: Forward | None, batch: Batch, **given: Any) -> LossOutput:
        options = changed | {name: value for name, value in given.items() if name in own}
        rest = {name: value for name, value in given.items() if name not in own and name not in of_tables}
        return loss(options, student, teacher, batch, **rest)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    positional = [inspect.Parameter(name, kind) for name in ("student", "teacher", "batch")]
    named = _keywords(like) | own | of_tables
    mode.__signature__ = inspect.Signature([*positional, *named.values()])  # type: ignore[attr-defined]
    mode.__doc__ = like.__doc__
    return mode
