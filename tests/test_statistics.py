"""The statistics against closed forms, brute force and published examples; what they promise is in test_simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distill.statistics import (
    accuracy_interval,
    components,
    holm,
    mean_and_stderr,
    minimum_detectable_effect,
    paired_bootstrap,
    paired_t,
    pass_at_k,
    seed_sd,
    significance,
    student_t_quantile,
    student_t_tail,
    wilcoxon_signed_rank,
    wilson_interval,
)

Z = 1.959963984540054


def test_mean_and_stderr_closed_form() -> None:
    mean, error = mean_and_stderr([0.0, 1.0, 1.0, 1.0])
    assert mean == 0.75
    assert error == pytest.approx(math.sqrt(0.75 * 0.25 * 4 / 3 / 4))
    assert math.isnan(mean_and_stderr([1.0])[1])
    with pytest.raises(ValueError, match="per question"):
        mean_and_stderr([])


def test_t_quantiles_are_the_tables() -> None:
    degrees = [1, 2, 4, 10, 30, 120, 1e5]
    table = [12.7062047, 4.30265273, 2.77644511, 2.22813885, 2.04227246, 1.97993041, 1.95998767]
    assert student_t_quantile(0.975, degrees) == pytest.approx(table, abs=1e-6)
    # t with one degree is Cauchy, with two it is algebraic.
    for p in (0.6, 0.9, 0.999, 0.9999):
        assert student_t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
        assert student_t_quantile(p, 2) == pytest.approx((2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p))), rel=1e-9)


@example(0.9921875, 10001.0)
@given(st.floats(0.51, 0.9999), st.floats(1, 2e4))
def test_t_tails_invert_the_quantiles(probability: float, degrees: float) -> None:
    value = float(student_t_quantile(probability, degrees))
    assert student_t_tail(value, degrees) == pytest.approx(1 - probability, rel=1e-3, abs=1e-9)


def test_paired_t_published_example() -> None:
    """Student's own sleep data (1908): ten patients, two drugs; t = 4.0621 with 9 degrees, two-sided p = 0.002833."""
    first = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    second = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    assert paired_t(second - first) == pytest.approx(0.00283289, rel=1e-5)
    assert paired_t(first - second) == paired_t(second - first)


def test_paired_t_without_spread() -> None:
    assert paired_t(np.zeros(5)) == 1.0
    assert paired_t(np.full(5, 0.3)) == 0.0
    with pytest.raises(ValueError, match="at least two"):
        paired_t([0.5])


def test_seed_sd_by_hand() -> None:
    """Every question alike within a seed: no noise, so the spread of the seeds is theirs alone."""
    assert seed_sd(np.repeat([[0.5], [0.6], [0.7]], 50, axis=1)) == pytest.approx(0.1)
    assert seed_sd(np.tile([0.0, 1.0], (3, 20))) == 0.0
    assert seed_sd(np.ones((1, 20))) is None


def test_a_seed_effect_below_noise_in_one_arm_is_set_off_by_the_other() -> None:
    """What is cut off at 0 is the sum over both arms, not each: seeds that lie too close together count as well."""
    rng = np.random.default_rng(0)
    far = (rng.random((3, 60)) < np.array([[0.4], [0.5], [0.6]])).astype(float)
    near = np.array([np.roll(np.tile([0.0, 1.0], 30), s) for s in range(3)])  # equal means, though samples vary
    got, alone = paired_bootstrap(far, near), paired_bootstrap(far, near[:1])
    parts = [components(each) for each in (far, near)]
    assert parts[1].excess < 0 < parts[0].excess
    expected = (far.mean(0) - near.mean(0)).var(ddof=1) / 60 + max(0.0, parts[0].excess + parts[1].excess)
    assert float(got.stderr) == pytest.approx(expected**0.5)
    assert float(alone.stderr) > 0


def test_wilson_published_example_and_edges() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(0, 500) == pytest.approx((0.0, Z**2 / (500 + Z**2)))
    assert wilson_interval(500, 500) == pytest.approx((500 / (500 + Z**2), 1.0))
    with pytest.raises(ValueError, match="proportion"):
        wilson_interval(3, 2)


