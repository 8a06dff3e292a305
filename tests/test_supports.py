"""The dense support: two comparable rows, whatever the models' padding."""

from __future__ import annotations

import pytest
import torch

from distill.divergences import forward_kl
from distill.errors import UserError
from distill.supports import dense


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
