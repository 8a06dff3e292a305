"""ULD and GOLD: what they promise, TRL's own implementation of both, and what they cannot do.

Spans as one row by the chain rule, `align.kernels.chain`, are tested here too, where they matter most.
"""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.byte_view import ByteView
from align.kernels.chain import last_rows, priors, span_sums, student_rows
from align.kernels.string_maps import exact_matching, matching, tokenised_again
from align.kernels.teacher_rows import Teacher
from align.methods.gold import gold
from align.methods.uld import by_index, sorted_l1, uld
from align.spans import spans_of
from distill.batch import TeacherRows
from distill.divergences import jsd
from distill.errors import UserError

STUDENT = (b"a", b"b", b"ab", b"2", b"0", b"1", b"201")
TEACHER = (b"1", b"0", b"2", b"b", b"a", b"ba", b"20", b"aab")


def view(pieces: tuple[bytes, ...]) -> ByteView:
    return ByteView(pieces, {}, "byte-level", False)


SAME = matching([(token, token) for token in range(6)], 6, 6)
TABLES = exact_matching(view(STUDENT), view(TEACHER))
# name -> f(student_logits, teacher) over one vocabulary of 6 tokens
ONE_VOCABULARY = {
    "uld": lambda student, teacher, **priors: uld(student, teacher, 6, **priors),
    "gold": lambda student, teacher, **priors: gold(student, teacher, SAME, **priors),
}
# and over STUDENT and TEACHER
TWO_VOCABULARIES = {
    "uld": lambda student, teacher, **priors: uld(student, teacher, len(STUDENT), **priors),
    "gold": lambda student, teacher, **priors: gold(student, teacher, TABLES, **priors),
}
EACH = pytest.mark.parametrize("name", ONE_VOCABULARY)


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(loss, student, teacher, **options):
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher, **options)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def dense(teacher_logits: torch.Tensor, num_outcomes: int | None = None) -> Teacher:
    return Teacher.dense(teacher_logits, num_outcomes=num_outcomes or teacher_logits.shape[-1])


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_equal_student_has_no_loss_and_no_gradient(name, dtype):
    rows = logits(4, 6).to(dtype)
    value, gradient = value_and_gradient(ONE_VOCABULARY[name], rows, dense(rows))
    assert value.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


@EACH
def test_a_permuted_and_padded_teacher_is_the_same_vocabulary(name):
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    permuted = torch.cat([teacher[:, order], torch.full((4, 3), 9.0, dtype=torch.float64)], -1)
    tables = matching([(int(own), place) for place, own in enumerate(order)], 6, 6)
    wide = torch.cat([student, torch.full((4, 2), 9.0, dtype=torch.float64)], -1)
    loss = {"uld": lambda s, t: uld(s, t, 6), "gold": lambda s, t: gold(s, t, tables)}[name]
    value, gradient = value_and_gradient(loss, wide, dense(permuted, 6))
    plain, slope = value_and_gradient(ONE_VOCABULARY[name], student, dense(teacher))
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(gradient[:, :6], slope)
    assert (gradient[:, 6:] == 0).all()
    if name == "gold":
        torch.testing.assert_close(value, jsd(student.log_softmax(-1), teacher.log_softmax(-1)))


