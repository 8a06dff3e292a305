"""The supports: two comparable rows, whatever the models' padding, and however little of the teacher is known."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from distill.batch import TeacherRows
from distill.divergences import COARSENING, DIVERGENCES, NEVER, forward_kl
from distill.errors import UserError
from distill.supports import (
    STORED,
    TAIL_FLOOR,
    corrected_outcomes,
    dense,
    sampled,
    sampled_outcomes,
    sampled_target_corrected,
    stored_support,
    top_k_with_tail,
)


def test_padding_of_either_model_takes_no_probability():
    torch.manual_seed(0)
    tokens = torch.randn(2, 4, 11)
    student = torch.cat([tokens[0], torch.full((4, 5), 30.0)], -1)  # padding rows may hold anything
    teacher = torch.cat([tokens[1], torch.randn(4, 2)], -1)
    rows = dense(student, teacher, num_outcomes=11)
    torch.testing.assert_close(rows[0], tokens[0].log_softmax(-1))
    torch.testing.assert_close(rows[1], tokens[1].log_softmax(-1))


def test_equal_models_of_different_padding_have_divergence_zero():
    torch.manual_seed(0)
    logits = torch.randn(4, 20) - 10
    rows = dense(logits, torch.cat([logits, torch.zeros(4, 8)], -1), num_outcomes=20)
    assert forward_kl(*rows).abs().max() < 1e-6


def test_each_side_has_its_own_temperature():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 6)
    rows = dense(student, teacher, num_outcomes=6, student_temperature=2.0, teacher_temperature=0.5)
    torch.testing.assert_close(rows[0], (student / 2).log_softmax(-1))
    torch.testing.assert_close(rows[1], (teacher * 2).log_softmax(-1))


def test_low_precision_is_upcast_before_the_softmax_and_float64_is_kept():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    low, high = dense(logits.bfloat16(), logits.double(), num_outcomes=6)
    assert (low.dtype, high.dtype) == (torch.float32, torch.float64)
    assert torch.equal(low, logits.bfloat16().float().log_softmax(-1))


@pytest.mark.parametrize(("widths", "who"), [((5, 9), "student"), ((9, 5), "teacher")])
def test_a_model_narrower_than_the_vocabulary_is_refused(widths, who):
    with pytest.raises(UserError, match=f"the {who} has 5 logits for a vocabulary of 9"):
        dense(torch.zeros(2, widths[0]), torch.zeros(2, widths[1]), num_outcomes=9)


def teacher_logp(rows: int = 4, outcomes: int = 9, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, outcomes, generator=generator, dtype=torch.float64)).log_softmax(-1)


def top_k(logp: torch.Tensor, size: int) -> TeacherRows:
    best, ids = logp.topk(size)
    return TeacherRows(ids, best, tail=logp.scatter(1, ids, NEVER).logsumexp(1))


def draws(logp: torch.Tensor, number: int, seed: int = 0) -> TeacherRows:
    """As a signal holds them: distinct outcomes from the left, likeliest first, and empty places."""
    drawn = torch.multinomial(logp.exp(), number, replacement=True, generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(logp.shape, dtype=torch.int64).scatter_add_(1, drawn, torch.ones_like(drawn))
    logprobs, ids = logp.masked_fill(counts == 0, NEVER).sort(descending=True)
    counts = counts.gather(1, ids)
    return TeacherRows(ids.masked_fill(counts == 0, -1), logprobs, counts)


STUDENT = torch.randn(4, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_top_k_with_tail_merges_what_dense_keeps_apart():
    """An independent reference: sum the dense probabilities."""
    teacher = teacher_logp()
    dense_pair = dense(STUDENT, teacher, num_outcomes=9)
    signal = top_k(teacher, 4)
    for row, whole in zip(top_k_with_tail(STUDENT, signal, num_outcomes=9), dense_pair, strict=True):
        named = whole.exp().gather(1, signal.ids)
        expected = torch.cat([named, 1 - named.sum(1, keepdim=True)], 1)
        torch.testing.assert_close(row.exp(), expected)


@pytest.mark.parametrize("name", sorted(COARSENING))
@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 8))
def test_top_k_never_exceeds_the_dense_value_and_grows_towards_it(name, seed, scale):
    student, teacher = scale * teacher_logp(seed=seed), teacher_logp(seed=seed + 1)
    whole = DIVERGENCES[name](*dense(student, teacher, num_outcomes=9))
    values = [DIVERGENCES[name](*top_k_with_tail(student, top_k(teacher, k), num_outcomes=9)) for k in (1, 3, 8)]
    for smaller, larger in pairwise([*values, whole]):
        assert (smaller <= larger + 1e-9).all()
    torch.testing.assert_close(values[-1], whole, atol=1e-9, rtol=1e-7)  # the tail is one outcome


def test_the_whole_vocabulary_as_top_k_has_no_tail():
    teacher = teacher_logp()
    student_row, teacher_row = top_k_with_tail(STUDENT, top_k(teacher, 9)._replace(tail=None), num_outcomes=9)
    assert (student_row[:, -1] == NEVER).all()
    assert (teacher_row[:, -1] == NEVER).all()
    torch.testing.assert_close(
        forward_kl(student_row, teacher_row), forward_kl(*dense(STUDENT, teacher, num_outcomes=9))
    )


def test_the_tail_that_rounding_leaves_of_a_whole_vocabulary_counts_nothing():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 6).log_softmax(-1)
    rows = TeacherRows(torch.arange(6).expand(3, 6), teacher, tail=torch.full((3,), -15.0))
    torch.testing.assert_close(
        forward_kl(*top_k_with_tail(student, rows, num_outcomes=6)), forward_kl(student, teacher)
    )


def test_a_known_tail_is_used_and_one_that_rounding_ate_has_a_floor():
    rounded = torch.tensor([[0.7, 0.3001]]).log()
    assert (1 - rounded.exp().sum()) < 0
    signal = TeacherRows(torch.tensor([[1, 0]]), rounded)
    _, teacher = top_k_with_tail(STUDENT[:1], signal, num_outcomes=9)
    assert teacher[0, -1] == pytest.approx(math.log(TAIL_FLOOR), abs=1e-3)
    _, teacher = top_k_with_tail(STUDENT[:1], signal._replace(tail=torch.tensor([math.log(0.25)])), num_outcomes=9)
    torch.testing.assert_close(teacher.exp(), torch.tensor([[0.7, 0.3001, 0.25]]) / 1.2501)


def test_the_students_rest_is_exact_where_it_is_far_below_one():
    """1 - p would be 0 in float32; the rest is summed up instead."""
    logits = torch.tensor([[0.0, -60.0, -61.0, -62.0]])
    student, _ = top_k_with_tail(logits, TeacherRows(torch.tensor([[0]]), torch.tensor([[-0.5]])), num_outcomes=4)
    assert student[0, 1] == pytest.approx(torch.tensor([-60.0, -61.0, -62.0]).logsumexp(0).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("support", "outcomes"), [(sampled, sampled_outcomes), (sampled_target_corrected, corrected_outcomes)]
)
def test_draws_give_the_dense_gradient_and_value_in_expectation(support, outcomes):
    """Both are linear in the weights, so it is enough that the expected weight of every outcome is its probability.

    All 3^4 sequences of 4 draws from 3 outcomes are gone through: an expectation, not an average.
    """
    t = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    z = torch.tensor([[0.3, -1.0, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    value, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(z)
    for sequence in product(range(3), repeat=4):
        counts = torch.bincount(torch.tensor(sequence), minlength=3)
        ids = counts.nonzero()[:, 0]
        ids = ids[t[ids].argsort(descending=True)]
        empty = 3 - len(ids)
        signal = TeacherRows(
            functional.pad(ids, (0, empty), value=-1)[None],
            functional.pad(t[ids].log(), (0, empty), value=NEVER)[None],
            functional.pad(counts[ids], (0, empty))[None],
        )
        one = forward_kl(*support(z, signal, num_outcomes=4)) + outcomes(signal, num_outcomes=4).offset
        chance = t[list(sequence)].prod()
        value += chance * one.detach()[0]
        gradient += chance * torch.autograd.grad(one.sum(), z)[0]
    teacher = functional.pad(t, (0, 1)).log()[None]
    whole = forward_kl(z.log_softmax(-1), teacher)
    torch.testing.assert_close(value, whole.detach()[0])
    torch.testing.assert_close(gradient, torch.autograd.grad(whole.sum(), z)[0])


def test_the_shares_of_draws_make_the_value_too_high_by_their_own_divergence():
    teacher = teacher_logp()
    signal = draws(teacher, 7)
    shares = torch.zeros_like(teacher).scatter_add_(1, signal.ids.clamp(min=0), signal.counts.double() / 7)
    offset = sampled_outcomes(signal, num_outcomes=9).offset
    torch.testing.assert_close(offset, -forward_kl(teacher, shares.log()))


def test_the_order_of_outcomes_and_empty_places_change_nothing():
    teacher = teacher_logp()
    signal = draws(teacher, 6)
    wider = TeacherRows(
        functional.pad(signal.ids, (0, 3), value=-1),
        functional.pad(signal.logprobs, (0, 3), value=NEVER),
        functional.pad(signal.counts, (0, 3)),
    )
    for support in (sampled, sampled_target_corrected):
        values = [forward_kl(*support(STUDENT, rows, num_outcomes=9)) for rows in (signal, wider)]
        torch.testing.assert_close(*values)


def test_a_sure_outcome_has_its_probability_as_corrected_weight():
    """Drawn with a chance of all but one, it carries no noise: the share of draws would."""
    teacher = torch.tensor([[0.9, 0.06, 0.04]], dtype=torch.float64).log()
    weights = corrected_outcomes(draws(teacher, 20), num_outcomes=3).logp.exp()
    assert weights[0, 0] == pytest.approx(0.9, rel=1e-12)


def test_supports_refuse_signals_of_the_other_kind_by_name():
    teacher = teacher_logp()
    with pytest.raises(UserError, match=r"random draws.*take sampled"):
        top_k_with_tail(STUDENT, draws(teacher, 5), num_outcomes=9)
    for support in (sampled, sampled_target_corrected):
        with pytest.raises(UserError, match="take top_k_with_tail"):
            support(STUDENT, top_k(teacher, 5), num_outcomes=9)
    with pytest.raises(UserError, match="log-probabilities"):
        sampled_target_corrected(STUDENT, draws(teacher, 5)._replace(logprobs=None), num_outcomes=9)
    assert [stored_support(rows) for rows in (top_k(teacher, 2), draws(teacher, 2))] == [
        "top_k_with_tail",
        "sampled_target_corrected",
    ]
    assert stored_support(draws(teacher, 2)._replace(logprobs=None)) == "sampled"


@pytest.mark.parametrize("name", STORED)
def test_a_student_narrower_than_the_vocabulary_is_refused_by_every_support(name):
    signal = top_k(teacher_logp(), 3) if name == "top_k_with_tail" else draws(teacher_logp(), 3)
    with pytest.raises(UserError, match="the student has 12 logits for a vocabulary of 13"):
        globals()[name](STUDENT, signal, num_outcomes=13)
