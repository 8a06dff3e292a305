"""Any weighted sum of loss modes as one loss: `soft_logits=1.0,hard_labels=0.1,features=0.5`.

Every mode sees the same forward passes, and what it asks of them is collected here. Its value is summed over trained
tokens, so weights mean the same whatever the batch. A mode that can take the cross-entropy along from its own
projection (`hard_label_weight`) carries `hard_labels`' share, and the vocabulary is walked once instead of twice.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from distill.batch import Batch
from distill.errors import UserError
from distill.forward import Capture, Forward
from distill.losses import LOSSES, LossMode
from distill.losses.base import Inner, LossOutput
from distill.rollouts import Rollouts
from distill.tables import bind, lookup

GIVEN = ("num_outcomes", "progress", "inner")  # arguments that the trainer fills in, where a mode has them
CARRIED = "hard_label_weight"


@dataclass(frozen=True, slots=True)
class _Term:
    name: str
    weight: float
    fn: Callable[..., LossOutput]
    inner: Inner
    given: frozenset[str]


class Mixture:
    """Loss modes with weights, options and what they need of the models.

    Args:
        weights: mode -> weight, above 0. A mode is a name of `LOSSES` or ``pkg.mod:name`` of a `LossMode`.
        options: mode -> its keyword-only arguments.
        student, teacher: the models; `teacher` is None where none runs.
        num_outcomes: tokens of the vocabulary.
        rollouts: how batches are written, where the student writes them.
        stand_ins: modes that take the place of those of the same name, where the teacher has another tokenizer.

    Attributes:
        needs, reads_head: what any of the modes needs and does (see `LossMode`).
        student_capture, teacher_capture: what the modes read inside the models.
        modules: mode -> the parameters it trains beside the student.
        scorers: further models that the modes run (`Inner.scorers`).

    Raises:
        UserError: an unknown mode or option, a weight that is not positive, options of a mode that takes no part, or
            whatever a mode refuses about the models.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        options: Mapping[str, Mapping[str, Any]],
        *,
        student: Any,
        teacher: Any,
        num_outcomes: int,
        rollouts: Rollouts | None = None,
        stand_ins: Mapping[str, LossMode] | None = None,
    ) -> None:
        modes = {name: find_mode(name, stand_ins) for name in weights}
        check_weights(weights)
        for name in options:
            if name not in modes:
                raise UserError(f"options for {name!r}, which is not part of the loss: {', '.join(modes)}")
        weights, chosen = _carry(weights, modes, {name: dict(options.get(name, {})) for name in modes})
        self.num_outcomes = num_outcomes
        self.reads_head = any(modes[name].reads_head for name in weights)
        self.needs = frozenset().union(*(mode.needs for mode in modes.values()))
        self.terms: list[_Term] = []
        for name, weight in weights.items():
            mode = modes[name]
            taken = [key for key in chosen[name] if key in GIVEN]
            if taken:
                raise UserError(f"loss mode {name!r}: {taken[0]} is the trainer's to give")
            fn = bind(mode.fn, chosen[name], f"loss mode {name!r}")
            inner = _look_inside(mode, student, teacher, rollouts, chosen[name])
            given = frozenset(GIVEN) & inspect.signature(mode.fn).parameters.keys()
            self.terms.append(_Term(name, weight, fn, inner, given))
        self.student_capture = _union(term.inner.student for term in self.terms)
        self.teacher_capture = _union(term.inner.teacher for term in self.terms)
        self.scorers = [scorer for term in self.terms for scorer in term.inner.scorers]
        self.modules = nn.ModuleDict(
            {term.name.replace(".", "_"): term.inner.modules for term in self.terms if term.inner.modules is not None}
        )

    def __call__(self, student: Forward, teacher: Forward | None, batch: Batch, *, progress: float) -> LossOutput:
        """Return the weighted sum of all modes on one batch.

        Its metrics are those of the modes and, where there are several, each mode's own value under its name.

        Args:
            progress: the share of all optimizer steps that is done, in [0, 1].
        """
        outputs = []
        for term in self.terms:
            values = {"num_outcomes": self.num_outcomes, "progress": progress, "inner": term.inner}
            outputs.append(term.fn(student, teacher, batch, **{key: values[key] for key in term.given}))
        if len(outputs) == 1 and self.terms[0].weight == 1.0:
            return outputs[0]
        total = sum(term.weight * output.total for term, output in zip(self.terms, outputs, strict=True))
        metrics = {name: value for output in outputs for name, value in output.metrics.items()}
        metrics |= {term.name: output.total.detach() for term, output in zip(self.terms, outputs, strict=True)}
        return LossOutput(total, outputs[0].weight, metrics)  # type: ignore[arg-type]


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights that are no positive numbers, or none at all.

    Raises:
        UserError: naming the mode.
    """
    if not weights:
        raise UserError("a loss needs at least one mode")
    for name, weight in weights.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(
                f"the weight of {name} must be a positive number, not {weight}: leave out what counts nothing"
            )


def find_mode(name: str, stand_ins: Mapping[str, LossMode] | None = None) -> LossMode:
    """Return the entry of a mode.

    Args:
        name: of `LOSSES`, or ``pkg.mod:name``.
        stand_ins: modes for a teacher of another tokenizer, where it has one.

    Raises:
        UserError: it names something else, or asks a teacher and does not know about other tokenizers.
    """
    if stand_ins is not None and name in stand_ins:
        return stand_ins[name]
    mode = lookup(LOSSES, name, "mode")
    if not isinstance(mode, LossMode):
        raise UserError(f"{name} must name a distill.losses.LossMode, not a {type(mode).__name__}")
    if stand_ins is not None and mode.needs & {"teacher", "teacher_logits"}:
        raise UserError(
            f"{name} compares tokens of one vocabulary, and the teacher has another: there are "
            f"{', '.join(stand_ins)}, and hard_labels, which needs no alignment"
        )
    return mode


def _look_inside(
    mode: LossMode, student: Any, teacher: Any, rollouts: Rollouts | None, options: Mapping[str, Any]
) -> Inner:
    if mode.inner is None:
        return Inner()
    further = {"rollouts": rollouts} if "rollouts" in inspect.signature(mode.inner).parameters else {}
    return mode.inner(student, teacher, **further, **options)


def _carry(
    weights: Mapping[str, float], modes: Mapping[str, LossMode], options: dict[str, dict[str, Any]]
) -> tuple[Mapping[str, float], dict[str, dict[str, Any]]]:
    carriers = [name for name in weights if CARRIED in inspect.signature(modes[name].fn).parameters]
    if "hard_labels" not in weights or options["hard_labels"] or not carriers:
        return weights, options
    carrier = carriers[0]
    share = weights["hard_labels"] / weights[carrier] + options[carrier].get(CARRIED, 0.0)
    rest = {name: weight for name, weight in weights.items() if name != "hard_labels"}
    return rest, options | {carrier: {**options[carrier], CARRIED: share}}


def _union(captures: Any) -> Capture:
    captures = list(captures)
    return Capture(
        frozenset().union(*(capture.layers for capture in captures)),
        frozenset().union(*(capture.attention for capture in captures)),
    )
