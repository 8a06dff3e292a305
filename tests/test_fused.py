"""The fused loss against the plain one: the loss and every gradient, over supports, divergences, heads and types."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.batch import Batch, TeacherRows
from distill.divergences import DIVERGENCES, NEVER, entropy
from distill.errors import UserError
from distill.forward import Forward
from distill.fused import TeacherHidden, fused_loss
from distill.head import Head
from distill.losses import hard_labels, soft_logits
from distill.supports import (
    DRAWS,
    corrected_outcomes,
    dense,
    sampled,
    sampled_outcomes,
    sampled_target_corrected,
    top_k_with_tail,
)
from distill.taid import interpolated_target

ROWS, WIDTH, TEACHER_WIDTH, TOKENS, STUDENT_VOCABULARY, TEACHER_VOCABULARY, K = 11, 6, 10, 29, 32, 31, 9


@dataclass
class Case:
    """A student's hidden states and head, a teacher's, labels and weights."""

    dtype: torch.dtype = torch.float32
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    rows: int = ROWS
    hidden: Tensor = field(init=False)
    student: Head = field(init=False)
    teacher: Head = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        heads = [
            nn.Linear(width, vocabulary, bias=self.bias).to(self.dtype)
            for width, vocabulary in ((WIDTH, STUDENT_VOCABULARY), (TEACHER_WIDTH, TEACHER_VOCABULARY))
        ]
        for linear in heads:
            nn.init.normal_(linear.weight, std=0.8)
        self.student, self.teacher = (Head(linear, self.scale, self.softcap) for linear in heads)
        self.hidden = torch.randn(self.rows, WIDTH, dtype=self.dtype, requires_grad=True)
        self.teacher_hidden = torch.randn(self.rows, TEACHER_WIDTH, dtype=self.dtype)
        self.labels = torch.randint(0, TOKENS, (self.rows,))
        self.weights = torch.rand(self.rows)

    def running(self) -> TeacherHidden:
        return TeacherHidden(self.teacher_hidden, self.teacher)

    def teacher_logits(self) -> Tensor:
        with torch.no_grad():
            return self.teacher(self.teacher_hidden)[:, :TOKENS]

    def signal(self, kind: str) -> TeacherRows:
        logp = self.teacher_logits().log_softmax(-1)
        if kind == "top_k_with_tail":
            best, ids = logp.topk(K)
            return TeacherRows(ids, best, tail=logp.scatter(1, ids, NEVER).logsumexp(-1))
        drawn = torch.multinomial(logp.exp(), K, replacement=True, generator=torch.Generator().manual_seed(1))
        counts = torch.zeros(logp.shape, dtype=torch.int64).scatter_add_(1, drawn, torch.ones_like(drawn))
        logprobs, ids = logp.masked_fill(counts == 0, NEVER).sort(descending=True)
        logprobs, ids, counts = logprobs[:, :K], ids[:, :K], counts.gather(1, ids[:, :K])
        return TeacherRows(ids.masked_fill(counts == 0, -1), logprobs, counts)

    def fused(self, target: TeacherHidden | TeacherRows | None, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return fused_loss(self.hidden, self.student, self.labels, self.weights, target, num_outcomes=TOKENS, **options)

    def trained(self) -> dict[str, Tensor]:
        return {"hidden": self.hidden} | dict(self.student.linear.named_parameters())

    def gradients(self, total: Tensor) -> dict[str, Tensor]:
        for tensor in self.trained().values():
            tensor.grad = None
        total.backward()
        return {name: tensor.grad for name, tensor in self.trained().items()}


def plain_values(case: Case, kind: str, divergence: str, temperature: float, share: float | None) -> Tensor:
    """The divergence of every row from full logits, by autograd alone."""
    logits, compare = case.student(case.hidden), DIVERGENCES[divergence]
    if kind == "dense":
        teacher = case.teacher_logits()
        if share is not None:
            teacher = interpolated_target(logits[:, :TOKENS], teacher, share=share)
        both = {"student_temperature": temperature, "teacher_temperature": temperature}
        return compare(*dense(logits, teacher, num_outcomes=TOKENS, **both))
    if kind == "running_top_k":
        logp = (case.teacher_logits() / temperature).log_softmax(-1)
        best, ids = logp.topk(K)
        rows = TeacherRows(ids, best, tail=logp.scatter(1, ids, NEVER).logsumexp(-1))
        return compare(*top_k_with_tail(logits / temperature, rows, num_outcomes=TOKENS))
    rows = case.signal(kind)
    if kind == "top_k_with_tail":
        return compare(*top_k_with_tail(logits, rows, num_outcomes=TOKENS))
    support, outcomes = {
        "sampled": (sampled, sampled_outcomes),
        "sampled_target_corrected": (sampled_target_corrected, corrected_outcomes),
    }[kind]
    return compare(*support(logits, rows, num_outcomes=TOKENS)) + outcomes(rows, num_outcomes=TOKENS).offset


def target_of(case: Case, kind: str) -> tuple[TeacherHidden | TeacherRows, dict[str, Any]]:
    if kind == "dense":
        return case.running(), {}
    if kind == "running_top_k":
        return case.running(), {"support": "top_k_with_tail", "top_k": K}
    return case.signal(kind), {"support": kind}


def assert_near(ours: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        error = (ours[name].double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


STORED_KINDS = ("top_k_with_tail", "sampled", "sampled_target_corrected")
PAIRS = [
    (kind, name)
    for kind in ("dense", "running_top_k", *STORED_KINDS)
    for name in DIVERGENCES
    if kind not in DRAWS or name == "forward_kl"
]
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias_scale_softcap": {"bias": True, "scale": 1.7, "softcap": 2.5},
    "float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize(("kind", "divergence"), PAIRS)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_every_gradient_equal_the_plain_ones(kind, divergence, head):
    case = Case(**HEADS[head])
    target, options = target_of(case, kind)
    for temperature in (1.0,) if kind in STORED_KINDS else (1.0, 2.5):
        for hard in (0.0, 0.3):
            total, metrics = case.fused(
                target,
                divergence=divergence,
                soft_weight=1.3,
                hard_weight=hard,
                student_temperature=temperature,
                teacher_temperature=temperature,
                chunk_tokens=4,
                **options,
            )
            values = plain_values(case, kind, divergence, temperature, None)
            cross_entropy = functional.cross_entropy(case.student(case.hidden), case.labels, reduction="none")
            reference = (case.weights * (1.3 * values + hard * cross_entropy)).sum()
            # A signal's own numbers are float64 here when the teacher is: the tolerance is arithmetic alone.
            tolerance = 1e-5 if case.dtype == torch.float32 else 1e-11
            assert_near({"total": total.detach()}, {"total": reference.detach()}, tolerance)
            assert_near(case.gradients(total), case.gradients(reference), tolerance)
            torch.testing.assert_close(metrics["divergence"], (case.weights * values).sum().detach())
            if hard:
                torch.testing.assert_close(metrics["cross_entropy"], (case.weights * cross_entropy).sum().detach())


def test_hard_labels_alone_go_over_the_models_full_width():
    case = Case(bias=True, softcap=2.5)
    total, metrics = case.fused(None, hard_weight=0.7, chunk_tokens=3)
    logits = case.student(case.hidden)
    reference = 0.7 * (case.weights * functional.cross_entropy(logits, case.labels, reduction="none")).sum()
    assert_near(case.gradients(total), case.gradients(reference), 1e-5)
    assert metrics.keys() == {"cross_entropy", "token_accuracy"}
    right = (logits.argmax(-1) == case.labels).float()
    torch.testing.assert_close(metrics["token_accuracy"], case.weights @ right)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_taid_compares_with_the_moving_target(divergence, share):
    case = Case()
    total, _ = case.fused(case.running(), divergence=divergence, share=share)
    reference = (case.weights * plain_values(case, "dense", divergence, 1.0, share)).sum()
    if share:
        assert_near(case.gradients(total), case.gradients(reference), 1e-5)
    else:  # the target is the student itself
        assert all(gradient.abs().max() < 1e-5 for gradient in case.gradients(total).values())


def test_a_slope_is_the_difference_of_the_loss():
    """No reference at all: finite differences in float64 along random directions."""
    case = Case(dtype=torch.float64, bias=True, scale=0.7, softcap=3.0)
    for kind in ("dense", *STORED_KINDS):
        target, options = target_of(case, kind)
        total, _ = case.fused(target, hard_weight=0.4, **options)
        gradients, step = case.gradients(total), 1e-6
        for name, tensor in case.trained().items():
            direction, sides = torch.randn_like(tensor), []
            for sign in (1, -1):
                with torch.no_grad():
                    tensor.add_(direction, alpha=sign * step)
                    sides.append(case.fused(target, hard_weight=0.4, **options)[0])
                    tensor.sub_(direction, alpha=sign * step)
            slope = (gradients[name] * direction).sum()
            torch.testing.assert_close((sides[0] - sides[1]) / (2 * step), slope, atol=1e-7, rtol=1e-6)


def test_a_tied_matrix_gets_the_gradients_of_both_its_uses():
    case, ids = Case(), torch.randint(0, TOKENS, (ROWS,))
    matrix = case.student.linear.weight
    results = []
    for fused in (True, False):
        matrix.grad = None
        case.hidden = torch.tanh(matrix[ids])
        if fused:
            total, _ = case.fused(case.running(), hard_weight=0.1)
        else:
            hard = functional.cross_entropy(case.student(case.hidden), case.labels, reduction="none")
            total = (case.weights * (plain_values(case, "dense", "forward_kl", 1.0, None) + 0.1 * hard)).sum()
        total.backward()
        results.append({"matrix": matrix.grad})
    assert_near(*results, 1e-5)


@pytest.mark.parametrize("kind", ["dense", "running_top_k", *STORED_KINDS])
def test_chunks_change_nothing(kind):
    case = Case(rows=150)  # more rows than have their likeliest outcomes compared
    target, options = target_of(case, kind)
    whole, metrics = case.fused(target, hard_weight=0.5, **options)
    expected = case.gradients(whole)
    for chunk_tokens in (1, 7, 1000):
        total, same = case.fused(target, hard_weight=0.5, chunk_tokens=chunk_tokens, **options)
        assert_near({"total": total.detach()} | same, {"total": whole.detach()} | metrics, 1e-5)
        assert_near(case.gradients(total), expected, 1e-5)


class Neighbours:
    """A target that compares every row with the one before it."""

    reach = 1

    def __init__(self, case: Case) -> None:
        self.weights, self.owed = case.weights, None

    def load(self, piece: slice) -> None:
        """There is nothing to project."""

    @staticmethod
    def values(logits: Tensor) -> Tensor:
        """Return (n,) of n + 1 rows."""
        logp = logits.log_softmax(-1)
        return (logp[1:].exp() * (logp[1:] - logp[:-1].tanh())).sum(-1)

    def compare(self, student: Tensor, first: int, rows: slice, picked: slice, before: Tensor | None) -> dict:
        assert (before is None) == (rows.start == 0)
        lead = int(before is not None)
        with torch.enable_grad():
            leaf = (torch.cat([before, student]) if lead else student).detach().requires_grad_()
            values = self.values(leaf)
            weights = self.weights[rows.start - lead : rows.stop].to(student.dtype)
            (gradient,) = torch.autograd.grad(weights[1:] @ values, leaf)
        gradient /= weights[:, None]
        if self.owed is not None:
            gradient[-1] += self.owed
        self.owed = gradient[0] if lead else None
        student.copy_(gradient[lead:])
        return {"divergence": values.detach() if lead else torch.cat([values.new_zeros(1), values.detach()])}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_tokens", [1, 3, ROWS])
def test_a_target_may_read_the_row_before(monkeypatch, head, chunk_tokens):
    monkeypatch.setattr("distill.fused.CPU_BLOCK", 2 * STUDENT_VOCABULARY)
    case = Case(**HEADS[head])
    total, _ = case.fused(Neighbours(case), hard_weight=0.5, chunk_tokens=chunk_tokens)
    ours = case.gradients(total)
    logits = case.student(case.hidden)
    hard = functional.cross_entropy(logits, case.labels, reduction="none")
    plain = (case.weights[1:] * Neighbours.values(logits[:, :TOKENS])).sum() + 0.5 * (case.weights * hard).sum()
    torch.testing.assert_close(total, plain.to(total.dtype), rtol=1e-5, atol=1e-6)
    assert_near(ours, case.gradients(plain), 1e-5)


def test_metrics_are_what_full_logits_say():
    case = Case()
    _, metrics = case.fused(case.running(), student_temperature=2.0, teacher_temperature=0.5)
    student, teacher = case.student(case.hidden)[:, :TOKENS].detach(), case.teacher_logits()
    best = [logits.topk(8).indices for logits in (student, teacher)]
    overlap = torch.tensor([len({*a.tolist()} & {*b.tolist()}) / 8 for a, b in zip(*best, strict=True)])
    expected = {
        "student_entropy": entropy((student / 2).log_softmax(-1)),
        "teacher_entropy": entropy((teacher / 0.5).log_softmax(-1)),
        "top1_agreement": (student.argmax(-1) == teacher.argmax(-1)).float(),
    }
    for name, values in expected.items():
        torch.testing.assert_close(metrics[name], case.weights @ values)
    torch.testing.assert_close(metrics["top_k_overlap"], torch.stack([case.weights @ overlap, case.weights.sum()]))


@pytest.mark.parametrize("kind", STORED_KINDS)
def test_signals_tell_the_metrics_that_can_be_known(kind):
    case = Case()
    _, metrics = case.fused(case.signal(kind), support=kind)
    _, whole = case.fused(case.running())
    torch.testing.assert_close(metrics["student_entropy"], whole["student_entropy"])
    if kind == "top_k_with_tail":
        assert metrics["teacher_entropy"] < whole["teacher_entropy"]
        for name in ("top1_agreement", "top_k_overlap"):
            torch.testing.assert_close(metrics[name], whole[name])
    else:
        assert not {"top1_agreement", "top_k_overlap"} & metrics.keys()
    _, counted = case.fused(case.signal("sampled")._replace(logprobs=None))
    assert "teacher_entropy" not in counted


@pytest.mark.parametrize("kind", ["none", "dense", "running_top_k", *STORED_KINDS])
def test_no_rows_give_zeros_with_their_graph_and_their_names(kind):
    case, whole = Case(bias=True, softcap=3.0, rows=0), Case(bias=True, softcap=3.0)
    target, options = (None, {}) if kind == "none" else target_of(case, kind)
    total, metrics = case.fused(target, hard_weight=1.0, **options)
    assert total == 0
    assert all(not value.any() for value in metrics.values())
    some, options = (None, {}) if kind == "none" else target_of(whole, kind)
    assert metrics.keys() == whole.fused(some, hard_weight=1.0, **options)[1].keys()
    assert all(gradient is not None and not gradient.any() for gradient in case.gradients(total).values())


def test_a_row_of_weight_zero_trains_nothing():
    case = Case()
    case.weights[3] = 0.0
    gradients = case.gradients(case.fused(case.running(), hard_weight=1.0)[0])
    assert not gradients["hidden"][3].any()
    case.labels[3] = (case.labels[3] + 1) % TOKENS
    case.teacher_hidden[3] += 1
    assert_near(case.gradients(case.fused(case.running(), hard_weight=1.0)[0]), gradients, 1e-6)


def test_what_is_frozen_gets_no_gradient_and_without_gradients_there_is_only_the_loss():
    case = Case()
    total, _ = case.fused(case.running())
    expected = case.gradients(total)["hidden"]
    case.student.linear.requires_grad_(False)
    gradients = case.gradients(case.fused(case.running())[0])
    assert gradients["weight"] is None
    torch.testing.assert_close(gradients["hidden"], expected)
    with torch.no_grad():
        alone, _ = case.fused(case.running())
    assert not alone.requires_grad
    torch.testing.assert_close(alone, total.detach())


class Sizes(TorchDispatchMode):
    """The number of elements of every tensor that an operation makes in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and memory(leaf) not in given]
        self.seen += [tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in made]
        return result


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", ["dense", "running_top_k", *STORED_KINDS])
def test_no_tensor_has_tokens_times_vocabulary(kind):
    case, chunk = Case(rows=600), 8
    target, options = target_of(case, kind)
    with Sizes() as sizes:
        total, _ = case.fused(target, hard_weight=0.5, chunk_tokens=chunk, **options)
        total.backward()
    signal = 0 if kind in ("dense", "running_top_k") else case.rows * (K + 1)
    assert max(sizes.seen) <= max(chunk * STUDENT_VOCABULARY, case.rows * WIDTH, signal)


