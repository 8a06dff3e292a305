"""How far a run is when steps are not what it is measured in: budgets, the schedule that follows them, milestones.

A budget is spent by the ledger (FLOPs, seconds, tokens), so that runs of unlike kinds can be stopped at equal cost. The
learning rate follows the share that is spent, by the same curve that would follow the share of the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback

from distill.errors import UserError

UNBOUNDED = 10**9  # optimizer steps of a run that only its budget ends
FINE = 10**6  # steps of the curve that a schedule is read from


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may spend; None is no limit. Tokens are those the student is trained on and those it writes."""

    flops: float | None = None
    seconds: float | None = None
    tokens: int | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.flops, self.seconds, self.tokens))

    def share(self, ledger: Mapping[str, Any]) -> float:
        """Return the largest share of a limit that is spent; 1 and more is the end."""
        spent = {**ledger, "tokens": ledger["tokens"] + ledger.get("rollout_tokens", 0)}
        limits = {"flops": self.flops, "seconds": self.seconds, "tokens": self.tokens}
        return max(spent[name] / limit for name, limit in limits.items() if limit is not None)


def follow(scheduler: LRScheduler, optimizer: Optimizer, progress: Callable[[], float]) -> LambdaLR:
    """Return a schedule with the curve of `scheduler`, made for `FINE` steps, read at the share of the run.

    Raises:
        UserError: a schedule that is no function of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise UserError(
            "a schedule that follows a budget must be a function of the share that is spent: use cosine, linear, "
            "constant or constant_with_warmup"
        )
    curves = scheduler.lr_lambdas

    def at(curve: Callable[[int], float]) -> Callable[[int], float]:
        return lambda _: curve(round(min(progress(), 1.0) * FINE))

    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    return LambdaLR(optimizer, [at(curve) for curve in curves])


class Ending(TrainerCallback):
    """Stops a run once `progress()` reaches 1, with a last line of metrics and a last checkpoint."""

    def __init__(self, progress: Callable[[], float]) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress() >= 1.0:
            control.should_training_stop = control.should_log = control.should_save = True


class Milestones(TrainerCallback):
    """Calls `save(k)` after the first step at or beyond k/N of the run, k = 1 .. N-1."""

    def __init__(self, number: int, progress: Callable[[], float], save: Callable[[int], None]) -> None:
        self.number, self.progress, self.save = number, progress, save
        self.reached = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reached = self._passed()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        passed = self._passed()
        for milestone in range(self.reached + 1, passed + 1):
            self.save(milestone)
        self.reached = passed

    def _passed(self) -> int:
        # A share of exactly k/N may come out a little below it.
        return min(self.number - 1, int(self.progress() * self.number + 1e-9))