@EACH
def test_only_the_student_learns_and_a_rows_gradient_sums_to_zero(name):
    teacher = logits(5, len(TEACHER), seed=1).requires_grad_()
    value, gradient = value_and_gradient(TWO_VOCABULARIES[name], logits(5, len(STUDENT)), dense(teacher))
    assert (value > 0).all()
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_certainty_and_impossibility_on_either_side_are_finite(name, dtype):
    certain = torch.full((1, len(STUDENT)), -math.inf).index_fill_(1, torch.tensor([2]), 0.0)
    far = torch.zeros(1, len(STUDENT)).index_fill_(1, torch.tensor([1]), -60000.0)
    student = torch.cat([certain, far, far, certain]).to(dtype)
    theirs = torch.full((1, len(TEACHER)), -math.inf).index_fill_(1, torch.tensor([6]), 0.0)
    teacher = torch.cat([theirs, theirs, torch.zeros(2, len(TEACHER))]).to(dtype)
    value, gradient = value_and_gradient(TWO_VOCABULARIES[name], student, dense(teacher))
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@EACH
def test_rows_know_nothing_of_each_other(name):
    student, teacher, prior = logits(5, len(STUDENT)), logits(5, len(TEACHER), seed=1), -logits(5).abs()
    some = torch.tensor([3, 0, 3])
    whole = TWO_VOCABULARIES[name](student, dense(teacher), student_prior=prior, teacher_prior=prior)
    part = TWO_VOCABULARIES[name](
        student[some], dense(teacher[some]), student_prior=prior[some], teacher_prior=prior[some]
    )
    torch.testing.assert_close(part, whole[some])


@EACH
def test_a_top_k_teacher_is_refused(name):
    ids = torch.tensor([[0, 1]])
    stored = Teacher.stored(TeacherRows(ids, logprobs=torch.tensor([[-0.5, -1.5]])), num_outcomes=len(TEACHER))
    with pytest.raises(UserError, match="whole distribution"):
        TWO_VOCABULARIES[name](logits(1, len(STUDENT)), stored)


@EACH
def test_half_the_probability_of_a_span_changes_the_loss(name):
    student, teacher, prior = logits(4, 6), logits(4, 6, seed=1), torch.full((4,), -0.7, dtype=torch.float64)
    loss = ONE_VOCABULARY[name]
    whole = loss(student, dense(teacher), student_prior=prior, teacher_prior=prior)
    half = loss(student, dense(teacher), student_prior=prior - math.log(2), teacher_prior=prior)
    assert ((whole - half).abs() > 1e-3).all()


def test_uld_is_blind_to_which_token_is_meant():
    """Invariant 2 holds for its value only: what the student is taught is a list of probabilities."""
    teacher = logits(1, 6)
    other_tokens, nearly_right = teacher.flip(-1), teacher + logits(1, 6, seed=1, scale=0.01)
    loss = ONE_VOCABULARY["uld"]
    assert loss(other_tokens, dense(teacher)) < 1e-12 < 1e-4 < loss(nearly_right, dense(teacher))
    far, near = (jsd(side.log_softmax(-1), teacher.log_softmax(-1)) for side in (other_tokens, nearly_right))
    assert far > 0.1 > 1e-3 > near


def test_gold_suppresses_numerals_that_only_the_student_writes_in_one_token():
    """Invariant 12 fails: text "201", one token for the student and three for the teacher, both certain."""
    student = torch.zeros(1, len(STUDENT), dtype=torch.float64)
    student[0, STUDENT.index(b"201")] = 5.0
    teacher = torch.full((1, len(TEACHER)), -30.0, dtype=torch.float64)
    teacher[0, TEACHER.index(b"1")] = 30.0  # the last of "2", "0", "1"
    value, gradient = value_and_gradient(TWO_VOCABULARIES["gold"], student, dense(teacher))
    assert value > 0.5
    assert gradient[0, STUDENT.index(b"201")] > 1e-3  # downhill is away from it
    assert gradient[0, STUDENT.index(b"1")] < -1e-3


def test_lists_of_unequal_length_end_in_zeros():
    student, teacher = torch.tensor([[0.1, 0.9]]), torch.tensor([[0.2, 0.5, 0.3]])
    for sides in ((student, teacher), (teacher, student)):
        torch.testing.assert_close(sorted_l1(*sides), torch.tensor([0.4 + 0.2 + 0.2]))


