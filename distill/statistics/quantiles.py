"""Quantiles and tails of the normal distribution and of Student's t, without scipy.

With x = sqrt(v) tan(angle) the distribution of t is an integral of cos^(v-1), which Gauss-Legendre takes to 1e-7
(tested against tables); above `NEARLY_NORMAL` degrees it is the normal distribution with its first correction.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

NORMAL = NormalDist()
NEARLY_NORMAL = 1e4  # degrees of freedom
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)


def normal_quantile(probability: ArrayLike) -> Floats:
    """Return the quantiles of the standard normal distribution, of any shape."""
    return np.asarray(np.vectorize(NORMAL.inv_cdf, otypes=[float])(probability))


def student_t_quantile(probability: ArrayLike, degrees: ArrayLike) -> Floats:
    """Return upper quantiles of Student's t; `probability` in (0.5, 1) and real `degrees` >= 1 broadcast.

    Newton from the normal quantile, which is smaller, climbs a concave function, so it can not overshoot.
    """
    target, v = np.broadcast_arrays(np.asarray(probability, dtype=float) - 0.5, np.asarray(degrees, dtype=float))
    small = np.minimum(v, NEARLY_NORMAL)
    scale, z = _scale(small), normal_quantile(target + 0.5)
    angle = np.arctan(z / np.sqrt(small))
    for _ in range(60):
        missing = target - scale * _mass(np.zeros_like(angle), angle, small)
        step = missing / (scale * np.cos(angle) ** (small - 1))
        angle = angle + step
        if np.all(np.abs(step) <= 1e-13 * angle):
            break
    return np.where(v > NEARLY_NORMAL, z + (z**3 + z) / (4 * np.maximum(v, 1.0)), np.sqrt(small) * np.tan(angle))


def student_t_tail(value: float, degrees: float) -> float:
    """Return the chance that Student's t with `degrees` >= 1 is above `value` >= 0."""
    if degrees > NEARLY_NORMAL:
        # Abramowitz and Stegun, 26.7.8: the normal value that lies as far out.
        normal = value * (1 - 1 / (4 * degrees)) / math.sqrt(1 + value * value / (2 * degrees))
        return 0.5 * math.erfc(normal / math.sqrt(2))
    v, angle = np.asarray(float(degrees)), np.asarray(math.atan(value / math.sqrt(degrees)))
    return float(_scale(v) * _mass(angle, np.asarray(math.pi / 2), v))


def _scale(degrees: Floats) -> Floats:
    log_gamma = np.vectorize(math.lgamma, otypes=[float])
    return np.asarray(np.exp(log_gamma((degrees + 1) / 2) - log_gamma(degrees / 2)) / math.sqrt(math.pi))


def _mass(low: Floats, high: Floats, degrees: Floats) -> Floats:
    """Return the integral of cos^(degrees - 1) between two angles."""
    half = (high - low) / 2
    cosines = np.cos(low[..., None] + half[..., None] * (_NODES + 1))
    heights = np.exp((degrees[..., None] - 1) * np.log(cosines))  # a third of the time of a power
    return np.asarray(half * (heights * _WEIGHTS).sum(-1))
