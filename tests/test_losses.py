"""The loss modes on whole tiny models: equality with plain references, and what must not change a gradient.

Parametrised over `LOSSES`: a registered mode is a tested mode.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

from distill.batch import Batch, collate
from distill.errors import UserError
from distill.forward import read_head, run
from distill.losses import LOSSES, LossOutput
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


def evaluate(name: str, student, teacher, batch: Batch, **options) -> LossOutput:
    mode = LOSSES[name]
    forwards = [run(student, read_head(student, "student"), batch.input_ids, batch.attention_mask)]
    if mode.needs:
        options = {"num_outcomes": TOKENS, **options}
        with torch.no_grad():
            forwards.append(run(teacher, read_head(teacher, "teacher"), batch.input_ids, batch.attention_mask))
    else:
        forwards.append(None)
    return mode.fn(*forwards, batch, **options)


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


@MODES
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
    wider = Batch(*(functional.pad(field, (0, 9)) for field in padded.tensors().values()))
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


@MODES
def test_full_logits_are_never_held(name, student, teacher):
    """Nothing of vocabulary width is kept for the backward pass: chunks are recomputed there."""
    batch = collate(examples(count=16), pad_id=256)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        evaluate(name, student, teacher, batch, chunk_tokens=8)
    assert len(kept) > 50
    head_weights = ((32, TOKENS), (48, 264))
    assert not [shape for shape in kept if shape and shape[-1] >= TOKENS and shape not in head_weights]


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
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    hidden = run(model, read_head(model, "student"), **inputs)
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
