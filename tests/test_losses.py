"""The loss modes on whole tiny models: equality with plain references, and what must not change a gradient.

Parametrised over `LOSSES`: a registered mode is a tested mode.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from distill.batch import Batch, PolicyRows, collate
from distill.errors import UserError
from distill.forward import read_head, run
from distill.losses import LOSSES, LossOutput
from distill.losses.mixture import Mixture
from distill.render import Example

TOKENS = 259
MODES = pytest.mark.parametrize("name", LOSSES)


def examples(count: int = 4, seed: int = 0) -> list[Example]:
    """Sequences of different lengths; a prompt of weight 0, then weights of 1, 0 and 0.5."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt, length = int(rng.integers(1, 6)), int(rng.integers(8, 20))
        weights = rng.choice([1.0, 1.0, 0.0, 0.5], size=length).astype(np.float32)
        weights[:prompt], weights[-1] = 0.0, 1.0
        made.append(Example(rng.integers(0, TOKENS, size=length).astype(np.int32), weights))
    return made


def evaluate(name: str | dict[str, float], student, teacher, batch: Batch, progress: float = 0.5, **options):
    """One batch under a mode with these options, or under a mixture (options by mode)."""
    weights = {name: 1.0} if isinstance(name, str) else name
    chosen = {name: options} if isinstance(name, str) else options
    needs = frozenset().union(*(LOSSES[mode].needs for mode in weights))
    taught = bool(needs & {"teacher", "teacher_logits"})
    if "rewards" in needs:  # an advantage that a row keeps, whatever lies beside it
        batch = replace(batch, policy=PolicyRows((batch.input_ids[:, 0] % 7 - 3) / 2))
    loss = Mixture(weights, chosen, student=student, teacher=teacher if taught else None, num_outcomes=TOKENS)
    ours = run(student, read_head(student, "student"), batch, loss.student_capture)
    theirs = None
    if taught:
        with torch.no_grad():
            theirs = run(teacher, read_head(teacher, "teacher"), batch, loss.teacher_capture)
    return loss(ours, theirs, batch, progress=progress)


def gradients(output: LossOutput, model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (output.total / output.weight).backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}


def assert_same(left, right, atol=1e-6):
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], atol=atol, rtol=1e-4, msg=lambda text, k=key: f"{k}: {text}")


@pytest.fixture
def student(make_model):
    return make_model("qwen3", seed=1, tie_word_embeddings=True)


@pytest.fixture
def teacher(make_model):
    return make_model("llama", seed=2, hidden_size=48, vocab_size=264, tie_word_embeddings=False).eval()


@pytest.fixture
def batch():
    return collate(examples(), pad_id=256)


def test_hard_labels_equal_the_models_own_cross_entropy(student, batch):
    ones = Batch(batch.input_ids, batch.attention_mask, (batch.weights > 0).float())
    output = evaluate("hard_labels", student, None, ones)
    labels = ones.input_ids.masked_fill(ones.weights == 0, -100)
    reference = student(input_ids=ones.input_ids, attention_mask=ones.attention_mask, labels=labels).loss
    ours = gradients(output, student)
    torch.testing.assert_close(output.total / output.weight, reference, atol=1e-6, rtol=1e-6)
    student.zero_grad()
    reference.backward()
    assert_same(ours, {key: parameter.grad for key, parameter in student.named_parameters()})


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("hard_label_weight", [0.0, 0.3])
def test_soft_logits_equal_kl_div_on_full_logits(student, teacher, batch, temperature, hard_label_weight):
    output = evaluate(
        "soft_logits", student, teacher, batch, temperature=temperature, hard_label_weight=hard_label_weight
    )
    ours = gradients(output, student)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    logits = student(**inputs).logits[:, :-1]
    with torch.no_grad():
        target = (teacher(**inputs).logits[:, :-1, :TOKENS] / temperature).log_softmax(-1)
    kl = functional.kl_div((logits / temperature).log_softmax(-1), target, log_target=True, reduction="none").sum(-1)
    hard = functional.cross_entropy(logits.transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
    weights = batch.weights[:, 1:]
    reference = (weights * (kl + hard_label_weight * hard)).sum() / weights.sum()
    torch.testing.assert_close(output.total / output.weight, reference, atol=1e-6, rtol=1e-6)
    student.zero_grad()
    reference.backward()
    assert_same(ours, {key: parameter.grad for key, parameter in student.named_parameters()})


@pytest.mark.parametrize(
    "name", [name for name in LOSSES if "chunk_tokens" in inspect.signature(LOSSES[name].fn).parameters]
)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 10_000])
def test_chunk_size_changes_nothing(name, student, teacher, batch, chunk_tokens):
    whole = evaluate(name, student, teacher, batch)
    expected = gradients(whole, student)
    chunked = evaluate(name, student, teacher, batch, chunk_tokens=chunk_tokens)
    assert_same(gradients(chunked, student), expected)
    assert_same(chunked.metrics, whole.metrics, atol=1e-4)


