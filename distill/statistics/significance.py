"""Second opinions on a paired difference (Student, Wilcoxon), many claims at once (Holm), and power (Miller)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from distill.statistics.quantiles import NORMAL, student_t_tail

EXACT_WILCOXON = 50  # non-zero differences up to which the null distribution is counted rather than approximated


def paired_t(differences: ArrayLike) -> float:
    """Return the two-sided p-value of Student's paired t-test that the mean of (n,) differences is 0.

    Over questions alone, as `wilcoxon_signed_rank`: training seeds are not in it. Differences that are all alike have
    no spread to test against: 1.0 where they are 0, else 0.0.

    Raises:
        ValueError: fewer than two differences.
    """
    values = np.asarray(differences, dtype=float)
    n = values.size
    if n < 2:
        raise ValueError(f"a paired t-test needs at least two differences, got {n}")
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n)
    if error <= 1e-12 * abs(mean) or error == 0:
        return 1.0 if mean == 0 else 0.0
    return min(1.0, 2 * student_t_tail(abs(mean) / error, n - 1))


def wilcoxon_signed_rank(differences: ArrayLike) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test that paired differences are symmetric about 0.

    Zeros are left out and ties share their mean rank. Up to 50 non-zero differences the null distribution is counted
    exactly, ties included; above, the normal approximation with tie and continuity corrections. 1.0 when all are zero.
    """
    values = np.asarray(differences, dtype=float)
    values = values[values != 0]
    n = values.size
    if n == 0:
        return 1.0
    _, group, sizes = np.unique(np.round(np.abs(values), 12), return_inverse=True, return_counts=True)
    doubled = (2 * np.cumsum(sizes) - sizes + 1)[group]  # twice the mean rank, a whole number
    positive, total = int(doubled[values > 0].sum()), int(doubled.sum())
    smaller = min(positive, total - positive)
    if n <= EXACT_WILCOXON:
        ways = np.zeros(total + 1)
        ways[0] = 1.0
        for rank in doubled:
            ways[rank:] = ways[rank:] + ways[: total + 1 - rank]
        return min(1.0, 2 * float(ways[: smaller + 1].sum() / ways.sum()))
    variance = (n * (n + 1) * (2 * n + 1) - float((sizes**3 - sizes).sum()) / 2) / 24
    z = (abs(positive - total / 2) / 2 - 0.5) / math.sqrt(variance)
    return min(1.0, 2 * (1 - NORMAL.cdf(max(z, 0.0)))) if z < 5 else math.erfc(z / math.sqrt(2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values, in the order given; rejecting at 5 % bounds any false claim by 5 %."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def minimum_detectable_effect(differences_sd: float, n: int, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """Return the true difference that a two-sided test at `alpha` over n paired questions finds with `power`.

    (z[1 - alpha/2] + z[power]) * sd / sqrt(n), with the sd of the per-question differences (Miller 2024, section 5).

    Raises:
        ValueError: n < 1, or power or alpha outside (0, 1).
    """
    if n < 1 or not 0 < power < 1 or not 0 < alpha < 1:
        raise ValueError(f"needs n >= 1 and power, alpha in (0, 1): got n={n}, power={power}, alpha={alpha}")
    return (NORMAL.inv_cdf(1 - alpha / 2) + NORMAL.inv_cdf(power)) * differences_sd / math.sqrt(n)
