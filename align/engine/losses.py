"""The loss modes that stand in for those of one vocabulary: `soft_logits`, `on_policy`, `features`, `relations`.

A method of rows goes through the fused loss with a target of its own (`align.engine.rows`); one of merged spans sees
the last row of each (`align.engine.merged`); one of states both models' hidden states and heads (all three:
`align.engine.row_losses`). One of spans sees two numbers for each, the log-probabilities that either model gives to its
text (`align.engine.span_losses`). Features and relations compare states at which both models have read the same text,
whatever the method (`distill.span_states`).

A mode's options are those of its method beside those named here: unknown ones are refused with the list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from align.engine.references import references
from align.engine.row_losses import merged, rows, states
from align.engine.span_losses import advantages, spans
from align.methods import Method, Pair
from distill.batch import Batch
from distill.errors import UserError
from distill.forward import Forward
from distill.losses import LOSSES, LossMode
from distill.losses.base import Inner, LossOutput
from distill.losses.on_policy import on_policy_inner
from distill.losses.relations import relations_inner
from distill.rollouts import Rollouts

Options = dict[str, Any]
ENGINES: dict[str, Callable[..., LossOutput]] = {
    "rows": rows,
    "merged": merged,
    "states": states,
    "spans": spans,
    "advantages": advantages,
}
# What a method is given where it asks for it, and no option of its own.
GIVEN = frozenset({"student_prior", "teacher_prior", "temperature", "chunk_tokens", "weak_logp", "initial_logp"})


def loss_modes(method: Method, pair: Pair) -> dict[str, LossMode]:
    """Return the modes of a method for a pair of tokenizers, under the names of those they stand in for."""
    loss = ENGINES[method.kind]
    modes = {"features": LOSSES["features"], "relations": _without_context(LOSSES["relations"])}
    for name in ("on_policy",) if method.kind == "advantages" else ("soft_logits", "on_policy"):
        # On the student's own completions the reverse KL is what the modes of one vocabulary minimise, too.
        defaults = {"divergence": "reverse_kl"} if name == "on_policy" else {}
        fn = _with_options(partial(loss, method, pair), loss, method, defaults)
        needs = LOSSES[name].needs | ({"teacher"} if method.kind == "states" else set())
        modes[name] = LossMode(fn, needs, inner=partial(_inner, method, pair))
    return modes


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
    accepted = {} if method.tables is None else _keywords(method.tables)
    if method.kind == "advantages":
        on_policy_inner(student_model, teacher_model, rollouts=rollouts, kind="policy_gradient")
        named = {name: value for name, value in options.items() if name == "weak_reference"}
        further = references(pair, student_model, teacher_model, **named)
        return Inner(plan=further, scorers=() if further is None else further.scorers)
    if method.tables is None:
        return Inner()
    known = {key: value for key, value in options.items() if key in accepted}
    if method.kind == "states":
        return Inner(modules=method.tables(student_model, teacher_model, **known))
    return Inner(plan=method.tables(pair, **known))


def _keywords(function: Callable[..., Any], *, given: bool = True) -> dict[str, inspect.Parameter]:
    """Return a function's keyword-only parameters; without those of `GIVEN` where not `given`."""
    parameters = inspect.signature(function).parameters.values()
    return {
        each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY and (given or each.name not in GIVEN)
    }


def _with_options(
    loss: Callable[..., LossOutput], like: Callable[..., LossOutput], method: Method, defaults: Mapping[str, Any]
) -> Callable[..., LossOutput]:
    """Return a mode whose keyword-only arguments are those of `like` and the method's options."""
    own = _keywords(method.compare, given=False)
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