@MODES
def test_padding_changes_nothing(name, student, teacher):
    alone = [collate([example], pad_id=256) for example in examples()]
    padded = collate(examples(), pad_id=7)  # another padding token too
    wider = Batch.from_tensors({name: functional.pad(field, (0, 9)) for name, field in padded.tensors().items()})
    results = []
    for batches in (alone, [padded], [wider]):
        outputs = [evaluate(name, student, teacher, batch) for batch in batches]
        mass = sum(output.weight for output in outputs)
        results.append(gradients(LossOutput(sum(output.total for output in outputs), mass), student))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@MODES
def test_tokens_of_weight_zero_take_no_part(name, student, teacher, batch):
    """A row's last token can be anything once its weight is 0: nothing attends to it but its successors."""
    row, last = 0, int(batch.attention_mask[0].sum()) - 1
    batch.weights[row, last] = 0.0
    before = gradients(evaluate(name, student, teacher, batch), student)
    batch.input_ids[row, last] = (batch.input_ids[row, last] + 1) % TOKENS
    assert_same(gradients(evaluate(name, student, teacher, batch), student), before, atol=1e-7)


@MODES
def test_weights_scale_what_each_token_contributes(name, student, teacher, batch):
    doubled = Batch(batch.input_ids, batch.attention_mask, batch.weights * 2)
    once, twice = (evaluate(name, student, teacher, b) for b in (batch, doubled))
    torch.testing.assert_close(twice.total, once.total * 2)
    torch.testing.assert_close(twice.weight, once.weight * 2)


@MODES
def test_only_the_student_gets_gradients_and_a_batch_without_trained_tokens_gives_zeros(name, student, teacher, batch):
    empty = Batch(batch.input_ids, batch.attention_mask, torch.zeros_like(batch.weights))
    output = evaluate(name, student, teacher, empty)
    assert output.total == 0
    assert output.weight == 0
    output.total.backward()
    assert all((p.grad == 0).all() for p in student.parameters() if p.grad is not None)
    evaluate(name, student, teacher, batch).total.backward()
    assert all(p.grad is None for p in teacher.parameters())


class _Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor made meanwhile holds."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.untyped_storage().nbytes() // each.element_size())
        return made


