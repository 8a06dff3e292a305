"""TAID's moving target: it starts between student and teacher and ends at the teacher (arXiv 2501.16937).

At share t the target is the softmax of (1 - t) student + t teacher, in logits, the student's part a constant; any
divergence compares the student with it, `forward_kl` in the paper. The share follows training progress in a straight
line, and runs ahead of it while the loss falls. No divergence is here, and no step is counted here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.errors import RunError, UserError


def interpolated_target(student_logits: Tensor, teacher_logits: Tensor, *, share: float) -> Tensor:
    """Return the target's logits ``(..., V)``: (1 - share) student + share teacher, without gradient to the student.

    They are never in the student's memory. An outcome that a side with a part in it excludes (-inf) is excluded.

    Args:
        student_logits: ``(..., V)``, divided by its temperature; likewise `teacher_logits`, over the same outcomes.
        share: the teacher's part, in [0, 1].
    """
    assert 0 <= share <= 1, share
    if share in (0, 1):  # 0 * -inf would be nan
        return teacher_logits if share else student_logits.detach().clone()
    return torch.add(student_logits.detach() * (1 - share), teacher_logits, alpha=share)


@dataclass
class TaidSchedule:
    """The teacher's share over a training run.

    Once per optimizer step, `share` is asked and then `observe` is told that step's loss. Several ranks stay together
    as long as all of them observe the same loss.

    Attributes:
        start: the share of the first step; in [0, 1].
        end: the share of the last step, and the highest there is; in [start, 1].
        step: how far one step can lead ahead of the straight line, as a part of what is missing to 1; in [0, 1], and 0
            keeps the line. The paper's alpha.
        momentum: what the running mean of the loss's relative change keeps at each step; in [0, 1). The paper's beta.

    Raises:
        UserError: a value outside its range.
    """

    start: float = 0.4
    end: float = 1.0
    step: float = 5e-4
    momentum: float = 0.99
    _share: float = field(init=False)
    _mean_change: float = field(default=0.0, init=False)
    _last_loss: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise UserError(f"taid: 0 <= start <= end <= 1 is needed, not start={self.start} and end={self.end}")
        if not 0 <= self.step <= 1:
            raise UserError(f"taid: step must be between 0 and 1, not {self.step}; 0 keeps the straight line")
        if not 0 <= self.momentum < 1:
            raise UserError(f"taid: momentum must be at least 0 and below 1, not {self.momentum}")
        self._share = self.start

    def share(self, progress: float) -> float:
        """Return the teacher's share at `progress`, the part of the training that is done, in [0, 1].

        It never falls. Asking twice changes nothing.
        """
        assert 0 <= progress <= 1, progress
        line = self.start + (self.end - self.start) * progress
        self._share = min(self.end, max(line, self._share))
        return self._share

    def observe(self, loss: float) -> None:
        """Take in the loss of the step just made, in any unit: only its change relative to the last one counts.

        The first loss only starts the comparison. After a loss of 0 there is nothing to be relative to: no change.

        Raises:
            RunError: the loss is not finite.
        """
        if not math.isfinite(loss):
            raise RunError(f"taid: the loss is {loss}")
        if self._last_loss is not None:
            change = (self._last_loss - loss) / self._last_loss if self._last_loss > 0 else 0.0
            # Relative to a loss near the smallest number there is, a change is infinite, and its mean NaN a step later.
            change = max(change, -sys.float_info.max)
            self._mean_change = self.momentum * self._mean_change + (1 - self.momentum) * change
            ahead = 0.5 + 0.5 * math.tanh(self._mean_change / 2)  # the sigmoid, without overflow
            self._share += self.step * ahead * (1 - self._share)
        self._last_loss = loss

    def state_dict(self) -> dict[str, Any]:
        """Return all that has been seen; with it a resumed run goes on as if it had not stopped. It is valid JSON."""
        return {"share": self._share, "mean_change": self._mean_change, "last_loss": self._last_loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what another schedule with the same settings had seen."""
        self._share, self._mean_change, self._last_loss = state["share"], state["mean_change"], state["last_loss"]
