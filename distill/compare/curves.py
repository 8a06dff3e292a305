"""Scores along a cost: one training run's checkpoints, read between two of them and never beyond.

Between checkpoints every question's score is linear in the logarithm of the cost. That is an assumption about a curve,
made as local as it can be: what lies before the first checkpoint or behind the last is not guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEAR = 0.02  # a checkpoint that cost this share more or less than a budget stands for it


@dataclass(frozen=True, slots=True)
class Curve:
    """One training run.

    Attributes:
        cost: (P,) of its checkpoints, ascending, positive.
        scores: (P, n) of each question there.
    """

    cost: np.ndarray
    scores: np.ndarray


def curve(costs: Sequence[float | None], scores: np.ndarray) -> Curve | None:
    """Return a run's curve, None where a cost is not known, not positive or does not grow from point to point."""
    if any(cost is None or cost <= 0 for cost in costs):
        return None
    known = np.array(costs, dtype=float)
    return Curve(known, np.asarray(scores, dtype=float)) if (np.diff(known) > 0).all() else None


def read_at(line: Curve, budget: float) -> tuple[np.ndarray, bool] | None:
    """Return the (n,) scores of a run at a budget, and whether they lie between two checkpoints.

    None where the budget is outside what the run's checkpoints bracket. A checkpoint within `NEAR` of it is taken as
    it is.
    """
    nearest = int(np.argmin(np.abs(np.log(line.cost / budget))))
    if abs(line.cost[nearest] / budget - 1) <= NEAR:
        return line.scores[nearest], False
    if not line.cost[0] < budget < line.cost[-1]:
        return None
    after = int(np.searchsorted(line.cost, budget))
    low, high = line.cost[after - 1], line.cost[after]
    share = np.log(budget / low) / np.log(high / low)
    return (1 - share) * line.scores[after - 1] + share * line.scores[after], True


def on_one_grid(lines: Sequence[Curve]) -> Curve | None:
    """Return the runs of one arm on common costs: scores (G, S, n) at all their checkpoints' costs that all bracket.

    None where fewer than two such costs are left.
    """
    low, high = max(line.cost[0] for line in lines), min(line.cost[-1] for line in lines)
    grid = np.unique(np.concatenate([line.cost for line in lines]))
    grid = grid[(grid >= low * (1 - 1e-9)) & (grid <= high * (1 + 1e-9))]
    if len(grid) < 2:
        return None
    places = [np.interp(np.log(grid), np.log(line.cost), np.arange(len(line.cost))) for line in lines]
    read = []
    for line, place in zip(lines, places, strict=True):
        before = np.minimum(place.astype(int), len(line.cost) - 2)
        share = (place - before)[:, None]
        read.append((1 - share) * line.scores[before] + share * line.scores[before + 1])
    return Curve(grid, np.stack(read, 1))


def crossing(accuracy: np.ndarray, log_cost: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (R,) the logarithm of the cost at which curves first reach a target, and whether before their first point.

    Args:
        accuracy: (R, G) along `log_cost` (G,).
        target: (R,), reached by each curve.
    """
    reached = accuracy >= target[:, None] - 1e-12
    first = reached.argmax(-1)
    rows = np.arange(len(accuracy))
    before = np.maximum(first - 1, 0)
    low, high = accuracy[rows, before], accuracy[rows, first]
    gap = np.where(high > low, high - low, 1.0)
    share = np.where(first > 0, np.clip((target - low) / gap, 0, 1), 1.0)
    return log_cost[before] + share * (log_cost[first] - log_cost[before]), first == 0
