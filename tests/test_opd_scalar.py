"""On-policy rewards of spans: DPCA's formula, the policy gradient it is in expectation, CompassOPD's optimum."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.kernels.chain import span_sums
from align.methods.opd_scalar import SPREADS, opd_scalar, surrogate, to_tokens
from distill.batch import Batch
from distill.errors import UserError
from distill.forward import Forward
from distill.head import Head
from distill.losses.on_policy import on_policy

SPANS = st.lists(
    st.tuples(st.lists(st.floats(-9, -0.01), min_size=1, max_size=4), st.floats(-20, 0)), min_size=1, max_size=5
)


def parts(spans) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The student's token log-probabilities, the span of each, the teacher's of the spans."""
    sizes = [len(tokens) for tokens, _ in spans]
    own = torch.tensor([logp for tokens, _ in spans for logp in tokens], dtype=torch.float64)
    span = torch.repeat_interleave(torch.tensor(sizes))
    return own, span, torch.tensor([logp for _, logp in spans], dtype=torch.float64)


@given(spans=SPANS)
def test_shared_out_it_is_dpcas_advantage(spans):
    own, span, teacher = parts(spans)
    student = span_sums(own, span, len(teacher))
    gap = opd_scalar(student, teacher)
    found = to_tokens(gap, own, span, limit=None, longest=None).values
    torch.testing.assert_close(found, (teacher[span] / student[span] - 1) * own)
    torch.testing.assert_close(span_sums(found, span, len(teacher)), teacher - student)
    whole = to_tokens(gap, own, span, spread="whole", limit=None, longest=None).values
    assert whole.tolist() == gap[span].tolist()


@given(spans=SPANS, limit=st.floats(0.1, 5), longest=st.integers(1, 4), spread=st.sampled_from(SPREADS))
def test_what_is_limited_and_left_out_is_counted(spans, limit, longest, spread):
    own, span, teacher = parts(spans)
    gap = opd_scalar(span_sums(own, span, len(teacher)), teacher)
    free = to_tokens(gap, own, span, spread=spread, limit=None, longest=None)
    assert (int(free.limited), int(free.left_out)) == (0, 0)
    found = to_tokens(gap, own, span, spread=spread, limit=limit, longest=longest)
    long = torch.tensor([len(tokens) > longest for tokens, _ in spans])
    kept = free.values.masked_fill(long[span], 0.0)
    assert found.values.tolist() == kept.clamp(-limit, limit).tolist()
    assert int(found.limited) == int((kept.abs() > limit).sum())
    assert int(found.left_out) == int(long.sum())


@pytest.mark.parametrize("spread", SPREADS)
def test_spans_of_one_token_are_the_policy_gradient_of_on_policy(spread):
    """Same vocabulary: the same value and the same gradients as `on_policy` with kind policy_gradient."""
    torch.manual_seed(0)
    student, teacher = (
        Forward(
            torch.randn(2, 5, width, dtype=torch.float64, requires_grad=True),
            Head(torch.nn.Linear(width, 7, bias=False).double()),
        )
        for width in (4, 6)
    )
    ids = torch.randint(7, (2, 5))
    weights = torch.rand(2, 5, dtype=torch.float64) * (torch.arange(5) > 1)
    batch = Batch(ids, torch.ones_like(ids), weights)
    reference = on_policy(student, teacher, batch, num_outcomes=7, kind="policy_gradient").total
    drawn = batch.trained()
    own, theirs = (
        side.head(side.hidden[:, :-1][drawn.rows]).log_softmax(-1).gather(-1, drawn.labels[:, None])[:, 0]
        for side in (student, teacher)
    )
    span = torch.arange(len(drawn.labels))
    advantages = to_tokens(opd_scalar(own, theirs), own, span, spread=spread, limit=None).values
    assert not advantages.requires_grad
    total = surrogate(own, advantages, drawn.weights)
    torch.testing.assert_close(total, reference)
    for ours, known in zip(
        *(torch.autograd.grad(each, [student.hidden, student.head.linear.weight]) for each in (total, reference)),
        strict=True,
    ):
        torch.testing.assert_close(ours, known)