def test_the_matrix_gradient_exists_once():
    """It is handed over, not copied: at 152k tokens it is the largest tensor there is."""
    case = Case(rows=3)
    with Sizes() as sizes:
        case.fused(case.running(), chunk_tokens=2)[0].backward()
    assert sizes.seen.count(STUDENT_VOCABULARY * WIDTH) == 1


def test_a_second_backward_pass_is_refused():
    case = Case()
    total, _ = case.fused(case.running())
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward once"):
        total.backward()
    total, _ = case.fused(case.running())
    (gradient,) = torch.autograd.grad(total.square(), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_gradient_of_the_total_is_multiplied_in():
    case = Case()
    once = case.gradients(case.fused(case.running())[0])
    thrice = case.gradients(case.fused(case.running())[0] * 3)
    assert_near(thrice, {name: gradient * 3 for name, gradient in once.items()}, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_adds_up_in_float32(dtype):
    """As near to the exact gradient as the plain loss in the same type, in 300 chunks as in one."""
    case = Case(dtype=dtype, rows=300)
    exact = Case(dtype=torch.float64, rows=300)
    exact.labels, exact.weights = case.labels, case.weights
    pairs = [(exact.hidden, case.hidden), (exact.teacher_hidden, case.teacher_hidden)]
    for mine, theirs in ((exact.student, case.student), (exact.teacher, case.teacher)):
        pairs.append((mine.linear.weight, theirs.linear.weight))
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.copy_(theirs)
    expected = exact.gradients(exact.fused(exact.running(), hard_weight=0.5)[0])
    hard = functional.cross_entropy(case.student(case.hidden), case.labels, reduction="none")
    plain = case.gradients((case.weights * (plain_values(case, "dense", "forward_kl", 1.0, None) + 0.5 * hard)).sum())
    for chunk_tokens in (1, 300):
        total, _ = case.fused(case.running(), hard_weight=0.5, chunk_tokens=chunk_tokens)
        assert total.dtype == torch.float32
        ours = case.gradients(total)
        for name, gradient in expected.items():
            assert ours[name].dtype == dtype
            errors = [(found[name].double() - gradient).norm() / gradient.norm() for found in (ours, plain)]
            assert errors[0] < max(1.2 * errors[1], torch.finfo(dtype).eps)


def test_autocast_multiplies_in_its_own_type_as_without_fusion():
    case = Case(rows=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = case.fused(case.running(), chunk_tokens=10)
        reference = (case.weights * plain_values(case, "dense", "forward_kl", 1.0, None)).sum()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, reference, rtol=1e-5, atol=0)  # both from the same bfloat16 logits
    ours, plain = case.gradients(total), case.gradients(reference)
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    assert_near(ours, plain, 1e-2)


class Doubled(nn.Linear):
    """A head whose forward is its own: nothing may be assumed of it."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) * 2


@pytest.mark.parametrize("odd", ["subclass", "hook"])
def test_a_head_that_is_not_known_to_be_a_matrix_is_called(odd):
    case = Case(bias=True, softcap=4.0)
    linear = Doubled(WIDTH, STUDENT_VOCABULARY)
    linear.load_state_dict(case.student.linear.state_dict())
    if odd == "hook":
        linear = case.student.linear
        linear.register_forward_hook(lambda module, args, output: output * 2)
    case.student = Head(linear, case.scale, case.softcap)
    assert case.student.factors(case.hidden) is None
    total, _ = case.fused(case.running(), hard_weight=0.3, chunk_tokens=4)
    hard = functional.cross_entropy(case.student(case.hidden), case.labels, reduction="none")
    reference = (case.weights * (plain_values(case, "dense", "forward_kl", 1.0, None) + 0.3 * hard)).sum()
    assert_near({"total": total.detach()}, {"total": reference.detach()}, 1e-5)
    assert_near(case.gradients(total), case.gradients(reference), 1e-5)


def test_a_divergence_of_the_users_own_is_differentiated():
    case = Case()
    for target, options in (target_of(case, "dense"), target_of(case, "top_k_with_tail")):
        named = case.gradients(case.fused(target, divergence="jsd", **options)[0])
        own = case.gradients(case.fused(target, divergence="distill.divergences:jsd", **options)[0])
        assert_near(own, named, 1e-5)


REFUSED = {
    "a student too narrow": ("dense", {"num_outcomes": 33}, "the student has 32 logits"),
    "a teacher too narrow": ("dense", {"num_outcomes": 32}, "the teacher has 31 logits"),
    "an unknown divergence": ("dense", {"divergence": "revers_kl"}, "did you mean 'reverse_kl'"),
    "an unknown option": ("top_k_with_tail", {"divergence_options": {"wieght": 1}}, "no option 'wieght'"),
    "an unknown support": ("dense", {"support": "top_k"}, "no support 'top_k' with a running teacher"),
    "dense from a signal": ("sampled", {"support": "dense"}, "no support 'dense' with a stored signal"),
    "top_k of a signal": ("top_k_with_tail", {"top_k": 4}, "a stored signal has its own"),
    "no K": ("dense", {"support": "top_k_with_tail"}, "top_k=None"),
    "a warm signal": ("top_k_with_tail", {"student_temperature": 2.0}, "at temperature 1"),
    "draws under another divergence": ("sampled", {"divergence": "jsd"}, "only forward_kl is linear"),
    "TAID on a signal": ("top_k_with_tail", {"share": 0.5}, "TAID mixes whole rows"),
    "draws that are none": ("top_k_with_tail", {"support": "sampled"}, "no random draws"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_combinations_without_meaning_are_refused(what):
    kind, options, said = REFUSED[what]
    case = Case()
    target = case.running() if kind == "dense" else case.signal(kind)
    with pytest.raises(UserError, match=said):
        fused_loss(case.hidden, case.student, case.labels, case.weights, target, **({"num_outcomes": TOKENS} | options))


def forwards(case: Case) -> tuple[Forward, Forward, Batch]:
    """The case's rows as the predictions of one sequence."""
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), case.labels])[None]
    batch = Batch(ids, torch.ones_like(ids), torch.cat([torch.zeros(1), case.weights])[None])
    ends = [torch.zeros(1, width, dtype=case.dtype) for width in (WIDTH, TEACHER_WIDTH)]
    student = Forward(torch.cat([case.hidden, ends[0]])[None], case.student)
    return student, Forward(torch.cat([case.teacher_hidden, ends[1]])[None], case.teacher), batch


