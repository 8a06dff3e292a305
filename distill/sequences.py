"""The sequences of a batch, one by one, for a loss that compares the tokens of a sequence with each other.

A padded row is a packed row of one sequence: both are told apart by where positions begin again at 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from distill.batch import Batch


class Sequence(NamedTuple):
    """One sequence of a batch: where it lies and how much it counts. Positions ascend and are on the CPU.

    Attributes:
        row: of the batch.
        response: (n,) int64 positions that predict a trained token.
        context: (m,) int64 the sequence's other positions before the last of those.
        mass: () the sum of its trained weights.
    """

    row: int
    response: Tensor
    context: Tensor
    mass: Tensor

    def sample(self, count: int) -> Sequence:
        """Return it with at most `count` positions of either, evenly spaced, the first and the last among them."""
        return self._replace(response=_evenly(self.response, count), context=_evenly(self.context, count))


def sequences(batch: Batch) -> Iterator[Sequence]:
    """Yield the sequences of a batch, padded or packed, that train anything."""
    weights = functional.pad(batch.weights[:, 1:], (0, 1)).cpu()  # of what each position predicts
    inside = batch.attention_mask.cpu() > 0
    starts = torch.zeros_like(inside) if batch.position_ids is None else batch.position_ids.cpu() == 0
    numbers = starts.cumsum(1)
    for row, trains in enumerate(weights > 0):
        for number in numbers[row][trains].unique():
            mine = (numbers[row] == number) & inside[row]
            response = (mine & trains).nonzero()[:, 0]
            others = (mine & ~trains).nonzero()[:, 0]
            yield Sequence(row, response, others[others < response[-1]], weights[row, response].sum())


def _evenly(positions: Tensor, count: int) -> Tensor:
    if len(positions) <= count:
        return positions
    return positions[torch.arange(count) * (len(positions) - 1) // max(count - 1, 1)]