@MODES
def test_full_logits_are_never_held(name, student, teacher):
    """Neither forward nor backward makes a tensor of tokens times vocabulary."""
    batch = collate(examples(count=64), pad_id=256)
    options = {"chunk_tokens": 8} if "chunk_tokens" in inspect.signature(LOSSES[name].fn).parameters else {}
    with _Largest() as largest:
        evaluate(name, student, teacher, batch, **options).total.backward()
    trained = int((batch.weights > 0).sum())
    assert largest.numbers < trained * TOKENS


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "hard_labels"])
def test_a_mixture_is_the_weighted_sum_of_its_modes(name, student, teacher, batch):
    """Also where one mode carries the hard labels along in its own projection."""
    weights = {name: 2.0, "hard_labels": 0.5}
    mixed = evaluate(weights, student, teacher, batch)
    expected = gradients(mixed, student)
    parts = {mode: evaluate(mode, student, teacher, batch) for mode in weights}
    total = sum(weights[mode] * part.total for mode, part in parts.items())
    torch.testing.assert_close(mixed.total, total)
    assert_same(gradients(LossOutput(total, mixed.weight), student), expected)
    torch.testing.assert_close(mixed.metrics["cross_entropy"], parts["hard_labels"].metrics["cross_entropy"])


def test_a_mixture_refuses_what_it_cannot_mean(student, teacher, batch):
    def mix(weights, **options):
        return Mixture(weights, options, student=student, teacher=teacher, num_outcomes=TOKENS)

    for weights, options, said in (
        ({}, {}, "at least one mode"),
        ({"soft_logits": 0.0}, {}, "must be a positive number, not 0.0"),
        ({"soft_logits": float("nan")}, {}, "must be a positive number, not nan"),
        ({"soft_logit": 1.0}, {}, "did you mean 'soft_logits'"),
        ({"soft_logits": 1.0}, {"hard_labels": {}}, "options for 'hard_labels', which is not part"),
        ({"soft_logits": 1.0}, {"soft_logits": {"num_outcomes": 3}}, "num_outcomes is the trainer's to give"),
        ({"soft_logits": 1.0}, {"soft_logits": {"temperatur": 3}}, "did you mean 'temperature'"),
        ({"distill.losses:hard_labels": 1.0}, {}, "must name a distill.losses.LossMode, not a function"),
    ):
        with pytest.raises(UserError, match=said):
            mix(weights, **options)


def test_a_student_that_equals_its_teacher_has_no_divergence_and_full_agreement(student, batch):
    same = copy.deepcopy(student).eval()
    output = evaluate("soft_logits", student.eval(), same, batch)
    assert abs(output.total) < 1e-5
    assert output.metrics["top1_agreement"] == output.weight
    torch.testing.assert_close(output.metrics["student_entropy"], output.metrics["teacher_entropy"])


def test_divergences_and_their_options_are_chosen_by_name(student, teacher, batch):
    half = evaluate("soft_logits", student, teacher, batch, divergence="jsd").total
    skewed = evaluate(
        "soft_logits", student, teacher, batch, divergence="jsd", divergence_options={"weight": 0.1}
    ).total
    assert 0 < skewed < half
    with pytest.raises(UserError, match="did you mean 'reverse_kl'"):
        evaluate("soft_logits", student, teacher, batch, divergence="revers_kl")
    with pytest.raises(UserError, match=r"no option 'wieght'.*'weight'"):
        evaluate("soft_logits", student, teacher, batch, divergence="jsd", divergence_options={"wieght": 0.1})


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 0.5}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
    ],
)
def test_head_and_hidden_states_give_the_models_own_logits(make_model, batch, family, overrides):
    model = make_model(family, **overrides).eval()
    inputs = batch.model_inputs()
    hidden = run(model, read_head(model, "student"), batch)
    torch.testing.assert_close(hidden.head(hidden.hidden), model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_an_unknown_transform_of_the_logits_is_refused(make_model):
    model = make_model("llama")
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits + 1) or output)
    with pytest.raises(UserError, match=r"the student .* transforms its logits"):
        read_head(model, "student")


@pytest.mark.parametrize(
    ("ids", "weights", "said"),
    [([], [], "0 tokens"), ([1, 2], [0.0], "2 tokens and 1 weights"), ([1, 2], [1.0, 1.0], "first token")],
)
def test_examples_that_cannot_be_trained_are_refused(ids, weights, said):
    with pytest.raises(ValueError, match=said):
        collate([Example(np.array(ids, np.int32), np.array(weights, np.float32))], pad_id=0)