def test_soft_logits_options_mean_what_they_say():
    case = Case()
    student, teacher, batch = forwards(case)
    plain = soft_logits(student, teacher, batch, num_outcomes=TOKENS, temperature=2.0)
    squared = soft_logits(
        student, teacher, batch, num_outcomes=TOKENS, temperature=2.0, scale_by_temperature_squared=True
    )
    torch.testing.assert_close(squared.total, 4 * plain.total)
    torch.testing.assert_close(squared.metrics["divergence"], plain.metrics["divergence"])
    two = soft_logits(student, teacher, batch, num_outcomes=TOKENS, temperature=2.0, teacher_temperature=0.5)
    expected, _ = case.fused(case.running(), student_temperature=2.0, teacher_temperature=0.5)
    torch.testing.assert_close(two.total, expected)
    moving = soft_logits(student, teacher, batch, num_outcomes=TOKENS, taid_start=0.2, taid_end=0.6, progress=0.5)
    torch.testing.assert_close(moving.total, case.fused(case.running(), share=0.4)[0])
    with pytest.raises(UserError, match="must be positive"):
        soft_logits(student, teacher, batch, num_outcomes=TOKENS, temperature=0.0)


@pytest.mark.parametrize("kind", STORED_KINDS)
def test_soft_logits_read_the_signal_where_no_teacher_runs(kind):
    case = Case()
    student, _, batch = forwards(case)
    rows = case.signal(kind) if kind != "sampled" else case.signal(kind)._replace(logprobs=None)
    signalled = Batch(batch.input_ids, batch.attention_mask, batch.weights, signal=rows)
    output = soft_logits(student, None, signalled, num_outcomes=TOKENS)
    torch.testing.assert_close(output.total, case.fused(rows, support=kind)[0])
    torch.testing.assert_close(output.weight, case.weights.sum())


