"""Closed forms against autograd through the plain divergences, and both against TRL's fused loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distill.divergences import DIVERGENCES, entropy
from distill.errors import UserError
from distill.slopes import CPU_BLOCK, SLOPES, logit_gradient

ALL = pytest.mark.parametrize("name", DIVERGENCES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
INF = float("inf")
NEVER = -INF

# Every option of every divergence, away from its default.
OPTIONS = {
    "jsd": {"weight": 0.2},
    "skew_forward_kl": {"alpha": 0.6},
    "skew_reverse_kl": {"alpha": 0.6},
    "alpha_beta": {"alpha": 1.3, "beta": 0.4},
    "adaptive_kl": {"head_mass": 0.8},
}
CASES = [(name, {}) for name in DIVERGENCES] + list(OPTIONS.items())
EACH = pytest.mark.parametrize(("name", "options"), CASES, ids=[name + "*" * bool(given) for name, given in CASES])


def random_logits(*shape: int, dtype: torch.dtype, spread: float = 4.0, seed: int = 0) -> tuple[torch.Tensor, ...]:
    rows = spread * torch.randn(2, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return rows[0], rows[1]


def excluding(student: torch.Tensor, teacher: torch.Tensor, where: str) -> None:
    """Exclude outcomes in place: some for both sides, and some for one side only."""
    if where:
        student[..., :3], teacher[..., :3] = NEVER, NEVER
    if where == "student":
        student[..., 1, 5:7] = NEVER
    if where == "teacher":
        teacher[..., 1, 5:7] = NEVER


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *, scale: torch.Tensor) -> None:
    """Equal within 1e-5 (float32) or 1e-10 (float64) of `scale`."""
    relative = 1e-5 if expected.dtype == torch.float32 else 1e-10
    assert ((actual - expected).abs() <= relative * scale).all(), ((actual - expected).abs() / scale).max()


def by_autograd(name, options, student_logits, teacher_logits):
    """Value, slope and gradient by the logits of the plain divergence."""
    student = student_logits.clone().requires_grad_()
    logp = student.log_softmax(-1)
    value = DIVERGENCES[name](logp, teacher_logits.log_softmax(-1), **options)
    slope, gradient = torch.autograd.grad(value.sum(), (logp, student))
    return value.detach(), slope, gradient


def test_every_divergence_has_a_slope():
    assert set(SLOPES) == set(DIVERGENCES)
    with_options = {name for name, f in DIVERGENCES.items() if f.__kwdefaults__}
    assert {name: set(given) for name, given in OPTIONS.items()} == {
        name: set(DIVERGENCES[name].__kwdefaults__) for name in with_options
    }


@EACH
@DTYPES
@pytest.mark.parametrize("where", ["", "both", "student", "teacher"])
def test_value_slope_gradient_and_entropies_are_autograds(name, options, dtype, where):
    student, teacher = random_logits(4, 50, dtype=dtype)
    excluding(student, teacher, where)
    value, slope, gradient = by_autograd(name, options, student, teacher)
    finite = value.isfinite()
    assert finite.all() or (where in ("student", "teacher") and name in ("forward_kl", "reverse_kl", "adaptive_kl"))

    own, teachers = student.log_softmax(-1), teacher.log_softmax(-1)
    entropies = entropy(own), entropy(teachers)
    with torch.no_grad():
        closed_value, closed_slope = SLOPES[name](own, teachers, **options)
    memory = student.data_ptr()
    numbers = logit_gradient(name, student, teacher, options=options)
    assert numbers[1].data_ptr() == memory
    for actual, expected in ((closed_value, value), (numbers[0], value)):
        assert (actual[~finite] == INF).all()
        assert_close(actual[finite], expected[finite], scale=expected[finite].clamp(min=0.05))
    # The gradient is the difference of numbers as large as the slope, to autograd as well.
    scale = slope[finite].abs().amax(-1, keepdim=True)
    assert_close(closed_slope[finite], slope[finite], scale=scale)
    assert_close(numbers[1][finite], gradient[finite], scale=scale)
    for actual, expected in zip(numbers[2:], entropies, strict=True):
        assert_close(actual, expected, scale=expected.clamp(min=0.05))


@EACH
@settings(max_examples=30)
@given(data=st.data())
def test_gradients_of_any_rows_are_autograds_and_sum_to_zero(name, options, data):
    outcomes = data.draw(st.integers(2, 9))
    logits = st.lists(st.floats(-20, 20), min_size=outcomes, max_size=outcomes)
    student, teacher = (torch.tensor([data.draw(logits)], dtype=torch.float64) for _ in range(2))
    # Where both give an outcome the same probability the total variation has a kink, and no gradient.
    assume(name != "tvd" or (student.softmax(-1) - teacher.softmax(-1)).abs().min() > 1e-9)
    value, _, expected = by_autograd(name, options, student, teacher)
    actual, gradient, *_ = logit_gradient(name, student, teacher, options=options)
    torch.testing.assert_close(actual, value, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=1e-9)
    assert abs(gradient.sum()) < 1e-10


@ALL
def test_a_slope_takes_any_leading_shape(name):
    student, teacher = (logits.log_softmax(-1) for logits in random_logits(6, 11, dtype=torch.float64))
    flat = SLOPES[name](student.clone(), teacher.clone())
    shaped = SLOPES[name](student.view(2, 3, 11), teacher.view(2, 3, 11))
    torch.testing.assert_close(shaped[0], flat[0].view(2, 3))
    torch.testing.assert_close(shaped[1], flat[1].view(2, 3, 11))


@ALL
def test_rows_do_not_depend_on_the_blocks_they_are_in(name):
    student, teacher = random_logits(5, CPU_BLOCK // 2 - 1, dtype=torch.float32, spread=6)
    alone = logit_gradient(name, student[2:3].clone(), teacher[2:3].clone())
    together = logit_gradient(name, student, teacher)
    for one, all_of_them in zip(alone, together, strict=True):
        torch.testing.assert_close(all_of_them[2:3], one)


@ALL
def test_float32_keeps_its_digits_over_a_large_vocabulary(name):
    student, teacher = random_logits(2, 150_000, dtype=torch.float64, spread=3)
    exact = logit_gradient(name, 10 + student, 10 + teacher)
    rounded = logit_gradient(name, 10 + student.float(), 10 + teacher.float())
    for actual, expected in zip(rounded, exact, strict=True):
        assert (actual - expected).norm() < 5e-6 * expected.norm()


@ALL
def test_a_function_of_the_users_is_differentiated(name):
    student, teacher = random_logits(3, 20, dtype=torch.float64)
    expected = logit_gradient(name, student.clone(), teacher.clone(), options=OPTIONS.get(name))
    memory = student.data_ptr()
    actual = logit_gradient(f"distill.divergences:{name}", student, teacher, options=OPTIONS.get(name))
    torch.testing.assert_close(actual, expected)
    assert actual[1].data_ptr() == memory
    assert not any(number.requires_grad for number in actual)


@ALL
@DTYPES
def test_far_apart_rows_stay_finite(name, dtype):
    # Softmax and exp underflow to 0 on both sides, at different outcomes and at the same ones.
    student = torch.tensor([[900.0, 0.0, -900.0, 880.0]], dtype=dtype)
    teacher = torch.tensor([[-900.0, 0.0, 900.0, -900.0]], dtype=dtype)
    value, _, gradient = by_autograd(name, {}, student, teacher)
    actual = logit_gradient(name, student, teacher)
    torch.testing.assert_close(actual[0], value)
    torch.testing.assert_close(actual[1], gradient, atol=1e-6, rtol=1e-5)
    assert all(number.isfinite().all() for number in actual)


@DTYPES
def test_infinite_values_have_the_gradient_that_the_mathematics_has(dtype):
    all_first = torch.tensor([[0.0, NEVER]], dtype=dtype)
    allowed = torch.tensor([[0.0, -2000.0]], dtype=dtype)  # a probability that rounds to 0 and is not
    value, gradient, *_ = logit_gradient("forward_kl", all_first.clone(), allowed.clone())
    assert value == INF
    assert gradient.isfinite().all()
    value, gradient, *_ = logit_gradient("reverse_kl", allowed.clone(), all_first.clone())
    assert value == INF
    assert not gradient.isfinite().all()  # so that a run stops, rather than trains on


@ALL
def test_nan_logits_give_nan_and_only_in_their_row(name):
    student, teacher = random_logits(3, 8, dtype=torch.float32)
    student[1, 4] = float("nan")
    value, gradient, student_entropy, _ = logit_gradient(name, student, teacher)
    for rows in (value, gradient.sum(-1), student_entropy):
        assert rows.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_no_rows_give_no_numbers(name):
    value, gradient, *entropies = logit_gradient(name, torch.empty(0, 7), torch.empty(0, 7))
    assert gradient.shape == (0, 7)
    assert all(numbers.shape == (0,) for numbers in (value, *entropies))


@pytest.mark.parametrize("name", OPTIONS)
def test_values_that_the_divergence_refuses_are_refused(name):
    rows = torch.zeros(2, 1, 3)
    for option in OPTIONS[name]:
        with pytest.raises(UserError) as plain:
            DIVERGENCES[name](*rows, **{option: -1.0})
        with pytest.raises(UserError) as closed:
            logit_gradient(name, *rows, options={option: -1.0})
        assert str(closed.value) == str(plain.value)
    with pytest.raises(UserError, match=f"divergence '{name}' takes no option 'gamma': accepted are"):
        logit_gradient(name, *rows, options={"gamma": 1.0})


def test_an_unknown_divergence_is_refused():
    with pytest.raises(UserError, match="unknown divergence 'forward': known are forward_kl"):
        logit_gradient("forward", torch.zeros(1, 3), torch.zeros(1, 3))


# TRL's beta is 0 for the forward KL and 1 for the reverse; in between it is the *teacher's* share of the mixture and
# the weight of KL(teacher || mixture), as `weight` of `jsd` is. So its ends are not the limits of its middle.
@pytest.mark.parametrize(
    ("name", "options", "beta"),
    [("forward_kl", {}, 0.0), ("reverse_kl", {}, 1.0)] + [("jsd", {"weight": w}, w) for w in (0.1, 0.5, 0.8)],
)
def test_values_and_gradients_agree_with_trl(name, options, beta):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    generator = torch.Generator().manual_seed(0)
    positions, vocabulary = 6, 301
    hidden, teacher_hidden = (torch.randn(positions, width, generator=generator) for width in (16, 24))
    head, teacher_head = (torch.randn(vocabulary, width, generator=generator) for width in (16, 24))
    upstream = torch.rand(positions, generator=generator)
    for leaf in (hidden, head):
        leaf.requires_grad_()

    trl, trl_entropy = ChunkedDivergenceFunction.apply(hidden, head, None, teacher_hidden, teacher_head, None, beta)
    expected = torch.autograd.grad(trl @ upstream, (hidden, head))

    teacher_logits = teacher_hidden @ teacher_head.T
    plain = DIVERGENCES[name]((hidden @ head.T).log_softmax(-1), teacher_logits.log_softmax(-1), **options)
    torch.testing.assert_close(plain, trl, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(plain @ upstream, (hidden, head)), expected, atol=1e-5, rtol=1e-4)

    with torch.no_grad():
        closed, gradient, own_entropy, _ = logit_gradient(name, hidden @ head.T, teacher_logits, options=options)
        gradient *= upstream.unsqueeze(-1)
        torch.testing.assert_close(closed, trl, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own_entropy, trl_entropy, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close((gradient @ head, gradient.T @ hidden), expected, atol=1e-5, rtol=1e-4)
