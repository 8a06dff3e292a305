"""Intervals, tests and power for accuracies, where the *question* is the unit and never the sample.

Several samples of one question share its difficulty, so everything here starts from one number per question (the mean
over its samples) and, where a method was trained several times, from a matrix (training seeds S, questions n).

One rule for each of two jobs:

* one arm's accuracy: `accuracy_interval`, the Wilson score interval at the effective sample size p(1-p)/SE^2. With
  one sample per question that *is* Wilson's interval; with more it is its cluster-robust form; at 0/n and n/n, where
  a bootstrap or a normal interval collapses to a point, it keeps its width.
* the difference of two arms: `paired_bootstrap`, a percentile bootstrap over questions, stretched for small samples,
  with training seeds as a random effect. Its p-value is the inversion of its interval, so the two never disagree.

Accuracies and differences are fractions in [0, 1] and [-1, 1]; nothing here formats or judges. numpy only.

Sources: Wilson (1927); Dean and Pagano (2015) and Franco et al. (2019) for Wilson under clustering; Efron (1979) and
Hesterberg (2015) for the stretched percentile interval; Satterthwaite (1946); Chen et al. (2021) for pass@k; Holm
(1979); Wilcoxon (1945); Miller (2024, arXiv 2411.00640) for questions as the unit and for the power formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

NORMAL = NormalDist()
EXACT_WILCOXON = 50  # non-zero differences up to which the null distribution is counted rather than approximated
_CHUNK = 2_000_000  # resampled indices held at once
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)


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


def student_t_quantile(probability: ArrayLike, degrees: ArrayLike) -> Floats:
    """Return upper quantiles of Student's t; `probability` in (0.5, 1) and real `degrees` >= 1 broadcast.

    With x = sqrt(v) tan(angle) the distribution is an integral of cos^(v-1): Gauss-Legendre gives its mass, and Newton
    from 0 climbs a concave function, so it can not overshoot. Right to 1e-7 (tested against tables); above 1e4 degrees
    the normal quantile with its first correction.
    """
    target, v = np.broadcast_arrays(np.asarray(probability, dtype=float) - 0.5, np.asarray(degrees, dtype=float))
    small = np.minimum(v, 1e4)
    log_gamma = np.vectorize(math.lgamma, otypes=[float])
    scale = np.exp(log_gamma((small + 1) / 2) - log_gamma(small / 2)) / math.sqrt(math.pi)
    angle = np.zeros_like(small)
    for _ in range(60):
        heights = np.cos(angle[..., None] / 2 * (_NODES + 1)) ** (small[..., None] - 1)
        missing = target - scale * angle / 2 * (heights * _WEIGHTS).sum(-1)
        step = missing / (scale * np.cos(angle) ** (small - 1))
        angle = angle + step
        if np.all(np.abs(step) <= 1e-13 * angle):
            break
    z = np.vectorize(NORMAL.inv_cdf, otypes=[float])(target + 0.5)
    return np.where(v > 1e4, z + (z**3 + z) / (4 * np.maximum(v, 1.0)), np.sqrt(small) * np.tan(angle))


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


@dataclass(frozen=True, slots=True)
class _Components:
    """Variance of a mean over a (..., S, n) matrix: of questions (interaction included) and, beyond it, of seeds."""

    questions: Floats
    seeds: Floats
    doubt: Floats  # what the seed part adds to Satterthwaite's denominator


def _components(scores: Floats) -> _Components:
    """Split the variance of the grand mean of `scores` (..., S seeds, n questions), n > 1.

    With x[s, i] = mean + question[i] + seed[s] + noise[s, i], the spread of question means already holds the noise, and
    so does the spread of seed means: the seeds' own part is what exceeds it, and is at least 0.
    """
    seeds, n = scores.shape[-2:]
    questions = scores.mean(-2).var(-1, ddof=1) / n
    if seeds == 1:
        zero = np.zeros_like(questions)
        return _Components(questions, zero, zero)
    of_seeds = scores.mean(-1).var(-1, ddof=1) / seeds
    noise = scores - scores.mean(-1, keepdims=True)
    noise = noise - noise.mean(-2, keepdims=True)
    of_noise = (noise**2).sum((-1, -2)) / ((n - 1) * (seeds - 1)) / (n * seeds)
    excess = np.maximum(0.0, of_seeds - of_noise)
    return _Components(questions, excess, np.where(excess > 0, of_seeds**2 / (seeds - 1), 0.0))


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
    parts = _components(scores)
    variance = float(parts.questions + parts.seeds)
    most = n * samples_per_question * seeds
    effective = min(p * (1 - p) / variance, most) if variance > 0 else most
    # The n of a binary sample, not n - 1: one sample per question must give Wilson's interval to the last digit.
    if parts.seeds == 0:
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


def _resampled_means(values: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Return (..., resamples) means of `values` (..., n) over questions drawn with replacement, alike for all."""
    n = values.shape[-1]
    flat = values.reshape(-1, n)
    out = np.empty((flat.shape[0], resamples))
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        out[:, start : start + rows] = flat @ counts.T / n
    return out.reshape(*values.shape[:-1], resamples)


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


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike | None = None, *, resamples: int = 10_000, seed: int = 0
) -> Difference:
    """Return the mean difference over paired questions with its 95 % bootstrap interval and p-value.

    Questions are resampled in pairs. Training seeds are too few to resample (three have ten distinct resamples, whose
    spread is a third too small), so what they vary beyond noise is added as a normal draw, and the distribution is
    stretched about the difference by t / z, with Satterthwaite's degrees of freedom over both sources. Where every
    question gives the same difference a bootstrap knows no width; the share of unseen questions that could still differ
    (Wilson's bound for 0 of n) is used instead.

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
    ours, theirs = _components(a), _components(b)
    of_questions, of_seeds = paired.var(-1, ddof=1) / n, ours.seeds + theirs.seeds
    variance = of_questions + of_seeds
    with np.errstate(invalid="ignore", divide="ignore"):
        degrees = variance**2 / (of_questions**2 / (n - 1) + ours.doubt + theirs.doubt)
    # The degrees of a sum are never fewer than the fewest of its parts; the subtraction of noise could say so.
    fewest = min([n, *(arm.shape[-2] for arm in (a, b) if arm.shape[-2] > 1)]) - 1
    degrees = np.maximum(np.where(variance > 0, degrees, np.inf), fewest)

    # The bootstrap variance of a mean is (n - 1) / n of the unbiased one.
    deviation = (_resampled_means(paired, resamples, rng) - difference[..., None]) * math.sqrt(n / (n - 1))
    deviation += np.sqrt(of_seeds)[..., None] * rng.standard_normal(resamples)
    deviation.sort(-1)

    def bounds(alpha: Floats) -> tuple[Floats, Floats]:
        z = _normal_quantile(1 - alpha / 2)
        stretch = student_t_quantile(1 - alpha / 2, degrees) / z
        unseen = z * z / (n + z * z)  # wilson_interval(0, n)[1]
        flat = variance <= 1e-18
        low = np.where(flat, -unseen * (1 + difference), stretch * _sorted_quantile(deviation, alpha / 2))
        high = np.where(flat, unseen * (1 - difference), stretch * _sorted_quantile(deviation, 1 - alpha / 2))
        return np.clip(difference + low, -1, 1), np.clip(difference + high, -1, 1)

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


def _normal_quantile(probability: Floats) -> Floats:
    return np.asarray(np.vectorize(NORMAL.inv_cdf, otypes=[float])(probability))


def _sorted_quantile(ordered: Floats, probability: Floats) -> Floats:
    """Return the linearly interpolated quantile along the last axis of `ordered`, one probability per row."""
    position = probability * (ordered.shape[-1] - 1)
    left = np.minimum(position.astype(int), ordered.shape[-1] - 2)
    at = np.take_along_axis(ordered, left[..., None], -1)[..., 0]
    after = np.take_along_axis(ordered, left[..., None] + 1, -1)[..., 0]
    return np.asarray(at + (position - left) * (after - at))


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
