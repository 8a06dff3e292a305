"""DSKD's three terms against full logits under autograd, and what each of them may train."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from align.methods.dskd import Rows, dskd, frozen, maps_for
from distill.errors import UserError
from distill.head import Head

R, WIDTH, TEACHER_WIDTH, TOKENS, TEACHER_TOKENS = 9, 6, 10, 13, 17


class Config:
    def __init__(self, width: int) -> None:
        self.hidden_size = width

    def get_text_config(self) -> Config:
        return self


class Model:
    def __init__(self, width: int) -> None:
        self.config = Config(width)


def case(
    *, bias: bool = False, softcap: float | None = None, padding: int = 0
) -> tuple[Rows, Rows, torch.Tensor, nn.ModuleDict]:
    torch.manual_seed(0)
    sides = []
    for width, tokens in ((WIDTH, TOKENS), (TEACHER_WIDTH, TEACHER_TOKENS)):
        linear = nn.Linear(width, tokens + padding, bias=bias)
        nn.init.normal_(linear.weight, std=0.8)
        hidden = torch.randn(R, width)
        sides.append(Rows(hidden, Head(linear, 1.3, softcap), torch.randint(0, tokens, (R,)), tokens))
    sides[0].hidden.requires_grad_()
    sides[1].head.linear.requires_grad_(False)
    return *sides, torch.rand(R), maps_for(Model(WIDTH), Model(TEACHER_WIDTH), map_seed=3)


def plain(student: Rows, teacher: Rows, weights: torch.Tensor, maps: nn.ModuleDict) -> torch.Tensor:
    """The same by full logits and autograd alone."""
    linear = student.head.linear
    still = {name: weight.detach() for name, weight in linear.named_parameters()}
    head = Head(
        lambda rows: torch.func.functional_call(linear, still, (rows,)), student.head.scale, student.head.softcap
    )
    said = head(maps["to_student"](teacher.hidden))[:, :TOKENS].log_softmax(-1)
    own = student.head(student.hidden)[:, :TOKENS].log_softmax(-1)
    first = functional.nll_loss(said, student.labels, reduction="none")
    right = said.argmax(-1) == student.labels
    second = functional.kl_div(own, said.detach(), log_target=True, reduction="none").sum(-1) * right
    theirs = teacher.head(teacher.hidden)[:, :TEACHER_TOKENS].log_softmax(-1)
    back = teacher.head(maps["to_teacher"](student.hidden))[:, :TEACHER_TOKENS].log_softmax(-1)
    third = functional.kl_div(back, theirs, log_target=True, reduction="none").sum(-1)
    return weights @ (first + second + third)


@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 2.5}, {"padding": 3}], ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 4, None])
def test_it_is_the_three_terms_and_their_gradients(head, chunk_tokens):
    student, teacher, weights, maps = case(**head)
    with torch.no_grad():  # some rows where the projected teacher is right
        said = frozen(student.head, TOKENS)(maps["to_student"](teacher.hidden)).argmax(-1)
    student = student._replace(labels=torch.where(torch.arange(R) % 2 == 0, said, student.labels))
    trained = [student.hidden, *student.head.linear.parameters(), *maps.parameters()]
    total, metrics = dskd(student, teacher, weights, maps, chunk_tokens=chunk_tokens)
    ours = torch.autograd.grad(total, trained)
    expected = plain(student, teacher, weights, maps)
    torch.testing.assert_close(total, expected)
    for found, wanted in zip(ours, torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    right, of = metrics["agreement"].tolist()
    assert 0 < right < of
    parts = [metrics[name] for name in ("projected_cross_entropy", "to_student", "to_teacher")]
    torch.testing.assert_close(sum(parts), total.detach())
    assert teacher.head.linear.weight.grad is None


def test_the_students_head_is_not_trained_to_read_the_teacher():
    student, teacher, weights, maps = case()
    wrong = student._replace(
        labels=(frozen(student.head, TOKENS)(maps["to_student"](teacher.hidden)).argmax(-1) + 1) % TOKENS
    )
    total, metrics = dskd(wrong, teacher, weights, maps)
    assert metrics["agreement"][0] == 0
    total.backward()
    # Never right: the first term alone sees the student's head, which it must not train.
    assert student.head.linear.weight.grad.abs().max() == 0
    assert maps["to_student"].weight.grad.abs().max() > 0


def test_a_head_that_is_no_matrix_is_refused():
    student, teacher, weights, maps = case()
    odd = student._replace(head=Head(nn.Sequential(student.head.linear)))
    with pytest.raises(UserError, match="dskd reads the student's head as a plain matrix, and it is a Sequential"):
        dskd(odd, teacher, weights, maps)
