"""What the statistics promise, held against worlds in which the truth is known.

A world has questions of different difficulty, arms that like some questions more than others (all samples and seeds of
an arm share that), training seeds that turn out better or worse, and samples. Of 2000 comparisons in each, 93 to 97 %
of the 95 % intervals must hold the true difference, and at most 6 % may claim one where there is none.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from test_compare import SAMPLING, write_evaluation

from distill.compare import compare
from distill.statistics import paired_bootstrap, seed_sd

COMPARISONS, RESAMPLES, SAMPLES = 2000, 400, 4
DIFFICULTY, TASTE, LUCK = 1.5, 0.7, 0.3  # standard deviations in logits: of questions, of an arm's taste, of a seed
EFFECTS = {0.05: 0.04, 0.5: 0.05, 0.95: -0.04}
REGIMES = [(seeds, n, accuracy) for seeds in (1, 3) for n in (40, 500) for accuracy in EFFECTS]


@cache
def _spread(seeds: int) -> np.ndarray:
    """Return how far single answers lie from an arm's mean, in logits, over the whole population."""
    luck = LUCK if seeds > 1 else 0.0
    return np.random.default_rng(0).normal(0, np.sqrt(DIFFICULTY**2 + TASTE**2 + luck**2), 100_000)


@cache
def _centre(accuracy: float, seeds: int) -> float:
    """Return the mean logit of a method whose expected accuracy over questions and training runs is `accuracy`."""
    low, high = -20.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        below = (1 / (1 + np.exp(-middle - _spread(seeds)))).mean() < accuracy
        low, high = (middle, high) if below else (low, middle)
    return low


def simulated(
    seeds: int, n: int, first: float, second: float, *, samples: int = SAMPLES, world: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return two arms' (COMPARISONS, seeds, n) scores in a world where they have these accuracies."""
    rng = np.random.default_rng(world)
    difficulty = rng.normal(0, DIFFICULTY, (COMPARISONS, 1, n))

    def arm(accuracy: float) -> np.ndarray:
        taste = rng.normal(0, TASTE, (COMPARISONS, 1, n))
        luck = rng.normal(0, LUCK if seeds > 1 else 0.0, (COMPARISONS, seeds, 1))
        logits = _centre(accuracy, seeds) + difficulty + taste + luck
        return rng.binomial(samples, 1 / (1 + np.exp(-logits))) / samples

    return arm(first), arm(second)


@pytest.mark.parametrize(("seeds", "n", "accuracy"), REGIMES)
def test_without_a_difference_few_are_claimed(seeds: int, n: int, accuracy: float) -> None:
    got = paired_bootstrap(*simulated(seeds, n, accuracy, accuracy), resamples=RESAMPLES, seed=1)
    covered = float(np.mean((got.low <= 0) & (got.high >= 0)))
    assert 0.93 <= covered <= 0.97
    assert np.mean(got.p < 0.05) <= 0.06


@pytest.mark.parametrize(("seeds", "n", "accuracy"), REGIMES)
def test_a_true_difference_is_held_by_the_interval(seeds: int, n: int, accuracy: float) -> None:
    effect = EFFECTS[accuracy]
    got = paired_bootstrap(*simulated(seeds, n, accuracy + effect, accuracy, world=1), resamples=RESAMPLES, seed=1)
    covered = float(np.mean((got.low <= effect) & (got.high >= effect)))
    assert 0.93 <= covered <= 0.97


def test_arms_with_other_numbers_of_seeds_are_covered_too() -> None:
    many, _ = simulated(4, 120, 0.4, 0.4, world=2)
    _, few = simulated(2, 120, 0.4, 0.4, world=2)
    got = paired_bootstrap(many, few, resamples=RESAMPLES, seed=1)
    assert 0.93 <= float(np.mean((got.low <= 0) & (got.high >= 0))) <= 0.975


@pytest.mark.parametrize("wrong", ["samples as units", "seeds left out"])
def test_the_checks_fail_where_the_unit_is_wrong(wrong: str) -> None:
    """The same worlds, judged as one should not: the checks above can fail, and do."""
    a, b = simulated(3, 500, 0.5, 0.5)
    if wrong == "samples as units":
        error = np.sqrt((a * (1 - a) + b * (1 - b)).mean((1, 2)) / a[0].size / SAMPLES)
    else:
        error = (a.mean(1) - b.mean(1)).std(-1, ddof=1) / np.sqrt(a.shape[-1])
    assert np.mean(np.abs((a - b).mean((1, 2))) > 1.96 * error) > 0.1


def test_the_spread_of_seeds_is_found() -> None:
    """On average over worlds: one world's three seeds say little."""
    rng = np.random.default_rng(0)
    shares = rng.normal(0.5, 0.08, (400, 3, 1))
    scores = (rng.random((400, 3, 300)) < shares).astype(float)
    found = np.sqrt(np.mean([seed_sd(each) ** 2 for each in scores]))
    assert found == pytest.approx(0.08, rel=0.1)
    assert seed_sd(scores[0, :1]) is None


def test_a_copy_of_an_arm_is_no_difference(tmp_path: Path) -> None:
    """One model, sampled again and again under other seeds: real folders, compared in pairs as a user would."""
    rng = np.random.default_rng(0)
    chance = 1 / (1 + np.exp(-rng.normal(0, 2, (25, 1))))
    runs = 200
    folders = [
        write_evaluation(
            tmp_path / str(seed), (rng.random((25, 2)) < chance).astype(int), sampling={**SAMPLING, "seed": seed}
        )
        for seed in range(runs)
    ]
    alike = 0
    for one, two in zip(folders[::2], folders[1::2], strict=True):
        verdict = compare([one, two], tmp_path / "out")["verdict"]
        alike += verdict.startswith("no detectable difference between ")
    assert alike >= 0.94 * runs / 2