@given(
    counts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=5),
)
def test_rows_are_paired_by_index_within_each_sequence(counts):
    own, theirs = (torch.tensor([n for n, pair in enumerate(counts) for _ in range(pair[i])]).long() for i in (0, 1))
    expected, first = [], [0, 0]
    for pair in counts:
        expected += [(first[0] + k, first[1] + k) for k in range(min(pair))]
        first = [begin + size for begin, size in zip(first, pair, strict=True)]
    assert list(zip(*(rows.tolist() for rows in by_index(own, theirs)), strict=True)) == expected


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_a_spans_prior_is_what_its_tokens_but_the_last_say(sizes):
    span = torch.repeat_interleave(torch.tensor(sizes))
    logp = torch.randn(len(span), dtype=torch.float64, requires_grad=True)
    parts = logp.split(sizes)
    torch.testing.assert_close(span_sums(logp, span, len(sizes)), torch.stack([part.sum() for part in parts]))
    assert last_rows(span, len(sizes)).tolist() == (np.cumsum(sizes) - 1).tolist()
    found = priors(logp, span, len(sizes))
    torch.testing.assert_close(found, torch.stack([part[:-1].sum() for part in parts]))
    (gradient,) = torch.autograd.grad(found.sum(), logp)
    assert gradient.sum() == sum(sizes) - len(sizes)


def test_half_given_weights_and_too_few_logits_are_refused():
    with pytest.raises(UserError, match="both"):
        gold(logits(1, 7), dense(logits(1, 8)), TABLES, matched_weight=1.0)
    with pytest.raises(UserError, match="student has 3 logits"):
        uld(logits(1, 3), dense(logits(1, 8)), 7)


# Against TRL


class Case:
    """A text in both vocabularies behind a prompt of one token, with two models' logits at every position."""

    def __init__(self, text: bytes, *, seed: int = 0, certain: bool = False) -> None:
        self.ids = [tokenised_again([text], view(pieces))[0] for pieces in (STUDENT, TEACHER)]
        pieces = [[side[token] for token in ids] for side, ids in zip((STUDENT, TEACHER), self.ids, strict=True)]
        spans = spans_of(*pieces)
        self.count = len(spans)
        self.span = [
            torch.repeat_interleave(torch.from_numpy(side[:, 1] - side[:, 0]))
            for side in (spans.student, spans.teacher)
        ]
        self.offsets = []
        for side in pieces:
            ends = np.cumsum([0, 0, *map(len, side)])
            self.offsets.append(torch.tensor(np.stack([ends[:-1], ends[1:]], -1))[None])
        self.logits = []
        for ids, side, number in zip(self.ids, (STUDENT, TEACHER), (2 * seed, 2 * seed + 1), strict=True):
            rows = logits(len(ids) + 1, len(side), seed=number)
            if certain:
                rows = torch.full_like(rows, -1e3)
                rows[torch.arange(len(ids)), torch.tensor(ids)] = 1e3
            self.logits.append(rows)
        self.logits[0].requires_grad_()

    def rows(self, shift: int = 0) -> tuple[torch.Tensor, Teacher, dict[str, torch.Tensor]]:
        """The last rows of all spans with their priors; row i predicts token i, or, shifted, what is behind it."""
        whole, found = [], []
        for rows, ids, span, side in zip(self.logits, self.ids, self.span, (STUDENT, TEACHER), strict=True):
            predicting = rows[shift : shift + len(ids)]
            own = student_rows(predicting, len(side)).gather(-1, torch.tensor(ids)[:, None])[:, 0]
            found.append(priors(own, span, self.count))
            whole.append(predicting[last_rows(span, self.count)])
        return whole[0], dense(whole[1].detach()), {"student_prior": found[0], "teacher_prior": found[1].detach()}


