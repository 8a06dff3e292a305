"""One arm: its mean, its error over questions, its interval, and pass@k."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from distill.statistics.quantiles import NORMAL, student_t_quantile
from distill.statistics.variance import components


def mean_and_stderr(per_question: ArrayLike) -> tuple[float, float]:
    """Return the mean over questions and its standard error, sd / sqrt(n) with n - 1 in the sd.

    Raises:
        ValueError: no question at all. One question has a mean but no error: nan.
    """
    values = np.asarray(per_question, dtype=float)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"one number per question is needed, got shape {values.shape}")
    spread = float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan
    return float(values.mean()), spread


def wilson_interval(successes: float, trials: float, *, quantile: float | None = None) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a proportion; `trials` may be an effective, fractional size.

    Args:
        successes: 0..trials.
        trials: > 0.
        quantile: how many standard errors wide; the normal 97.5 % quantile unless given.

    Raises:
        ValueError: trials are not positive, or successes are outside [0, trials].
    """
    if not trials > 0 or not -1e-9 <= successes <= trials * (1 + 1e-9):
        raise ValueError(f"{successes} successes of {trials} trials is not a proportion")
    z = NORMAL.inv_cdf(0.975) if quantile is None else quantile
    p = min(max(successes / trials, 0.0), 1.0)
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return (0.0 if p == 0 else max(0.0, centre - half)), (1.0 if p == 1 else min(1.0, centre + half))


def accuracy_interval(per_question: ArrayLike, *, samples_per_question: int = 1) -> tuple[float, float]:
    """Return the 95 % interval of one arm's accuracy.

    Args:
        per_question: (n,) mean score of each question in [0, 1], or (S, n) for S training seeds, which then widen the
            interval by what they differ beyond sampling noise (Student's t with Satterthwaite's degrees of freedom).
        samples_per_question: bounds the effective sample size, which is p(1-p)/SE^2.

    Raises:
        ValueError: no question.
    """
    scores = np.atleast_2d(np.asarray(per_question, dtype=float))
    seeds, n = scores.shape
    if n == 0:
        raise ValueError("no question: an accuracy needs at least one")
    p = float(scores.mean())
    if n == 1 or p in (0.0, 1.0):
        return wilson_interval(p * n, n)
    parts = components(scores)
    excess = max(0.0, float(parts.excess))
    variance = float(parts.questions) + excess
    most = n * samples_per_question * seeds
    effective = min(p * (1 - p) / variance, most) if variance > 0 else most
    # The n of a binary sample, not n - 1: one sample per question must give Wilson's interval to the last digit.
    if excess == 0:
        effective = min(effective * n / (n - 1), most)
        return wilson_interval(p * effective, effective)
    degrees = max(variance**2 / float(parts.doubt + parts.questions**2 / (n - 1)), min(seeds, n) - 1)
    return wilson_interval(p * effective, effective, quantile=float(student_t_quantile(0.975, degrees)))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate 1 - C(n-c, k) / C(n, k) that one of k samples is right, from c right of n.

    Exact in whole numbers before the one division (Chen et al. 2021, eq. 1).

    Raises:
        ValueError: not 1 <= k <= n or not 0 <= c <= n.
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got n={n}, c={c}, k={k}")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)
