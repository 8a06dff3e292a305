"""The loss modes: one file each, one line each in `LOSSES`; `distill.losses.mixture` adds several up.

A mode is ``f(student, teacher, batch, *, options) -> LossOutput`` where `student` and `teacher` are
`distill.forward.Forward`; `teacher` is None where no teacher ran. On the command line `_` is written `-`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distill.losses.base import Inner, LossOutput
from distill.losses.features import features, features_inner
from distill.losses.grpo import grpo, grpo_inner
from distill.losses.hard_labels import hard_labels
from distill.losses.on_policy import on_policy, on_policy_inner
from distill.losses.relations import relations, relations_inner
from distill.losses.soft_logits import soft_logits

__all__ = [
    "LOSSES",
    "Inner",
    "LossMode",
    "LossOutput",
    "features",
    "grpo",
    "hard_labels",
    "on_policy",
    "relations",
    "soft_logits",
]


@dataclass(frozen=True, slots=True)
class LossMode:
    """A loss function and what it must be given.

    Attributes:
        fn: the mode. Its keyword-only arguments are its options, but for `num_outcomes`, `progress` and `inner`, which
            the trainer gives to a mode that has them: the tokens of the shared vocabulary, the share of all steps that
            is done, and what `inner` returned.
        needs: of `teacher_logits` (the teacher's distribution: a teacher that runs, or its stored signal), `teacher`
            (a teacher that runs), `rollouts` (batches that the student writes itself) and `rewards` (the same, several
            to a question, and what they are worth).
        reads_head: whether the student's output embedding takes part, so that it has a gradient.
        inner: ``f(student_model, teacher_model, **options) -> Inner``, called once before training with the options
            that were given, and with `rollouts` where it has that argument.
    """

    fn: Callable[..., LossOutput]
    needs: frozenset[str] = frozenset()
    reads_head: bool = True
    inner: Callable[..., Inner] | None = None


LOSSES: dict[str, LossMode] = {
    "hard_labels": LossMode(hard_labels),
    "soft_logits": LossMode(soft_logits, needs=frozenset({"teacher_logits"})),
    "features": LossMode(features, needs=frozenset({"teacher"}), reads_head=False, inner=features_inner),
    "relations": LossMode(relations, needs=frozenset({"teacher"}), reads_head=False, inner=relations_inner),
    "on_policy": LossMode(on_policy, needs=frozenset({"teacher", "rollouts"}), inner=on_policy_inner),
    "grpo": LossMode(grpo, needs=frozenset({"rewards"}), inner=grpo_inner),
}
