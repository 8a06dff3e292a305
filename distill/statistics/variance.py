"""Where the variance of an accuracy comes from: questions, and training seeds as a random effect."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from distill.statistics.quantiles import Floats


@dataclass(frozen=True, slots=True)
class Components:
    """Variance of the grand mean of a (..., S seeds, n questions) matrix, by what made it.

    Attributes:
        questions: of the means over seeds; it holds the noise of the samples, too.
        of_seeds: of the seeds' own means; it holds the noise of the samples, too. 0 for one seed.
        noise: how much of `of_seeds` noise alone would make.
        seeds: S.
    """

    questions: Floats
    of_seeds: Floats
    noise: Floats
    seeds: int

    @property
    def excess(self) -> Floats:
        """What seeds differ by beyond noise. Unbiased, so it may be negative."""
        return self.of_seeds - self.noise

    @property
    def doubt(self) -> Floats:
        """What the seeds add to Satterthwaite's denominator."""
        return self.of_seeds**2 / max(1, self.seeds - 1)


def components(scores: ArrayLike) -> Components:
    """Split the variance of the grand mean of `scores` (..., S, n), n > 1.

    With x[s, i] = mean + question[i] + seed[s] + noise[s, i], the spread of question means already holds the noise, and
    so does the spread of seed means: the seeds' own part is what exceeds it.
    """
    values = np.asarray(scores, dtype=float)
    seeds, n = values.shape[-2:]
    questions = values.mean(-2).var(-1, ddof=1) / n
    if seeds == 1:
        zero = np.zeros_like(questions)
        return Components(questions, zero, zero, 1)
    of_seeds = values.mean(-1).var(-1, ddof=1) / seeds
    rest = values - values.mean(-1, keepdims=True)
    rest = rest - rest.mean(-2, keepdims=True)
    noise = (rest**2).sum((-1, -2)) / ((n - 1) * (seeds - 1)) / (n * seeds)
    return Components(questions, of_seeds, noise, seeds)


def seed_sd(scores: ArrayLike) -> float | None:
    """Return the standard deviation of the accuracy of one training run around its method's, None for one seed.

    Estimated from `scores` (S, n) as what the seeds' accuracies differ by beyond sampling noise, and 0 where they
    differ by less than that: with few seeds a rough number.
    """
    parts = components(np.atleast_2d(scores))
    return None if parts.seeds == 1 else math.sqrt(max(0.0, float(parts.excess)) * parts.seeds)
