"""On-policy losses: the policy gradient is the reverse KL's, by enumeration; a student learns from its own samples."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.batch import Batch, collate
from distill.errors import UserError
from distill.forward import Forward, read_head, run
from distill.head import Head
from distill.losses import LossOutput
from distill.losses.on_policy import discounted, on_policy, on_policy_inner
from distill.losses.soft_logits import soft_logits
from distill.render import Example
from distill.rollouts import Rollouts

TOKENS = 7


def forwards(rows: int, length: int, *, tokens: int = TOKENS, seed: int = 0) -> tuple[Forward, Forward]:
    """Hidden states (B, T, 4) and (B, T, 6) under random heads, the teacher's vocabulary padded; float64."""
    torch.manual_seed(seed)
    made = []
    for width, vocabulary in ((4, tokens), (6, tokens + 2)):
        linear = torch.nn.Linear(width, vocabulary, bias=False).double()
        hidden = torch.randn(rows, length, width, dtype=torch.float64, requires_grad=True)
        made.append(Forward(hidden, Head(linear)))
    return made[0], made[1]


def batch_of(ids: torch.Tensor, weights: torch.Tensor) -> Batch:
    return Batch(ids, torch.ones_like(ids), weights.to(torch.float64))


def policy_gradient(student, teacher, batch, **options) -> LossOutput:
    return on_policy(student, teacher, batch, num_outcomes=TOKENS, kind="policy_gradient", **options)


def gradients(total: torch.Tensor, student: Forward) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total, [student.hidden, student.head.linear.weight]))


def every_token(student: Forward) -> Batch:
    """Every token of the vocabulary drawn at one position, a row each, weighted by its probability.

    The rows share the prompt's hidden state, so the sum over rows is the expectation over draws.
    """
    with torch.no_grad():
        probabilities = student.head(student.hidden[0, 0]).softmax(-1)
    ids = torch.stack([torch.zeros(TOKENS, dtype=torch.int64), torch.arange(TOKENS)], dim=1)
    return batch_of(ids, torch.stack([torch.zeros(TOKENS), probabilities], dim=1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("chunk_tokens", [1, 3, None])
def test_in_expectation_over_draws_the_policy_gradient_is_that_of_the_reverse_kl(seed, chunk_tokens):
    student, teacher = forwards(1, 2, seed=seed)
    repeated = Forward(student.hidden.expand(TOKENS, -1, -1), student.head)
    judged = Forward(teacher.hidden.expand(TOKENS, -1, -1), teacher.head)
    batch = every_token(student)
    sampled = policy_gradient(repeated, judged, batch, chunk_tokens=chunk_tokens)
    one = batch_of(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[0.0, 1.0]]))
    full = on_policy(student, teacher, one, num_outcomes=TOKENS)
    torch.testing.assert_close(sampled.total, full.total, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sampled.metrics["reverse_kl"], sampled.total.detach())
    for name in ("reverse_kl", "student_entropy", "teacher_entropy"):
        torch.testing.assert_close(sampled.metrics[name], full.metrics[name], atol=1e-6, rtol=1e-5, check_dtype=False)
    for ours, exact in zip(gradients(sampled.total, student), gradients(full.total, student), strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-6, rtol=1e-5)


def test_with_discount_one_it_is_the_gradient_of_the_reverse_kl_of_whole_completions():
    """Two tokens drawn from a student that remembers the first: all pairs, weighted by their probabilities."""
    tokens = 4
    torch.manual_seed(0)
    own = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((tokens,), (tokens, tokens))]
    theirs = [torch.randn(shape, dtype=torch.float64) for shape in ((tokens,), (tokens, tokens))]

    def sequences(first, second):
        return first.log_softmax(-1)[:, None] + second.log_softmax(-1)

    def forward(first, second) -> Forward:
        """Logits as hidden states under a head that passes them on, for all pairs: (pairs, 3, tokens)."""
        states = torch.stack(
            [
                first.expand(tokens, tokens, -1).reshape(-1, tokens),
                second[:, None].expand(-1, tokens, -1).reshape(-1, tokens),
                torch.zeros(tokens * tokens, tokens, dtype=torch.float64),
            ],
            dim=1,
        )
        return Forward(states, Head(torch.nn.Identity()))

    logp, teacher_logp = sequences(*own), sequences(*theirs)
    exact = torch.autograd.grad((logp.exp() * (logp - teacher_logp)).sum(), own)
    pairs = torch.cartesian_prod(torch.tensor([0]), torch.arange(tokens), torch.arange(tokens))
    probability = logp.detach().exp().reshape(-1)
    weights = torch.stack(
        [torch.zeros_like(probability), torch.ones_like(probability), torch.ones_like(probability)], 1
    )
    total = torch.zeros((), dtype=torch.float64)
    for pair in range(len(pairs)):
        student, teacher = (
            Forward(side.hidden[pair : pair + 1], side.head) for side in (forward(*own), forward(*theirs))
        )
        one = Batch(pairs[pair : pair + 1], torch.ones(1, 3, dtype=torch.int64), weights[pair : pair + 1])
        output = on_policy(student, teacher, one, num_outcomes=tokens, kind="policy_gradient", discount=1.0)
        total = total + probability[pair] * output.total
    torch.testing.assert_close(total.detach(), (logp.exp() * (logp - teacher_logp)).sum().detach())
    for ours, closed in zip(torch.autograd.grad(total, own), exact, strict=True):
        torch.testing.assert_close(ours, closed)


