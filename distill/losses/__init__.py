"""The loss modes: one file each, one line each in `LOSSES`.

A mode is ``f(student, teacher, batch, *, options) -> LossOutput`` where `student` and `teacher` are
`distill.forward.Forward`; `teacher` is None unless the mode `needs` it. On the command line `_` is written `-`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distill.losses.base import LossOutput
from distill.losses.hard_labels import hard_labels
from distill.losses.soft_logits import soft_logits

__all__ = ["LOSSES", "LossMode", "LossOutput", "hard_labels", "soft_logits"]


@dataclass(frozen=True, slots=True)
class LossMode:
    """A loss function and what it must be given: `needs` may hold `teacher_logits`."""

    fn: Callable[..., LossOutput]
    needs: frozenset[str] = frozenset()


LOSSES: dict[str, LossMode] = {
    "hard_labels": LossMode(hard_labels),
    "soft_logits": LossMode(soft_logits, needs=frozenset({"teacher_logits"})),
}