@given(st.integers(2, 300), st.data())
def test_one_sample_per_question_is_wilson(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    scores = np.arange(n) < right
    assert accuracy_interval(scores) == pytest.approx(wilson_interval(right, n), abs=1e-9)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_accuracy_interval_holds_the_mean_and_stays_in_range(counts: list[int]) -> None:
    scores = np.array(counts) / 4
    low, high = accuracy_interval(scores, samples_per_question=4)
    assert 0.0 <= low <= scores.mean() + 1e-12
    assert scores.mean() - 1e-12 <= high <= 1.0
    assert high - low > 0.001
    assert accuracy_interval(1 - scores, samples_per_question=4) == pytest.approx((1 - high, 1 - low))


def test_samples_that_copy_each_other_add_no_certainty() -> None:
    scores = np.random.default_rng(0).random(200) < 0.4
    low, high = accuracy_interval(scores)
    copied = accuracy_interval(scores.astype(float), samples_per_question=8)
    assert copied == pytest.approx((low, high))
    independent = accuracy_interval(np.random.default_rng(0).binomial(8, 0.4, 200) / 8, samples_per_question=8)
    assert independent[1] - independent[0] < 0.5 * (high - low)


def test_seeds_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    alike = (rng.random((3, 400)) < 0.5).astype(float)
    apart = (rng.random((3, 400)) < np.array([[0.3], [0.5], [0.7]])).astype(float)
    narrow, wide = accuracy_interval(alike), accuracy_interval(apart)
    assert wide[1] - wide[0] > 4 * (narrow[1] - narrow[0])


@given(st.integers(1, 7), st.data())
def test_pass_at_k_counts_subsets(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations(range(n), k))
    assert pass_at_k(n, c, k) == sum(any(i < c for i in s) for s in subsets) / len(subsets)


def test_pass_at_k_large_and_refusals() -> None:
    assert pass_at_k(10_000, 1, 5_000) == 0.5
    with pytest.raises(ValueError, match="k <= n"):
        pass_at_k(4, 2, 5)


def test_paired_bootstrap_is_close_to_student_where_both_apply() -> None:
    d = np.random.default_rng(3).normal(0.1, 0.3, 40).clip(-1, 1)
    mean, error = mean_and_stderr(d)
    got = paired_bootstrap(d)
    assert float(got.difference) == pytest.approx(mean)
    assert float(got.stderr) == pytest.approx(error)
    assert float(got.low) == pytest.approx(mean - 2.0227 * error, abs=0.15 * error)
    assert float(got.high) == pytest.approx(mean + 2.0227 * error, abs=0.15 * error)


def test_paired_bootstrap_with_seed_effect_only_is_welch() -> None:
    """Every question alike within a seed: nothing but three seeds' means, for which Student's interval is exact."""
    a = np.repeat([[0.5], [0.6], [0.7]], 50, axis=1)
    b = np.repeat([[0.1], [0.2], [0.3]], 50, axis=1)
    got = paired_bootstrap(a, b)
    error = math.sqrt(2 * 0.1**2 / 3)
    assert float(got.stderr) == pytest.approx(error)
    assert float(got.high - got.low) == pytest.approx(2 * 2.7764 * error, rel=0.04)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_constant_differences_keep_a_width(value: float) -> None:
    got = paired_bootstrap(np.full(500, value))
    bound = Z**2 / (500 + Z**2)
    assert float(got.low) == pytest.approx(max(-1.0, value - bound * (1 + value)))
    assert float(got.high) == pytest.approx(min(1.0, value + bound * (1 - value)))
    assert (got.p < 0.05) == (value != 0)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=2, max_size=40), st.integers(0, 5))
def test_interval_and_p_value_agree_and_mirror(values: list[float], seed: int) -> None:
    got = paired_bootstrap(values, resamples=400, seed=seed)
    assert got.low <= got.difference <= got.high
    assert bool(got.low > 0 or got.high < 0) == bool(got.p < 0.05)
    assert paired_bootstrap(values, resamples=400, seed=seed).low == got.low
    mirrored = paired_bootstrap(-np.array(values), resamples=400, seed=seed)
    assert float(mirrored.low) == pytest.approx(-float(got.high), abs=1e-9)


def test_paired_bootstrap_refuses_unpaired() -> None:
    with pytest.raises(ValueError, match="paired"):
        paired_bootstrap(np.zeros(4), np.zeros(5))


def test_wilcoxon_published_example() -> None:
    """Darwin's Zea mays heights, as in the usual textbook example: T = 24, exact two-sided p = 0.0413."""
    heights = [6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75]
    assert wilcoxon_signed_rank(heights) == pytest.approx(0.041259765625)


@settings(max_examples=50)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_wilcoxon_counts_all_signs(values: list[int]) -> None:
    kept = np.array([v for v in values if v])
    if kept.size == 0:
        assert wilcoxon_signed_rank(values) == 1.0
        return
    ranks = np.array([(np.abs(kept) < abs(v)).sum() + ((np.abs(kept) == abs(v)).sum() + 1) / 2 for v in kept])
    centre = ranks.sum() / 2
    seen = abs(ranks[kept > 0].sum() - centre)
    signs = itertools.product([False, True], repeat=kept.size)
    extreme = [abs(ranks[list(s)].sum() - centre) >= seen - 1e-9 for s in signs]
    assert wilcoxon_signed_rank(np.array(values) / 4) == pytest.approx(min(1.0, np.mean(extreme)))


def test_wilcoxon_normal_approximation_meets_the_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    d = np.random.default_rng(0).integers(-3, 5, 45)
    exact = wilcoxon_signed_rank(d)
    monkeypatch.setattr(significance, "EXACT_WILCOXON", 0)
    assert wilcoxon_signed_rank(d) == pytest.approx(exact, rel=0.05)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_lies_between_raw_and_bonferroni_and_keeps_order(p: list[float]) -> None:
    adjusted = holm(p)
    for raw, corrected in zip(p, adjusted, strict=True):
        assert raw <= corrected <= min(1.0, len(p) * raw) + 1e-12
    assert [adjusted[i] for i in np.argsort(p, kind="stable")] == sorted(adjusted)


def test_minimum_detectable_effect_is_found_four_times_in_five() -> None:
    assert minimum_detectable_effect(0.5, 100) == pytest.approx(2.8015852 * 0.05)
    effect = minimum_detectable_effect(0.3, 80)
    d = np.random.default_rng(0).normal(effect, 0.3, (1000, 1, 80))
    found = paired_bootstrap(d, np.zeros((1000, 1, 80)), resamples=500).p < 0.05
    assert 0.76 <= found.mean() <= 0.84
