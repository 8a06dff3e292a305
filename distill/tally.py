"""What a training run counts: means for its next line of metrics, and sums for its ledger.

Everything is a sum, on the device and of this rank alone until it is read, so counting costs no synchronisation and a
resumed run goes on from the same numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distill.batch import Batch
from distill.ledger import forward_flops
from distill.losses.base import LossOutput

TOKENS, SQUARES = "tokens", "squares"  # of all sequences trained on: lengths, and their squares


class Tally:
    """Sums over the steps of a run, on one rank.

    Args:
        reduce: adds a tensor up over all ranks.

    Attributes:
        window: name -> (2,) a sum and the weight it is divided by, since the last line.
        totals: name -> () a sum since the run began.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        self.reduce = reduce
        self.window: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}
        self.seconds_before = 0.0
        self.started = time.perf_counter()

    def step(self, batch: Batch, output: LossOutput) -> None:
        """Count a micro-batch."""
        values = {"loss": output.total.detach(), **output.metrics}
        weight = torch.as_tensor(output.weight, dtype=torch.float64)
        pairs = {
            name: value if value.ndim else torch.stack([value.to(torch.float64), weight.to(value.device)])
            for name, value in values.items()
        }
        lengths = batch.lengths().to(torch.float64)
        tokens, trained = lengths.sum(), (batch.weights > 0).sum().to(torch.float64)
        pairs["trained_share"] = torch.stack([trained, tokens])
        self.add(pairs, {TOKENS: tokens, SQUARES: lengths.square().sum(), "trained": trained})

    def add(self, window: Mapping[str, Tensor], totals: Mapping[str, Tensor]) -> None:
        """Add to both tables."""
        for table, values in ((self.window, window), (self.totals, totals)):
            for name, value in values.items():
                value = value.to(torch.float64)
                table[name] = table[name] + value if name in table else value

    def means(self) -> dict[str, float]:
        """Return the window's means over all ranks, NaN where nothing had weight, and begin a new window."""
        sums = {name: self.reduce(value).tolist() for name, value in self.window.items()}
        self.window = {}
        return {name: total / weight if weight else math.nan for name, (total, weight) in sums.items()}

    def ledger(self, student: Any, teacher: Any, *, trained_share: float = 1.0) -> dict[str, Any]:
        """Return what the run cost so far on all ranks: flops, seconds, tokens, trained_tokens.

        Where the student writes: `rollout_tokens`, prompts included; where it is rewarded: `questions` asked (again is
        counted again) and `verifier_calls`.

        Args:
            student, teacher: text configs; `teacher` is None where none runs.
            trained_share: of the student's parameters.
        """
        count = {name: float(self.reduce(value)) for name, value in self.totals.items()}

        def forward(config: Any, tokens: str, squares: str) -> float:
            total = count.get(tokens, 0.0)
            return forward_flops(config, total, count[squares] / total / 2) if total else 0.0

        # Going backward costs a forward pass for the gradients by what enters a layer, and one for those by weights.
        flops = (2 + trained_share) * forward(student, TOKENS, SQUARES)
        flops += forward(student, "rollout_tokens", "rollout_squares")
        flops += forward(student, "read_tokens", "read_squares")  # completions read once more, by it or its reference
        if teacher is not None:
            flops += forward(teacher, TOKENS, SQUARES)
        seconds = self.seconds_before + time.perf_counter() - self.started
        tokens = {"tokens": int(count.get(TOKENS, 0)), "trained_tokens": int(count.get("trained", 0))}
        names = [name for name in ("rollout_tokens", "questions", "verifier_calls") if name in count]
        rolled: dict[str, Any] = {name: int(count[name]) for name in names}
        return {"flops": flops, "seconds": seconds, **tokens, **rolled}

    def state(self) -> dict[str, Any]:
        """Return the sums over all ranks, for a checkpoint."""
        tables = {"window": self.window, "totals": self.totals}
        return {
            table: {name: self.reduce(value).tolist() for name, value in values.items()}
            for table, values in tables.items()
        }

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from `state`, on one rank: its sums were added up over all."""
        self.window, self.totals = (
            {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in state[table].items()}
            for table in ("window", "totals")
        )
