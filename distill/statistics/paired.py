"""Two arms on the same questions: the bootstrap interval of their difference, and the p-value that it inverts to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from distill.statistics.quantiles import Floats, normal_quantile, student_t_quantile
from distill.statistics.variance import components

_CHUNK = 2_000_000  # resampled indices held at once


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean paired difference (student arm minus reference), its 95 % interval, the p-value it inverts to, its error.

    Each is a float for one comparison and an array for a batch of them.
    """

    difference: Floats
    low: Floats
    high: Floats
    p: Floats
    stderr: Floats


def resampling_counts(n: int, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield (rows, n) blocks, `resamples` rows in all: how often each of n questions is drawn, n draws to a row."""
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(float)


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike | None = None, *, resamples: int = 10_000, seed: int = 0
) -> Difference:
    """Return the mean difference over paired questions with its 95 % bootstrap interval and p-value.

    Questions are resampled in pairs, and the interval reaches as far to either side as 95 % of the resampled means do:
    by simulation that covers better than percentiles where differences are few and one-sided. Means of counts lie on a
    grid; each is spread over its cell, or the reach would jump where few questions differ. Training seeds are too few
    to resample (three have ten distinct resamples, whose spread is a third too small), so what they vary beyond noise,
    in both arms together, is added as a normal draw; and the distribution is stretched by t / z, with Satterthwaite's
    degrees of freedom over both sources. Where every question gives the same difference a bootstrap
    knows no width; the share of unseen questions that could still differ (Wilson's bound for 0 of n) is used instead.

    Args:
        first: (n,) differences; or, with `second`, the scores of an arm: (n,) or (S, n), S training seeds.
        second: the other arm's scores on the same n questions, (n,) or (S', n); S' need not be S.
            Leading batch axes are allowed on (..., S, n) matrices and give arrays.
        resamples: draws; p cannot fall below 2 / (resamples + 1).
        seed: of the draws; the same seed gives the same interval.

    Raises:
        ValueError: fewer than two questions, or arms with different questions.
    """
    a = np.atleast_2d(np.asarray(first, dtype=float))
    b = np.zeros((1, a.shape[-1])) if second is None else np.atleast_2d(np.asarray(second, dtype=float))
    n = a.shape[-1]
    if b.shape[-1] != n or n < 2:
        raise ValueError(f"paired questions are needed, at least two: got {n} and {b.shape[-1]}")
    rng = np.random.default_rng(seed)
    paired = a.mean(-2) - b.mean(-2)
    difference = paired.mean(-1)
    ours, theirs = components(a), components(b)
    of_questions = paired.var(-1, ddof=1) / n
    # Cut off at 0 for both arms at once: cutting each would add up what chance alone makes of either.
    of_seeds = np.maximum(0.0, ours.excess + theirs.excess)
    doubt = np.where(of_seeds > 0, ours.doubt + theirs.doubt, 0.0)
    variance = of_questions + of_seeds
    with np.errstate(invalid="ignore", divide="ignore"):
        degrees = variance**2 / (of_questions**2 / (n - 1) + doubt)
    # The degrees of a sum are never fewer than the fewest of its parts; the subtraction of noise could say so.
    fewest = min([n, *(arm.seeds for arm in (ours, theirs) if arm.seeds > 1)]) - 1
    degrees = np.maximum(np.where(variance > 0, degrees, np.inf), fewest)

    deviation = _resampled_means(paired, resamples, rng) - difference[..., None]
    # The bootstrap variance of a mean is (n - 1) / n of the unbiased one.
    deviation *= math.sqrt(n / (n - 1))
    deviation += np.sqrt(of_seeds)[..., None] * rng.standard_normal(resamples)
    spread = (_grain(paired) / n)[..., None] * rng.uniform(-0.5, 0.5, resamples)
    reach = np.sort(np.abs(np.abs(deviation) + spread), -1)

    def bounds(alpha: Floats) -> tuple[Floats, Floats]:
        z = normal_quantile(1 - alpha / 2)
        width = student_t_quantile(1 - alpha / 2, degrees) / z * _sorted_quantile(reach, 1 - alpha)
        unseen = z * z / (n + z * z)  # wilson_interval(0, n)[1]
        flat = variance <= 1e-18
        low = difference - np.where(flat, unseen * (1 + difference), width)
        high = difference + np.where(flat, unseen * (1 - difference), width)
        return np.clip(low, -1, 1), np.clip(high, -1, 1)

    low, high = bounds(np.full(difference.shape, 0.05))
    # Bisect for the smallest alpha whose interval leaves 0 out, from the finest the draws resolve.
    least, most = np.full(difference.shape, 2 / (resamples + 1)), np.ones(difference.shape)
    p = least
    for _ in range(30):
        below, above = bounds(p)
        excluded = (below > 0) | (above < 0)
        least, most = np.where(excluded, least, p), np.where(excluded, p, most)
        p = np.sqrt(least * most)
    return Difference(difference, low, high, most, np.sqrt(variance))


def _resampled_means(values: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Return (..., resamples) means of `values` (..., n) over questions drawn with replacement, alike for all."""
    n = values.shape[-1]
    flat = values.reshape(-1, n)
    parts = [flat @ counts.T / n for counts in resampling_counts(n, resamples, rng)]
    return np.concatenate(parts, -1).reshape(*values.shape[:-1], resamples)


def _grain(values: Floats) -> Floats:
    """Return (...) the smallest step between values (..., n), the grid that counts lie on; 0 where all are equal."""
    steps = np.diff(np.sort(values, -1))
    smallest = np.where(steps > 1e-9, steps, np.inf).min(-1)
    return np.where(np.isfinite(smallest), smallest, 0.0)


def _sorted_quantile(ordered: Floats, probability: Floats) -> Floats:
    """Return the linearly interpolated quantile along the last axis of `ordered`, one probability per row."""
    position = probability * (ordered.shape[-1] - 1)
    left = np.minimum(position.astype(int), ordered.shape[-1] - 2)
    at = np.take_along_axis(ordered, left[..., None], -1)[..., 0]
    after = np.take_along_axis(ordered, left[..., None] + 1, -1)[..., 0]
    return np.asarray(at + (position - left) * (after - at))