def two_token_world(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A student's logits of a first token (3,) and of a second behind each (3, 3), as one leaf (4, 3); all 9 spans."""
    rows = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    return rows, torch.cartesian_prod(torch.arange(3), torch.arange(3))


def tokens_of(rows: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (18,) of the two tokens of each span."""
    logp = rows.log_softmax(-1)
    return torch.stack([logp[0, spans[:, 0]], logp[1 + spans[:, 0], spans[:, 1]]], -1).flatten()


@pytest.mark.parametrize("seed", range(3))
def test_in_expectation_whole_advantages_are_the_gradient_of_the_reverse_kl_of_spans(seed):
    rows, spans = two_token_world(seed)
    teacher = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 9)).log_softmax(-1)
    own, span = tokens_of(rows, spans), torch.arange(9).repeat_interleave(2)
    student = span_sums(own, span, 9)
    reverse_kl = (student.exp() * (student - teacher)).sum()
    advantages = to_tokens(opd_scalar(student, teacher), own, span, spread="whole", limit=None).values
    total = surrogate(own, advantages, student.detach().exp()[span])
    shared = to_tokens(opd_scalar(student, teacher), own, span, limit=None).values
    dpca = surrogate(own, shared, student.detach().exp()[span])
    slopes = [torch.autograd.grad(each, rows, retain_graph=True)[0] for each in (total, reverse_kl, dpca)]
    torch.testing.assert_close(slopes[0], slopes[1])
    assert (slopes[2] - slopes[1]).abs().max() > 1e-3  # DPCA's sharing out goes another way


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_compass_comes_to_rest_at_the_initial_student_times_the_teachers_gain(alpha):
    """CompassOPD: P_0 exp(gain / alpha) / Z, where all advantages are equal, so that in expectation nothing moves."""
    generator = torch.Generator().manual_seed(0)
    initial, teacher, weak = torch.randn(3, 6, dtype=torch.float64, generator=generator).log_softmax(-1)
    student = (initial + (teacher - weak) / alpha).requires_grad_()
    logp = student.log_softmax(-1)
    advantages = opd_scalar(logp, teacher, weak_reference=weak, initial_logp=initial, alpha=alpha)
    torch.testing.assert_close(advantages, advantages[0].expand(6))
    (gradient,) = torch.autograd.grad(surrogate(logp, advantages, logp.detach().exp()), student)
    assert gradient.abs().max() < 1e-12
    # A weak reference that says nothing (uniform) and alpha 1 pull to teacher times initial, not to the teacher.
    assert opd_scalar(logp, teacher).std() > 0.1


def test_an_equal_teacher_gives_nothing_and_half_the_probability_something():
    own, span = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([0, 0, 1])
    student = span_sums(own, span, 2)
    assert to_tokens(opd_scalar(student, student), own, span).values.abs().max() == 0
    assert (opd_scalar(student - math.log(2), student) > 0.6).all()


def test_certain_and_impossible_spans_are_finite_once_limited():
    own, span = torch.tensor([0.0, 0.0, -60000.0, -1e-30]), torch.tensor([0, 0, 1, 2])
    teacher = torch.tensor([-4.0, -1.0, -math.inf])
    found = to_tokens(opd_scalar(span_sums(own, span, 3), teacher), own, span)
    assert found.values.tolist() == [-2.0, -2.0, 10.0, -10.0]
    assert int(found.limited) == 2


def test_the_teacher_gets_no_gradient_and_the_surrogates_value_is_the_estimate():
    own = torch.tensor([-1.0, -2.0], requires_grad=True)
    teacher = torch.tensor([-0.5, -3.0], requires_grad=True)
    weights = torch.tensor([1.0, 0.5])
    found = to_tokens(opd_scalar(own, teacher), own, torch.arange(2)).values
    total = surrogate(own, found, weights)
    assert total.item() == pytest.approx(-(0.5 - 0.5))
    slopes = torch.autograd.grad(total, [own, teacher], allow_unused=True)
    assert slopes[0].tolist() == pytest.approx([-0.5, 0.5])
    assert slopes[1] is None


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: opd_scalar(x, x, weak_reference=x), "give both"),
        (lambda x: opd_scalar(x, x, initial_logp=x), "give both"),
        (lambda x: opd_scalar(x, x, weak_reference=x, initial_logp=x, alpha=0.0), "positive"),
        (lambda x: to_tokens(x, x, torch.arange(2), spread="even"), "share, whole"),
        (lambda x: to_tokens(x, x, torch.arange(2), limit=0.0), "positive"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, said):
    with pytest.raises(UserError, match=said):
        call(torch.zeros(2))
