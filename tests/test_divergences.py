"""Every divergence in the table: non-negative, zero at equality, coarsening, gradients, behaviour at probability 0.

And each against its own closed forms, and the KLs and JSD against torch.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distill.divergences import (
    COARSENING,
    DIVERGENCES,
    HEAD,
    adaptive_kl,
    alpha_beta,
    entropy,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    tvd,
)
from distill.errors import UserError

ALL = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
INF = float("inf")

# Their value is +inf when one side excludes what the other allows.
UNBOUNDED = {forward_kl, reverse_kl, adaptive_kl}
# Part of their formula is a constant to the gradient, so theirs is not the derivative of their value.
WITH_CONSTANTS = {adaptive_kl}


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


def merged(row: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(row.unflatten(-1, (-1, 2)), -1)


@pytest.mark.parametrize("name", sorted(COARSENING))
@given(pair=logp_pairs(outcomes=6))
def test_merging_outcomes_never_increases_those_that_say_so(name, pair):
    student, teacher = pair
    assert DIVERGENCES[name](merged(student), merged(teacher)) <= DIVERGENCES[name](student, teacher) + 1e-9


@pytest.mark.parametrize("name", sorted(DIVERGENCES.keys() - COARSENING))
def test_merging_outcomes_increases_the_others_somewhere(name):
    compare = partial(DIVERGENCES[name], **{"alpha_beta": {"alpha": 1, "beta": 1}}.get(name, {}))
    rows = torch.randn(2, 1000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student, teacher = (3 * rows).log_softmax(-1)
    assert (compare(merged(student), merged(teacher)) > compare(student, teacher) + 1e-3).any()


@given(pair=logp_pairs(outcomes=6), powers=st.tuples(st.floats(0.01, 0.5), st.floats(0.01, 0.5)))
def test_merging_outcomes_never_increases_alpha_beta_with_powers_that_add_up_to_one_at_most(pair, powers):
    compare = partial(alpha_beta, alpha=powers[0], beta=powers[1])
    for rest in (compare, partial(compare, beta=1 - powers[0])):
        whole = rest(*pair)
        assert rest(*map(merged, pair)) <= whole * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("divergence", [f for f in DIVERGENCES.values() if f not in WITH_CONSTANTS])
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
    nearly = (exact + 1e-250) / (exact + 1e-250).sum(-1, keepdim=True)  # tiny, as a power of it is to be tiny too
    for student, teacher in ((0, 1), (1, 0)):
        row = exact.log().requires_grad_(True)
        value = divergence(row[student], row[teacher])
        if value == INF:
            assert divergence in UNBOUNDED
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kl_is_infinite_even_where_the_allowed_probability_rounds_to_zero(dtype):
    allowed, excluded = torch.tensor([0.0, -2000.0], dtype=dtype), torch.tensor([0.0, -INF], dtype=dtype)
    assert forward_kl(excluded, allowed) == INF
    assert reverse_kl(allowed, excluded) == INF


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


@given(pair=logp_pairs(), weight=st.floats(0.01, 0.99))
def test_jsd_and_its_gradient_agree_with_torch(pair, weight):
    student, teacher = pair[0].clone().requires_grad_(), pair[1]
    mixture = torch.logsumexp(torch.stack([student + math.log(1 - weight), teacher + math.log(weight)]), 0)
    to_teacher, to_student = (
        torch.nn.functional.kl_div(mixture, row, log_target=True, reduction="sum") for row in (teacher, student)
    )
    reference = weight * to_teacher + (1 - weight) * to_student
    value = jsd(student, teacher, weight=weight)
    torch.testing.assert_close(value, reference, atol=1e-12, rtol=1e-9)
    (expected,), (gradient,) = (torch.autograd.grad(total, student) for total in (reference, value))
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-9)


@given(pair=logp_pairs())
def test_jsd_tends_to_a_share_of_a_kl_at_both_ends_of_its_weight(pair):
    # Divided by 3 no ratio of probabilities is above 9 exp(10), so the share's second-order term is below its 0.2 %.
    student, teacher = ((row / 3).log_softmax(-1) for row in pair)
    share = 1e-8
    near_0, near_1 = jsd(student, teacher, weight=share), jsd(student, teacher, weight=1 - share)
    torch.testing.assert_close(near_0 / share, forward_kl(student, teacher), atol=1e-6, rtol=2e-3)
    torch.testing.assert_close(near_1 / share, reverse_kl(student, teacher), atol=1e-6, rtol=2e-3)


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
    with pytest.raises(UserError, match="strictly between 0 and 1"):
        adaptive_kl(row, row, head_mass=value)


@given(pair=logp_pairs())
def test_alpha_beta_tends_to_the_kls_and_meets_hellinger_and_euclid(pair):
    student, teacher = pair
    forward, reverse = alpha_beta(*pair, alpha=1, beta=1e-7), alpha_beta(*pair, alpha=1e-7, beta=1)
    torch.testing.assert_close(forward, forward_kl(*pair), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reverse, reverse_kl(*pair), atol=1e-4, rtol=1e-4)
    hellinger = 2 * ((student / 2).exp() - (teacher / 2).exp()).square().sum()
    torch.testing.assert_close(alpha_beta(*pair, alpha=0.5, beta=0.5), hellinger, atol=1e-12, rtol=1e-9)
    euclid = (student.exp() - teacher.exp()).square().sum() / 2
    torch.testing.assert_close(alpha_beta(*pair, alpha=1, beta=1), euclid, atol=1e-12, rtol=1e-9)
    mirrored = alpha_beta(teacher, student, alpha=0.3, beta=1.2)
    torch.testing.assert_close(alpha_beta(*pair, alpha=1.2, beta=0.3), mirrored, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("option", ["alpha", "beta"])
@pytest.mark.parametrize("value", [0.0, -0.5, INF, float("nan")])
def test_alpha_beta_refuses_powers_that_make_it_infinite_or_undefined(option, value):
    with pytest.raises(UserError, match=f"{option} must be positive"):
        alpha_beta(torch.zeros(1), torch.zeros(1), **{option: value})


def shares_by_hand(student: list[float], teacher: list[float], head_mass: float) -> tuple[float, float]:
    head, tail, mass = 0.0, 0.0, 0.0
    for rank, i in enumerate(sorted(range(len(teacher)), key=lambda i: -teacher[i])):
        mass += teacher[i]
        if rank == 0 or mass <= head_mass:
            head += abs(student[i] - teacher[i])
        else:
            tail += abs(student[i] - teacher[i])
    return (head / (head + tail), tail / (head + tail)) if head + tail else (0.0, 0.0)


def check_adaptive_kl(student: torch.Tensor, teacher: torch.Tensor, head_mass: float) -> None:
    logp = student.clone().requires_grad_()
    head, tail = shares_by_hand(student.exp().tolist(), teacher.exp().tolist(), head_mass)
    expected = head * forward_kl(logp, teacher) + tail * reverse_kl(logp, teacher)
    value = adaptive_kl(logp, teacher, head_mass=head_mass)
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-9)
    (wanted,), (gradient,) = (torch.autograd.grad(total, logp) for total in (expected, value))
    torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=1e-9)


@given(pair=logp_pairs())
def test_adaptive_kl_weighs_the_kls_by_hand_and_takes_the_weights_as_constants(pair):
    assume(len(set(pair[1].tolist())) == len(pair[1]))  # of equal ones any may be in the head
    check_adaptive_kl(*pair, head_mass=0.4321)


def test_adaptive_kl_finds_a_head_of_many_outcomes():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4 * HEAD, dtype=torch.float64, generator=generator).log_softmax(-1)
    check_adaptive_kl(student, teacher, head_mass=0.9)


def test_adaptive_kl_at_equality_has_value_and_gradient_zero():
    teacher = torch.tensor([0.5, 0.25, 0.25, 0.0]).log()
    student = teacher.clone().requires_grad_()
    value = adaptive_kl(student, teacher)
    value.backward()
    assert value == 0
    assert (student.grad == 0).all()


def test_adaptive_kl_leaves_out_an_infinite_kl_whose_part_has_no_gap():
    teacher = torch.tensor([0.5, 0.25, 0.25, 0.0]).log()  # the head is the first, where both agree
    student = torch.tensor([0.5, 0.5, 0.0, 0.0]).log().requires_grad_()
    value = adaptive_kl(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0.5 * math.log(2))
    assert student.grad.isfinite().all()


@settings(max_examples=20)
@given(size=st.integers(1, 50))
def test_entropy_of_a_uniform_row_with_zeros(size):
    row = torch.cat([torch.full((size,), -math.log(size)), torch.tensor([-INF])])
    assert entropy(row) == pytest.approx(math.log(size), abs=1e-5)