def test_hard_labels_are_the_fused_loss_without_a_teacher():
    case = Case()
    student, _, batch = forwards(case)
    torch.testing.assert_close(hard_labels(student, None, batch).total, case.fused(None, hard_weight=1.0)[0])


@pytest.mark.parametrize(("divergence", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5)])
def test_the_numbers_are_those_of_trl(divergence, beta):
    trl = pytest.importorskip("trl.kernels.chunked_divergence", reason="the extra `bench` is not installed")
    case = Case(scale=0.5, softcap=3.0)
    for linear in (case.student.linear, case.teacher.linear):
        linear.weight = nn.Parameter(linear.weight.detach()[:TOKENS].clone())
    both = [case.student.linear.weight, None, case.teacher_hidden, case.teacher.linear.weight.detach(), None]
    values, own = trl.ChunkedDivergenceFunction.apply(case.hidden, *both, beta, 2.0, 0.5, 3.0, 0.5, 3.0)
    total, metrics = case.fused(case.running(), divergence=divergence, student_temperature=2.0, teacher_temperature=2.0)
    reference = case.weights @ values
    assert_near({"total": total.detach()}, {"total": reference.detach()}, 1e-5)
    assert_near(case.gradients(total), case.gradients(reference), 1e-5)
    torch.testing.assert_close(metrics["student_entropy"], case.weights @ own)