@pytest.fixture(scope="module")
def trl_loss():
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = pytest.importorskip("trl.experimental.gold.gold_trainer")

    def vocabulary(pieces):
        return SimpleNamespace(get_vocab=lambda: {piece.decode(): token for token, piece in enumerate(pieces)})

    def loss(case: Case, **settings) -> torch.Tensor:
        config = SimpleNamespace(
            **{
                "uld_crossentropy_weight": 0.0,
                "uld_distillation_weight": 1.0,
                "uld_student_temperature": 1.0,
                "uld_teacher_temperature": 1.0,
                "uld_skip_student_eos": False,
                "uld_skip_teacher_eos": False,
                "use_extended_uld": True,
                "uld_token_merge_strategy": "bayesian",
                "uld_use_hybrid_loss": True,
                "beta": 0.5,
                **settings,
            }
        )
        made = trainer.ULDLoss(config, vocabulary(STUDENT), vocabulary(TEACHER))
        ids = [torch.tensor([[0, *each]]) for each in case.ids]
        labels = [torch.cat([torch.tensor([[-100]]), each[:, 1:]], -1) for each in ids]
        return made(*(rows[None] for rows in case.logits), *labels, *ids, *case.offsets)

    return loss


TEXTS = st.text("ab012", min_size=1, max_size=12).map(str.encode)


@settings(max_examples=30)
@given(text=TEXTS, seed=st.integers(0, 99), weights=st.none() | st.tuples(st.floats(0, 2), st.floats(0, 2)))
def test_gold_is_trls_bayesian_hybrid_loss(trl_loss, text, seed, weights):
    case = Case(text, seed=seed)
    names = ("matched_weight", "unmatched_weight")
    options = dict(zip(names, weights or (None, None), strict=True))
    reference = trl_loss(case, **{f"uld_hybrid_{name}": value for name, value in options.items()})
    student, teacher, known = case.rows()
    value = gold(student, teacher, TABLES, **known, **options).mean()
    torch.testing.assert_close(value, reference, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(total, case.logits[0])[0] for total in (value, reference)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


@settings(max_examples=15)
@given(text=TEXTS, seed=st.integers(0, 99), extended=st.booleans())
def test_uld_is_trls_over_spans_and_by_index(trl_loss, text, seed, extended):
    case = Case(text, seed=seed)
    reference = trl_loss(case, uld_use_hybrid_loss=False, use_extended_uld=extended)
    if extended:
        student, teacher, known = case.rows()
        value = uld(student, teacher, len(STUDENT), **known).mean()
    else:
        own, theirs = by_index(*(torch.zeros(len(ids)).long() for ids in case.ids))
        value = uld(case.logits[0][own], dense(case.logits[1][theirs]), len(STUDENT)).mean()
    torch.testing.assert_close(value, reference, atol=1e-9, rtol=1e-9)
    gradients = [torch.autograd.grad(total, case.logits[0])[0] for total in (value, reference)]
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-7)


@EACH
def test_certain_models_score_zero_unless_the_student_is_a_row_off(name):
    """Invariant 7; over tokens that both have, as GOLD has a loss for perfect students elsewhere."""
    case, loss = Case(b"b2a1", certain=True), TWO_VOCABULARIES[name]
    student, teacher, known = case.rows()
    assert loss(student, teacher, **known).max() < 1e-9
    behind, _, others = case.rows(shift=1)
    assert others["student_prior"].sum() == 0
    late = loss(behind, teacher, **known)
    assert (late[-1] > 0.5) if name == "uld" else (late[:-1] > 0.3).all()


def test_a_span_of_several_tokens_is_their_product_and_trls_default_is_a_row_off(trl_loss):
    """One token for the teacher, two for the student, both certain: 0, where "observed" takes the rows behind."""
    case = Case(b"20", certain=True)
    rows, teacher, known = case.rows()
    assert uld(rows, teacher, len(STUDENT), **known).max() < 1e-9
    assert trl_loss(case, uld_use_hybrid_loss=False) < 1e-6
    assert trl_loss(case, uld_use_hybrid_loss=False, uld_token_merge_strategy="observed") > 0.5
