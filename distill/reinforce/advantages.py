"""Rewards to advantages: how much better an answer is than the others to its question (GRPO, arXiv 2402.03300, 4.1.2).

Pure functions of arrays.
"""

from __future__ import annotations

import numpy as np

EPSILON = 1e-4  # added to a deviation before it divides, as in TRL


def group_advantages(
    rewards: np.ndarray, group: int, *, scale: str, batch_deviation: float | None = None
) -> np.ndarray:
    """Return reward minus the group's mean, over a deviation: (N,) float64, 0 for an answer without a reward.

    Args:
        rewards: (N,), answers to one question next to each other; NaN is no reward and counts in no mean.
        group: answers to a question; N is a multiple of it.
        scale: `group` divides by the group's deviation (n - 1 in its variance), `batch` by `batch_deviation`, `none`
            by nothing (Dr. GRPO, arXiv 2503.20783: the division favours questions that are nearly always or never
            answered).
        batch_deviation: of all rewards of the step.
    """
    grouped = rewards.reshape(-1, group)
    known = ~np.isnan(grouped)
    count = known.sum(1, keepdims=True)
    mean = np.where(known, grouped, 0.0).sum(1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(known, grouped - mean, 0.0)
    if scale == "group":
        deviation = np.sqrt((centred**2).sum(1, keepdims=True) / np.maximum(count - 1, 1))
        centred = centred / (deviation + EPSILON)
    elif scale == "batch":
        assert batch_deviation is not None
        centred = centred / (batch_deviation + EPSILON)
    return centred.ravel()


def has_signal(rewards: np.ndarray, group: int) -> np.ndarray:
    """Return, for each question, whether two of its answers are worth different rewards, (N / group,) bool.

    Where none do, every advantage is 0 and the question teaches nothing.
    """
    grouped = rewards.reshape(-1, group)
    low = np.where(np.isnan(grouped), np.inf, grouped).min(1)
    high = np.where(np.isnan(grouped), -np.inf, grouped).max(1)
    return high > low
