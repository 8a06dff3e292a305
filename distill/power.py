"""How many samples a question needs before a comparison of two models would see a difference of a given size.

Miller (2024, arXiv 2411.00640, section 5): n questions, with K samples each from both models, show a true difference
delta at level alpha with the power asked for when

    n = (z[1 - alpha/2] + z[power])^2 * (omega^2 + sigma_A^2 / K + sigma_B^2 / K) / delta^2

Here n is given and K is sought. More samples wear down sigma^2, the chance within a question, and never omega^2, what
the questions themselves differ by: below `smallest_effect` only more questions help. All numbers are fractions of 1,
not percentage points. Nothing is drawn or read here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from distill.statistics import minimum_detectable_effect

CORRELATION = 0.5  # of two models' question scores; Miller reports 0.3 to 0.7 between strong models


@dataclass(frozen=True, slots=True, kw_only=True)
class Variances:
    """What makes two scores differ."""

    between: float  # omega^2: of the difference of the two models' true scores, over questions
    within: float  # sigma^2: of one sample's score around its question's true score, mean of the two models


def detectable_effect(variances: Variances, questions: int, samples: float) -> float:
    """Return the true difference that `questions` with `samples` each show with 80 % power at 5 %."""
    return minimum_detectable_effect(math.sqrt(variances.between + 2 * variances.within / samples), questions)


def smallest_effect(variances: Variances, questions: int) -> float:
    """Return the difference below which no number of samples helps: what is left of `detectable_effect` at the end."""
    return detectable_effect(variances, questions, math.inf)


def samples_needed(target: float, variances: Variances, questions: int) -> int | None:
    """Return the fewest samples per question that make a difference of `target` detectable; None where none do."""
    if detectable_effect(variances, questions, 1) <= target:
        return 1
    room = (target / minimum_detectable_effect(1.0, questions)) ** 2 - variances.between
    return math.ceil(2 * variances.within / room) if room > 0 else None


def variances_of(scores: ArrayLike, other: ArrayLike | None = None) -> Variances:
    """Estimate the variances from sampled scores; an estimate that comes out below 0 is 0.

    The spread of question means holds the chance of their samples too, which is subtracted (one-way analysis of
    variance). Two models give omega^2 itself. One gives the spread of its own true scores, v, and omega^2 = 2 v (1 -
    `CORRELATION`), as if the other model had the same.

    Args:
        scores: (n, K) one model's scores, n questions with K samples each.
        other: (n, K') another model's on the same questions in the same order.

    Raises:
        ValueError: fewer than 2 questions or samples, or other questions.
    """
    ours = np.asarray(scores, dtype=float)
    theirs = ours if other is None else np.asarray(other, dtype=float)
    if min(*ours.shape, *theirs.shape) < 2 or len(ours) != len(theirs):
        raise ValueError(f"needs 2 or more questions with 2 or more samples, alike: got {ours.shape}, {theirs.shape}")
    within = [float(each.var(1, ddof=1).mean()) for each in (ours, theirs)]
    if other is None:
        own = float(ours.mean(1).var(ddof=1)) - within[0] / ours.shape[1]
        between = 2 * own * (1 - CORRELATION)
    else:
        noise = within[0] / ours.shape[1] + within[1] / theirs.shape[1]
        between = float((ours.mean(1) - theirs.mean(1)).var(ddof=1)) - noise
    return Variances(between=max(0.0, between), within=sum(within) / 2)
