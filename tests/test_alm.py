"""ALM: a binary cross-entropy of chunks' likelihoods, exact at both ends, still where the two sides agree."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.byte_view import ByteView
from align.kernels.chain import span_sums
from align.kernels.pooling import log1mexp
from align.methods.alm import DIVERGENCES, alm, begins_word, boundary_logp, joined_spans
from distill.divergences import forward_kl
from distill.errors import UserError

EACH = pytest.mark.parametrize("divergence", DIVERGENCES)
LIKELIHOODS = st.lists(st.tuples(st.floats(-80, 0), st.floats(-80, 0)), min_size=1, max_size=6)


def both(pairs: list[tuple[float, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    return student.clone().requires_grad_(), teacher


@given(pairs=LIKELIHOODS, tau=st.sampled_from([1.0, 10.0, 100.0]))
def test_it_is_the_binary_cross_entropy_of_two_coins(pairs, tau):
    student, teacher = both(pairs)
    coins = [(side / tau - 1e-6).exp() for side in (student.detach(), teacher)]
    reference = torch.nn.functional.binary_cross_entropy(*coins, reduction="none")
    # torch's own stops its logarithms at -100.
    near = coins[0] > 1e-40
    torch.testing.assert_close(alm(student, teacher, tau=tau)[near], reference[near], atol=1e-8, rtol=1e-6)


@given(pairs=LIKELIHOODS, tau=st.sampled_from([1.0, 100.0]))
def test_the_kl_is_that_of_two_outcomes_and_has_the_same_gradient(pairs, tau):
    student, teacher = both(pairs)
    value = alm(student, teacher, divergence="binary_kl", tau=tau)
    coins = [torch.stack([side / tau - 1e-6, log1mexp(side / tau - 1e-6)], -1) for side in (student, teacher)]
    torch.testing.assert_close(value, forward_kl(*coins), atol=1e-9, rtol=1e-6)
    assert (value > -1e-9).all()
    slopes = [torch.autograd.grad(alm(student, teacher, divergence=d, tau=tau).sum(), student)[0] for d in DIVERGENCES]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_at_equality_both_are_still_and_only_the_kl_is_zero(dtype):
    """Invariant 1, in the form that holds: the cross-entropy's value there is the entropy of the teacher's coin."""
    logp = torch.tensor([-0.01, -1.0, -30.0], dtype=dtype)
    student = logp.clone().requires_grad_()
    cross, kl = (alm(student, logp, divergence=divergence) for divergence in DIVERGENCES)
    assert kl.abs().max() < 1e-7
    p = (logp.to(cross.dtype) / 100 - 1e-6).exp()
    torch.testing.assert_close(cross.detach(), -(p * p.log() + (1 - p) * (1 - p).log()), atol=1e-6, rtol=1e-3)
    assert (cross > 1e-4).all()
    for value in (cross, kl):
        assert torch.autograd.grad(value.sum(), student)[0].abs().max() < 1e-5


def test_the_gradient_is_that_of_the_value_and_the_student_learns_alone():
    student = torch.tensor([-0.5, -3.0, -20.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-1.0, -0.1, -5.0], dtype=torch.float64, requires_grad=True)
    for divergence in DIVERGENCES:
        assert torch.autograd.gradcheck(
            lambda s, d=divergence: alm(s, teacher.detach(), divergence=d, tau=2.0), student
        )
        assert torch.autograd.grad(alm(student, teacher, divergence=divergence).sum(), teacher, allow_unused=True) == (
            None,
        )


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_certain_and_all_but_impossible_chunks_are_finite(divergence, dtype):
    ends = torch.tensor([0.0, -1e-8, -60000.0, 0.0, -60000.0], dtype=dtype, requires_grad=True)
    others = torch.tensor([-60000.0, 0.0, 0.0, 0.0, -math.inf], dtype=dtype)
    for tau in (100.0,) if dtype == torch.float16 else (1.0, 100.0):  # at 1 the slope at certainty is 1 / margin = 1e6
        value = alm(ends, others, divergence=divergence, tau=tau)
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), ends)[0].isfinite().all()


@EACH
def test_what_the_student_excludes_is_infinite_unless_the_teacher_does_too(divergence):
    never = torch.full((2,), -math.inf, requires_grad=True)
    value = alm(never, torch.tensor([-1.0, -math.inf]), divergence=divergence)
    assert value.tolist() == [math.inf, 0.0]
    assert not torch.autograd.grad(value[1], never)[0].isnan().any()


@given(
    masses=st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=3, max_size=6), chunk=st.integers(0, 2)
)
def test_a_chunk_against_all_else_is_a_lower_bound_of_the_whole_divergence(masses, chunk):
    logp = torch.tensor(masses, dtype=torch.float64).log().log_softmax(0)
    value = alm(*logp[chunk].unbind(-1), divergence="binary_kl", tau=1.0, margin=1e-12)
    assert -1e-9 <= value <= forward_kl(*logp.unbind(-1)) + 1e-9


@EACH
def test_half_the_students_likelihood_changes_the_loss(divergence):
    student, teacher = torch.tensor([-0.1, -4.0]), torch.tensor([-0.3, -2.0])
    whole, half = (alm(student - gone, teacher, divergence=divergence) for gone in (0.0, math.log(2)))
    assert ((whole - half).abs() > 1e-5).all()


@EACH
def test_certain_models_score_zero_unless_a_row_off(divergence):
    rows = torch.full((4, 3), -1e3).scatter(1, torch.tensor([[0], [2], [1], [0]]), 0.0)
    span, drawn = torch.tensor([0, 1, 1]), torch.tensor([0, 2, 1])
    right, late = (span_sums(part.log_softmax(-1)[torch.arange(3), drawn], span, 2) for part in (rows[:3], rows[1:]))
    assert alm(right, right, divergence=divergence).max() < 2e-5
    assert (alm(late, right, divergence=divergence) > 5).all()


def test_a_boundary_multiplies_each_sides_likelihood():
    student, teacher = torch.tensor([-0.5, -3.0], requires_grad=True), torch.tensor([-1.0, -2.0])
    ends = torch.tensor([-0.2, -0.7], requires_grad=True), torch.tensor([-0.1, -1.7])
    value = alm(student, teacher, student_boundary=ends[0], teacher_boundary=ends[1])
    torch.testing.assert_close(value, alm(student + ends[0], teacher + ends[1]))
    slopes = torch.autograd.grad(value.sum(), [student, ends[0]])
    torch.testing.assert_close(*slopes)
    # Both say the same of the text, one of them sure that the word ends there: debiased, they differ no more.
    sure, unsure = torch.tensor([-2.0]), torch.tensor([-1.5])
    debiased = alm(
        sure,
        unsure,
        divergence="binary_kl",
        student_boundary=torch.tensor([0.0]),
        teacher_boundary=torch.tensor([-0.5]),
    )
    assert debiased < 1e-7 < alm(sure, unsure, divergence="binary_kl")


def test_the_chance_of_a_boundary_is_that_of_white_space_and_the_end():
    view = ByteView((b" a", b"a", b"\n", None, b"\xc2\xa0", b""), {3: "</s>"}, "byte-level", False)
    assert begins_word(view, stops=[3]).tolist() == [True, False, True, True, False, False]
    with pytest.raises(UserError, match="white space"):
        begins_word(ByteView((b"a", None), {}, "byte-level", False))
    logp = torch.randn(3, 8, dtype=torch.float64).log_softmax(-1)
    found = boundary_logp(logp, begins_word(view, stops=[3]))
    torch.testing.assert_close(found, logp.exp()[:, [0, 2, 3]].sum(-1).log())


@given(
    ends=st.lists(st.tuples(st.floats(0.01, 1), st.booleans()), min_size=1, max_size=8),
    least=st.sampled_from([0.1, 0.5]),
)
def test_chunks_with_unlikely_ends_are_joined_with_the_next_of_their_text(ends, least):
    boundary = torch.tensor([chance for chance, _ in ends], dtype=torch.float64).log()
    sequence = torch.tensor([begins for _, begins in ends]).long().cumsum(0)
    expected = [0]
    for place in range(1, len(ends)):
        alone = ends[place - 1][0] >= least or ends[place][1]
        expected.append(expected[-1] + alone)
    near = [abs(chance - least) < 1e-9 for chance, _ in ends]
    assert any(near) or joined_spans(boundary, sequence, least=least).tolist() == expected


@given(x=st.floats(-700, -1e-12))
def test_log1mexp_keeps_every_digit(x):
    given_ = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = log1mexp(given_)
    exact = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
    assert value.item() == pytest.approx(exact, rel=1e-12, abs=0)
    (slope,) = torch.autograd.grad(value, given_)
    assert float(slope) == pytest.approx(math.exp(x) / math.expm1(x), rel=1e-9, abs=0)


def test_log1mexp_of_certainty_is_minus_infinity_without_a_slope():
    ends = torch.tensor([0.0, -math.inf], requires_grad=True)
    value = log1mexp(ends)
    assert value.tolist() == [-math.inf, 0.0]
    assert torch.autograd.grad(value[1], ends)[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"divergence": "kl"}, "binary_ce"),
        ({"tau": 0.0}, "positive"),
        ({"margin": 0.0}, "positive"),
        ({"student_boundary": torch.zeros(1)}, "both sides"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        alm(torch.zeros(1), torch.zeros(1), **options)
