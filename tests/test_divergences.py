"""Every divergence in the table: non-negative, zero at equality, coarsening, gradients, behaviour at probability 0."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.divergences import DIVERGENCES, entropy, forward_kl, jsd, reverse_kl, skew_forward_kl, skew_reverse_kl, tvd
from distill.errors import UserError

ALL = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
INF = float("inf")


@st.composite
def logp_pairs(draw: st.DrawFn, outcomes: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    size = outcomes or draw(st.integers(2, 9))
    logits = st.lists(st.floats(-15, 15), min_size=size, max_size=size)
    rows = torch.tensor([draw(logits), draw(logits)], dtype=torch.float64).log_softmax(-1)
    return rows[0], rows[1]


@ALL
@given(pair=logp_pairs())
def test_is_non_negative_and_zero_at_equality(divergence, pair):
    student, teacher = pair
    assert divergence(student, teacher) >= -1e-12
    assert abs(divergence(teacher, teacher)) < 1e-12


@ALL
@given(pair=logp_pairs(outcomes=6))
def test_merging_outcomes_never_increases_it(divergence, pair):
    merged = [torch.logsumexp(row.view(3, 2), -1) for row in pair]
    assert divergence(*merged) <= divergence(*pair) + 1e-9


@ALL
def test_gradients_match_finite_differences(divergence):
    torch.manual_seed(0)
    logits = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: divergence(a.log_softmax(-1), b.log_softmax(-1)), logits)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outcomes_impossible_for_both_change_nothing(divergence, dtype):
    torch.manual_seed(0)
    short = torch.randn(2, 4, 5, dtype=dtype)
    padded = torch.cat([short, torch.full((2, 4, 3), -INF, dtype=dtype)], -1)
    for logits in (short, padded):
        logits.requires_grad_(True)
    plain, with_zeros = (divergence(*logits.log_softmax(-1)) for logits in (short, padded))
    torch.testing.assert_close(with_zeros, plain)
    plain.sum().backward()
    with_zeros.sum().backward()
    torch.testing.assert_close(padded.grad[..., :5], short.grad)
    assert (padded.grad[..., 5:] == 0).all()


@ALL
def test_rows_with_zeros_on_either_side_have_the_limit_as_value(divergence):
    exact = torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.3, 0.7, 0.0, 0.0]], dtype=torch.float64)
    nearly = (exact + 1e-13) / (exact + 1e-13).sum(-1, keepdim=True)
    for student, teacher in ((0, 1), (1, 0)):
        row = exact.log().requires_grad_(True)
        value = divergence(row[student], row[teacher])
        if value == INF:
            assert divergence in (forward_kl, reverse_kl)
            continue
        torch.testing.assert_close(value, divergence(nearly[student].log(), nearly[teacher].log()), atol=1e-10, rtol=0)
        value.backward()
        assert row.grad.isfinite().all()


def test_a_kl_is_infinite_exactly_where_the_mathematics_says():
    half, all_first = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert forward_kl(all_first, half) == INF
    assert reverse_kl(half, all_first) == INF
    assert forward_kl(half, all_first) == pytest.approx(math.log(2))
    assert reverse_kl(all_first, half) == pytest.approx(math.log(2))


@given(pair=logp_pairs())
def test_kls_agree_with_torch(pair):
    student, teacher = pair
    reference = torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="sum")
    torch.testing.assert_close(forward_kl(student, teacher), reference, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(reverse_kl(teacher, student), reference, atol=1e-10, rtol=1e-9)


@given(pair=logp_pairs(), weight=st.floats(0.01, 0.99))
def test_jsd_is_the_entropy_gap_of_the_mixture(pair, weight):
    student, teacher = pair
    mixture = (weight * teacher.exp() + (1 - weight) * student.exp()).log()
    gap = entropy(mixture) - weight * entropy(teacher) - (1 - weight) * entropy(student)
    torch.testing.assert_close(jsd(student, teacher, weight=weight), gap, atol=1e-10, rtol=1e-7)
    torch.testing.assert_close(jsd(student, teacher, weight=weight), jsd(teacher, student, weight=1 - weight))


def test_jsd_goes_to_zero_at_both_ends_of_its_weight():
    student, teacher = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(
        -1
    )
    values = [jsd(student, teacher, weight=w).item() for w in (1e-6, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-6)]
    assert values[0] < 1e-5 < values[1] < values[2] > values[3] > 1e-5 > values[4]


def test_tvd_of_disjoint_rows_is_one():
    assert tvd(torch.tensor([0.4, 0.6, 0.0]).log(), torch.tensor([0.0, 0.0, 1.0]).log()) == pytest.approx(1.0)


@given(pair=logp_pairs(), alpha=st.floats(0.01, 0.99))
def test_skew_kls_are_bounded_and_are_plain_kls_to_a_mixture(pair, alpha):
    student, teacher = pair
    towards_student = (alpha * teacher.exp() + (1 - alpha) * student.exp()).log()
    towards_teacher = ((1 - alpha) * teacher.exp() + alpha * student.exp()).log()
    forward, reverse = skew_forward_kl(student, teacher, alpha=alpha), skew_reverse_kl(student, teacher, alpha=alpha)
    torch.testing.assert_close(forward, forward_kl(towards_student, teacher), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(reverse, reverse_kl(student, towards_teacher), atol=1e-9, rtol=1e-7)
    assert max(forward, reverse) <= -math.log(alpha) + 1e-9


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5])
def test_mixing_weights_outside_the_open_interval_are_refused(value):
    row = torch.zeros(1)
    with pytest.raises(UserError, match="strictly between 0 and 1"):
        jsd(row, row, weight=value)
    for skewed in (skew_forward_kl, skew_reverse_kl):
        with pytest.raises(UserError, match="strictly between 0 and 1"):
            skewed(row, row, alpha=value)


@settings(max_examples=20)
@given(size=st.integers(1, 50))
def test_entropy_of_a_uniform_row_with_zeros(size):
    row = torch.cat([torch.full((size,), -math.log(size)), torch.tensor([-INF])])
    assert entropy(row) == pytest.approx(math.log(size), abs=1e-5)