@pytest.mark.parametrize("kind", ["lora", "rslora_with_dropout", "dora"])
def test_lora_on_the_head_trains_its_two_factors(kind):
    """As PEFT's own forward does; of what is no plain LoRA nothing is assumed."""
    peft = pytest.importorskip("peft")
    case = Case()
    model = nn.Sequential()
    model.add_module("head", case.student.linear)
    more = {"lora": {}, "rslora_with_dropout": {"use_rslora": True, "lora_dropout": 0.3}, "dora": {"use_dora": True}}
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["head"], **more[kind])
    adapted = peft.get_peft_model(model, config).base_model.model.head
    nn.init.normal_(adapted.lora_B["default"].weight)
    adapted.eval()
    case.student = Head(adapted)
    factors = case.student.factors(case.hidden)
    assert (factors is None) == (kind == "dora")
    if factors is not None:
        assert [tuple(matrix.shape) for _, matrix in factors.pairs] == [(32, WIDTH), (32, 2)]
    total, _ = case.fused(case.running(), chunk_tokens=4)
    reference = (case.weights * plain_values(case, "dense", "forward_kl", 1.0, None)).sum()
    results = [
        {name: gradient for name, gradient in case.gradients(each).items() if gradient is not None}
        for each in (total, reference)
    ]
    assert {"hidden", "lora_A.default.weight", "lora_B.default.weight"} <= results[0].keys()
    assert "base_layer.weight" not in results[0]
    assert_near(*results, 1e-5)
    adapted.merge()
    merged, _ = case.fused(case.running())
    assert math.isclose(merged.item(), total.item(), rel_tol=1e-5)