@given(
    st.lists(st.lists(st.floats(-3, 3), min_size=5, max_size=5), min_size=1, max_size=3),
    st.floats(0, 1),
    st.integers(1, 5),
)
def test_discounted_sums_are_the_recursion(rewards, discount, length):
    rewards = torch.tensor(rewards, dtype=torch.float64)[:, :length]
    expected, later = torch.zeros_like(rewards), torch.zeros(len(rewards), dtype=torch.float64)
    for at in reversed(range(length)):
        later = rewards[:, at] + discount * later
        expected[:, at] = later
    torch.testing.assert_close(discounted(rewards, discount), expected)


@pytest.mark.parametrize("discount", [0.0, 0.7])
def test_untrained_tokens_padding_and_chunks_change_nothing(discount):
    student, teacher = forwards(3, 9)
    ids = torch.randint(0, TOKENS, (3, 9))
    weights = torch.zeros(3, 9)
    weights[0, 2:8], weights[1, 4:6], weights[2, 1:] = 1.0, 0.5, 1.0
    batch = batch_of(ids, weights)
    whole = policy_gradient(student, teacher, batch, discount=discount)
    expected = gradients(whole.total, student)
    chunked = policy_gradient(student, teacher, batch, discount=discount, chunk_tokens=4)
    garbled = batch_of(torch.where(weights > 0, ids, (ids + 3) % TOKENS), weights)
    rows = [
        policy_gradient(
            *(Forward(side.hidden[row : row + 1, :width], side.head) for side in (student, teacher)),
            batch_of(ids[row : row + 1, :width], weights[row : row + 1, :width]),
            discount=discount,
        )
        for row, width in ((0, 8), (1, 6), (2, 9))
    ]
    for total in (
        chunked.total,
        policy_gradient(student, teacher, garbled, discount=discount).total,
        sum(output.total for output in rows),
    ):
        torch.testing.assert_close(total, whole.total)
        for ours, right in zip(gradients(total, student), expected, strict=True):
            torch.testing.assert_close(ours, right)
    untouched = expected[0][:, :-1][weights[:, 1:] == 0]
    assert (untouched == 0).all()
    assert whole.weight == weights.sum()


def test_an_equal_teacher_gives_no_gradient_and_a_batch_without_trained_tokens_zeros():
    student, _ = forwards(2, 5)
    ids, ones = torch.randint(0, TOKENS, (2, 5)), torch.ones(2, 5)
    ones[:, 0] = 0.0
    same = policy_gradient(student, copy.deepcopy(student), batch_of(ids, ones), discount=0.5)
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients(same.total, student))
    assert same.metrics["top1_agreement"] == same.weight == 8
    empty = policy_gradient(student, copy.deepcopy(student), batch_of(ids, ones * 0))
    assert empty.total == empty.weight == 0
    empty.total.backward()
    assert (student.hidden.grad == 0).all()


