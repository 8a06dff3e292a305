"""Features: distances in closed form, projectors, and the whole loss across architectures, padding and packing."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn import functional
from two_models import assert_same, evaluate, examples, gradients, passes

from distill.batch import Batch, collate
from distill.errors import UserError
from distill.losses import LossMode, LossOutput
from distill.losses.features import DISTANCES, features, features_inner
from distill.projectors import PROJECTORS, Projectors

MODE = LossMode(features, needs=frozenset({"teacher"}), inner=features_inner)
KINDS = pytest.mark.parametrize("kind", DISTANCES)
LEARNED = [name for name in PROJECTORS if name != "none"]


@pytest.fixture
def student(make_model):
    return make_model("llama", seed=1, tie_word_embeddings=True)


@pytest.fixture
def teacher(make_model):
    return make_model(
        "qwen3", seed=2, hidden_size=48, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=3
    ).eval()


@pytest.fixture
def batch():
    return collate(examples(), pad_id=256)


# -- distances


@KINDS
def test_distances_are_zero_at_equality_and_never_negative(kind):
    left, right = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0))
    assert (DISTANCES[kind](left, left) == 0).all()
    assert (DISTANCES[kind](left, left + 1e-7 * right) >= 0).all()
    assert (DISTANCES[kind](left, right) > 0).all()


@KINDS
def test_distances_in_closed_form(kind):
    left, right = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(left, right, strict=True)])
    expected = {
        "mse": torch.stack([functional.mse_loss(*pair) for pair in zip(left, right, strict=True)]),
        "cosine": 1 - functional.cosine_similarity(left, right),
        "normalised": 2 * (1 - correlation),
    }
    torch.testing.assert_close(DISTANCES[kind](left, right), expected[kind], atol=1e-6, rtol=1e-6)


@KINDS
def test_distances_have_their_gradients(kind):
    left, right = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.autograd.gradcheck(DISTANCES[kind], (left.requires_grad_(), right.requires_grad_()))


@pytest.mark.parametrize("kind", ["cosine", "normalised"])
def test_loud_tokens_do_not_count_more(kind):
    left, right = torch.randn(2, 20, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    loud = torch.logspace(0, 3, 20, dtype=torch.float64)[:, None]
    quiet = DISTANCES[kind](left, right)
    torch.testing.assert_close(DISTANCES[kind](loud * left, right * 100), quiet, atol=1e-6, rtol=1e-6)


# -- projectors


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("widths", [(96, 256), (256, 96), (128, 128)])
def test_new_projectors_keep_the_size_of_states(kind, widths):
    projectors = Projectors(kind, {(1, 1): widths})
    (out,) = projectors([torch.randn(500, widths[0], generator=torch.Generator().manual_seed(9))])
    assert out.shape == (500, widths[1])
    assert 0.7 < out.square().mean().sqrt() < 1.3


@pytest.mark.parametrize("kind", LEARNED)
def test_a_seed_alone_decides_a_projectors_weights(kind):
    widths = {(1, 2): (8, 12), (2, 4): (8, 12)}
    state = torch.get_rng_state()
    first = Projectors(kind, widths, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert_same(dict(first.state_dict()), dict(Projectors(kind, widths, seed=3).state_dict()), atol=0)
    other = Projectors(kind, widths, seed=4).state_dict()
    assert not any(torch.equal(other[name], weight) for name, weight in first.state_dict().items())
    left, right = (next(iter(first.maps[name].parameters())) for name in ("1_2", "2_4"))
    assert not torch.equal(left, right)


def test_projectors_between_equal_widths_begin_as_the_identity():
    states = torch.randn(5, 8)
    (out,) = Projectors("linear", {(1, 1): (8, 8)})([states])
    assert torch.equal(out, states)


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("bias", [False, True])
def test_biases_are_there_only_when_asked_for(kind, bias):
    names = [name for name, _ in Projectors(kind, {(2, 4): (8, 12)}, bias=bias).named_parameters()]
    assert all(name.startswith("maps.2_4.") for name in names)
    assert any(name.endswith("bias") for name in names) == bias


def test_a_shared_projector_is_one():
    widths = {(1, 2): (8, 12), (2, 4): (8, 12)}
    shared = Projectors("linear", widths, shared=True)
    assert list(shared.state_dict()) == ["maps.shared.weight"]
    states = torch.randn(5, 8)
    assert torch.equal(*shared([states, states]))
    with pytest.raises(UserError, match="equal widths"):
        Projectors("linear", {(1, 2): (8, 12), (2, 4): (8, 16)}, shared=True)


def test_inner_width_belongs_to_the_mlp():
    assert Projectors("mlp", {(1, 1): (8, 12)}, inner_width=5).maps["1_1"][0].weight.shape == (5, 8)
    for kind, width, says in (("linear", 5, "'mlp' has"), ("mlp", 0, "at least 1")):
        with pytest.raises(UserError, match=says):
            Projectors(kind, {(1, 1): (8, 12)}, inner_width=width)


# -- the loss


def test_the_options_of_the_mode_and_of_its_inner_are_the_same():
    sides = []
    for function in (features, features_inner):
        parameters = inspect.signature(function).parameters.values()
        sides.append({p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "inner"})
    assert sides[0] == sides[1]


@KINDS
@pytest.mark.parametrize("projector", LEARNED)
@pytest.mark.parametrize("layers", ["uniform", "last-1", "0:0,1:3,2:5"])
def test_the_sum_by_hand(kind, projector, layers, student, teacher, batch):
    inner = MODE.inner(student, teacher, kind=kind, projector=projector, layers=layers)
    output = evaluate(MODE, student, teacher, inner, batch, kind=kind, projector=projector, layers=layers)
    ours, theirs = (model.layers for model in passes(student, teacher, inner, batch))
    expected = 0.0
    for row, position in (batch.weights > 0).nonzero().tolist():
        for left, right in inner.plan:
            projected = inner.modules.maps[f"{left}_{right}"](ours[left][row, position - 1])
            distance = DISTANCES[kind](projected[None], theirs[right][row, position - 1][None])[0]
            expected += batch.weights[row, position] * distance / len(inner.plan)
    torch.testing.assert_close(output.total, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(output.weight, batch.weights.sum())
    torch.testing.assert_close(output.metrics["features"], output.total.detach())
    if len(inner.plan) > 1:
        parts = [output.metrics[f"features_{left}_{right}"] for left, right in inner.plan]
        torch.testing.assert_close(sum(parts) / len(parts), output.total.detach(), atol=1e-4, rtol=1e-5)


@KINDS
@pytest.mark.parametrize("projector", ["none", "linear"])
def test_a_model_has_its_own_features(kind, projector, teacher, batch):
    inner = MODE.inner(teacher, teacher, kind=kind, projector=projector, layers="all")
    output = evaluate(MODE, teacher, teacher, inner, batch, kind=kind)
    assert output.total == 0
    assert (inner.modules is None) == (projector == "none")


@KINDS
@pytest.mark.parametrize("projector", LEARNED)
def test_padding_packing_and_splitting_change_nothing(kind, projector, student, teacher):
    inner = MODE.inner(student, teacher, kind=kind, projector=projector)
    padded = collate(examples(), pad_id=7)
    wider = Batch.from_tensors({name: functional.pad(field, (0, 9)) for name, field in padded.tensors().items()})
    packed, groups = (collate(rows, pad_id=256) for rows in ([examples()], [examples()[:3], examples()[3:]]))
    alone = [collate([example], pad_id=256) for example in examples()]
    results = []
    for batches in (alone, [padded], [wider], [packed], [groups]):
        outputs = [evaluate(MODE, student, teacher, inner, batch, kind=kind) for batch in batches]
        whole = LossOutput(sum(output.total for output in outputs), sum(output.weight for output in outputs))
        results.append({"total": whole.total.detach()} | gradients(whole, student, inner))
    for result in results[1:]:
        assert_same(result, results[0], atol=1e-5)


@KINDS
def test_only_states_that_predict_trained_tokens_get_gradients(kind, student, teacher, batch):
    inner = MODE.inner(student, teacher, kind=kind)
    ours, theirs = passes(student, teacher, inner, batch)
    states = list(ours.layers.values())
    for state in states:
        state.retain_grad()
    features(ours, theirs, batch, inner=inner, kind=kind).total.backward()
    predicts = functional.pad(batch.weights[:, 1:] > 0, (0, 1))
    # An earlier state reaches the loss through attention in later blocks too; the last layer's only by itself.
    last = ours.layers[2].grad
    assert (last[~predicts] == 0).all()
    assert (last[predicts].abs().sum(-1) > 0).all()


def test_weights_count_linearly(student, teacher, batch):
    inner = MODE.inner(student, teacher)
    one = evaluate(MODE, student, teacher, inner, batch)
    batch.weights.mul_(3.0)
    three = evaluate(MODE, student, teacher, inner, batch)
    torch.testing.assert_close(three.total, 3 * one.total)
    torch.testing.assert_close(three.weight, 3 * one.weight)


def test_a_batch_that_trains_nothing_is_zero_and_has_a_graph(student, teacher, batch):
    inner = MODE.inner(student, teacher)
    batch.weights.zero_()
    output = evaluate(MODE, student, teacher, inner, batch)
    output.total.backward()
    assert output.total == 0
    assert all((parameter.grad == 0).all() for parameter in inner.modules.parameters())


def test_half_precision_models_are_compared_in_float32(student, teacher, batch):
    inner = MODE.inner(student, teacher)
    exact = evaluate(MODE, student, teacher, inner, batch)
    half = evaluate(MODE, student.bfloat16(), teacher.bfloat16(), inner, batch)
    assert half.total.dtype == torch.float32
    torch.testing.assert_close(half.total, exact.total, atol=0, rtol=0.05)
    half.total.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in inner.modules.parameters())


@KINDS
@pytest.mark.parametrize("projector", LEARNED)
def test_a_few_steps_bring_the_student_closer(kind, projector, student, teacher, batch):
    inner = MODE.inner(student, teacher, kind=kind, projector=projector)
    optimizer = torch.optim.Adam([*student.parameters(), *inner.modules.parameters()], lr=3e-3)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        output = evaluate(MODE, student, teacher, inner, batch, kind=kind)
        (output.total / output.weight).backward()
        optimizer.step()
        values.append(float(output.total.detach()))
    assert values[-1] < 0.8 * values[0]
    assert not any("projector" in name for name in student.state_dict())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "mae"}, "unknown kind of feature 'mae'"),
        ({"projector": "conv"}, "unknown projector 'conv'"),
        ({"projector": "none"}, "width 32, the teacher's 48"),
        ({"layers": "all"}, "equal depth"),
        ({"layers": "3:1"}, "student has 2 blocks"),
    ],
)
def test_refused_before_training(options, says, student, teacher):
    with pytest.raises(UserError, match=says):
        MODE.inner(student, teacher, **options)