def test_the_teacher_gets_no_gradient_and_logits_of_the_batch_are_never_held():
    student, teacher = forwards(8, 9)
    ids = torch.randint(0, TOKENS, (8, 9))
    weights = torch.ones(8, 9)
    weights[:, 0] = 0.0
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        output = policy_gradient(student, teacher, batch_of(ids, weights), chunk_tokens=4, discount=0.5)
    assert kept
    assert not [shape for shape in kept if len(shape) == 2 and shape[-1] in (TOKENS, TOKENS + 2)]
    output.total.backward()
    assert teacher.hidden.grad is None
    assert teacher.head.linear.weight.grad is None


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_the_kind_divergence_is_soft_logits_on_the_students_tokens(divergence):
    student, teacher = forwards(2, 6)
    batch = batch_of(torch.randint(0, TOKENS, (2, 6)), torch.tensor([[0.0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]))
    options = {"num_outcomes": TOKENS, "divergence": divergence, "temperature": 1.0}
    ours, plain = on_policy(student, teacher, batch, **options), soft_logits(student, teacher, batch, **options)
    assert ours.total == plain.total
    assert ("reverse_kl" in ours.metrics) == (divergence == "reverse_kl")
    assert {**plain.metrics, **ours.metrics}.keys() == ours.metrics.keys()


@pytest.mark.parametrize(
    ("options", "settings", "said"),
    [
        ({"kind": "policy_gradiant"}, {}, "did you mean 'policy_gradient'"),
        ({"kind": "policy_gradient", "discount": 1.5}, {}, "discount must be from 0 to 1"),
        ({"discount": 0.5}, {}, "needs kind=policy_gradient"),
        ({"kind": "policy_gradient", "divergence": "jsd"}, {}, "not jsd at 1.0"),
        ({"kind": "policy_gradient", "temperature": 2.0}, {}, "not reverse_kl at 2.0"),
        ({"kind": "policy_gradient"}, {"temperature": 0.9}, "rollouts' temperature must be 1, not 0.9"),
        ({"kind": "policy_gradient"}, {"top_p": 0.95}, "rollouts' top_p must be 1"),
        ({"kind": "policy_gradient"}, {"student_share": 0.5}, "rollouts' student_share must be 1"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(options, settings, said):
    rollouts = Rollouts(None, end_ids=[0], pad_id=0, num_outcomes=TOKENS, max_length=9, seed=0, **settings)
    with pytest.raises(UserError, match=said):
        on_policy_inner(None, None, rollouts=rollouts, **options)
    on_policy_inner(None, None, rollouts=rollouts, divergence="jsd", temperature=2.0)
    if not settings:  # a direct caller has no rollouts
        with pytest.raises(UserError, match=said):
            on_policy(*forwards(1, 2), batch_of(*torch.zeros(2, 1, 2).long()), num_outcomes=TOKENS, **options)


def test_every_option_of_the_mode_is_known_where_options_are_checked():
    """A mode's `inner` is called with the options that were given to the mode."""
    mode, inner = (inspect.signature(function).parameters for function in (on_policy, on_policy_inner))
    given = {"student", "teacher", "batch", "num_outcomes"}
    assert {name: mode[name].default for name in mode.keys() - given} == {
        name: inner[name].default for name in inner.keys() - {"student_model", "teacher_model", "rollouts"}
    }


@pytest.mark.parametrize(
    ("options", "settings"),
    [({}, {}), ({"divergence": "jsd"}, {"temperature": 0.8, "top_p": 0.9}), ({"kind": "policy_gradient"}, {})],
)
def test_a_student_learns_from_its_own_samples_to_speak_as_its_teacher(make_model, options, settings):
    """What falls is the reverse KL on the student's own samples at temperature 1, after 30 steps on prompts alone."""
    tokens, steps = 12, 30
    shape = {"vocab_size": tokens, "num_hidden_layers": 1, "eos_token_id": 11, "pad_token_id": 0}
    teacher = make_model("llama", seed=3, initializer_range=0.3, **shape).eval()
    student = make_model("qwen3", seed=4, **shape)
    heads = read_head(student, "student"), read_head(teacher, "teacher")
    fixed = {"end_ids": [11], "pad_id": 0, "num_outcomes": tokens, "max_length": 9, "max_completion_length": 4}
    writer = Rollouts(student, seed=0, **fixed, **settings)
    fair = Rollouts(student, seed=1, **fixed)
    weights = np.array([0.0, 0.0, 1.0], np.float32)
    prompts = collate([Example(np.array([1, 2 + i % 8, 1], np.int32), weights) for i in range(64)], pad_id=0)

    def judged(rollouts: Rollouts, step: int, **chosen) -> LossOutput:
        batch = rollouts.roll(prompts, step=step, first_row=0).batch
        with torch.no_grad():
            target = run(teacher, heads[1], batch)
        return on_policy(run(student, heads[0], batch), target, batch, num_outcomes=tokens, **chosen)

    def distance() -> float:
        with torch.no_grad():
            output = judged(fair, steps)
        return float(output.metrics["reverse_kl"] / output.weight)

    before = distance()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for step in range(steps):
        output = judged(writer, step, **options)
        optimizer.zero_grad()
        (output.total / output.weight).backward()
        optimizer.step()
    assert distance() < before / 2
