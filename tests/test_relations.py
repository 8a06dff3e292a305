"""Relations: every matrix against a plain reference and its invariances, and the loss across architectures."""

from __future__ import annotations

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from two_models import TOKENS, assert_same, evaluate, examples, gradients, passes

from distill.batch import Batch, collate
from distill.errors import UserError
from distill.losses import LossMode, LossOutput
from distill.losses.relations import RELATIONS, View, relations, relations_inner
from distill.relation_matrices import attention_relations, cka, cosine_grams, rkd_angle, rkd_distance
from distill.sequences import sequences

MODE = LossMode(relations, needs=frozenset({"teacher"}), inner=relations_inner)
KINDS = pytest.mark.parametrize("kind", RELATIONS)
TWO_LAYERS = "1:3,2:5"


def points(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def view(student: torch.Tensor, teacher: torch.Tensor, before: int = 3) -> View:
    """The first `before` of the tokens are the context."""
    seen = torch.ones(len(student) - before, before, dtype=torch.bool)
    return View(student[before:], student[:before], teacher[before:], teacher[:before], seen)


def compare(kind: str, seen: View) -> torch.Tensor:
    return RELATIONS[kind].compare(seen, **({"heads": 2} if RELATIONS[kind].attention else {}))


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


# -- the kinds, as functions of two sets of points


@KINDS
@given(
    tokens=st.integers(4, 20),
    before=st.integers(1, 6),
    widths=st.tuples(st.sampled_from([2, 6, 40]), st.sampled_from([2, 6, 40])),
    sizes=st.tuples(st.sampled_from([1e-3, 1.0, 300.0]), st.sampled_from([1e-3, 1.0, 300.0])),
    seed=st.integers(0, 99),
)
def test_zero_at_equality_and_never_negative(kind, tokens, before, widths, sizes, seed):
    left, right = (
        points(seed + side, before + tokens, width).float() * size
        for side, (width, size) in enumerate(zip(widths, sizes, strict=True))
    )
    near = left * (1 + 1e-6 * points(seed + 2, *left.shape).float())
    below = -1e-6 if kind == "attention" else 0.0  # a sum of t log(t / s) may round to less than 0
    assert compare(kind, view(left, left, before)) == 0
    assert compare(kind, view(left, near, before)) >= below
    assert compare(kind, view(left, right, before)) >= below


@KINDS
def test_different_relations_are_told_apart(kind):
    assert compare(kind, view(points(0, 12, 8), points(1, 12, 6))) > 1e-3


@KINDS
def test_gradients_in_float64(kind):
    left, right = points(3, 9, 8), points(4, 9, 6)

    def value(states):
        return compare(kind, view(states, right))

    assert torch.autograd.gradcheck(value, (left.requires_grad_(),))


@KINDS
def test_rotations_of_either_space_change_nothing(kind):
    left, right = points(5, 12, 8), points(6, 12, 6)
    turns = [torch.linalg.qr(points(seed, width, width)).Q for seed, width in ((7, 8), (8, 6))]
    if kind == "attention":  # within each relation head
        turns = [torch.block_diag(*(torch.linalg.qr(points(9, w // 2, w // 2)).Q for _ in range(2))) for w in (8, 6)]
    turned = compare(kind, view(left @ turns[0], right @ turns[1]))
    torch.testing.assert_close(turned, compare(kind, view(left, right)))


@pytest.mark.parametrize("kind", [name for name in RELATIONS if name != "attention"])
def test_scale_changes_nothing(kind):
    left, right = points(5, 12, 8), points(6, 12, 6)
    torch.testing.assert_close(compare(kind, view(left * 50, right / 7)), compare(kind, view(left, right)))


@pytest.mark.parametrize("kind", ["rkd_distance", "rkd_angle", "cka", "cka_debiased"])
def test_a_shift_of_all_tokens_changes_nothing(kind):
    left, right = points(5, 12, 8), points(6, 12, 6)
    shifted = compare(kind, view(left + 100 * points(9, 8), right - 30))
    torch.testing.assert_close(shifted, compare(kind, view(left, right)), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["rkd_distance", "rkd_angle", "gram", "cka", "cka_debiased"])
def test_order_changes_nothing(kind):
    left, right = points(5, 12, 8), points(6, 12, 6)
    order = torch.cat([torch.arange(3), 3 + torch.randperm(9, generator=torch.Generator().manual_seed(1))])
    torch.testing.assert_close(compare(kind, view(left[order], right[order])), compare(kind, view(left, right)))


@KINDS
def test_tokens_that_coincide_have_finite_gradients(kind):
    """A repeated token has equal embeddings, so distances of 0; and all tokens may be one."""
    right = points(4, 9, 6).float()
    for states in (points(3, 4, 8).float()[[0, 1, 1, 2, 2, 3, 3, 0, 3]], torch.ones(9, 8)):
        states.requires_grad_()
        value = compare(kind, view(states, right))
        value.backward()
        assert value.isfinite()
        assert states.grad.isfinite().all()


# -- plain references


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) <= 1 else abs(difference) - 0.5


def test_rkd_distance_by_loops():
    left, right = points(0, 7, 5), points(1, 7, 3) * torch.arange(1, 8)[:, None]
    pairs = list(itertools.permutations(range(7), 2))
    relative = []
    for states in (left, right):
        distances = [math.dist(states[i].tolist(), states[j].tolist()) for i, j in pairs]
        relative.append([distance / (sum(distances) / len(distances)) for distance in distances])
    expected = sum(huber(a - b) for a, b in zip(*relative, strict=True)) / len(pairs)
    assert rkd_distance(left, right).item() == pytest.approx(expected, rel=1e-12)


def test_rkd_angle_by_loops():
    left, right = points(0, 6, 5), points(1, 6, 3)
    triples = list(itertools.permutations(range(6), 3))

    def cosine(states, i, j, k):
        return functional.cosine_similarity(states[i] - states[j], states[k] - states[j], dim=0).item()

    expected = sum(huber(cosine(left, *triple) - cosine(right, *triple)) for triple in triples) / len(triples)
    assert rkd_angle(left, right).item() == pytest.approx(expected, rel=1e-10)


def test_cosine_grams_by_loops():
    rows, others, their_rows, their_others = points(0, 4, 5), points(1, 3, 5), points(2, 4, 6), points(3, 3, 6)
    visible = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
    squares = [
        (
            functional.cosine_similarity(rows[i], others[j], dim=0)
            - functional.cosine_similarity(their_rows[i], their_others[j], dim=0)
        )
        ** 2
        for i, j in visible.nonzero().tolist()
    ]
    torch.testing.assert_close(cosine_grams(rows, others, their_rows, their_others, visible), sum(squares) / 8)


def test_cka_by_its_definition():
    left, right = points(0, 9, 5) + 3, points(1, 9, 4) + shared_line(9)
    centring = torch.eye(9, dtype=torch.float64) - 1 / 9

    def hsic(k, m):
        return torch.trace(k @ centring @ m @ centring) / (9 - 1) ** 2

    k, m = left @ left.T, right @ right.T
    torch.testing.assert_close(1 - cka(left, right), hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())
    # The other form, by features.
    x, y = left - left.mean(0), right - right.mean(0)
    by_features = (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    torch.testing.assert_close(1 - cka(left, right), by_features)


def shared_line(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float64)[:, None]


def test_debiased_cka_by_the_unbiased_estimate_of_hsic():
    left, right = points(0, 9, 5) + 3, points(1, 9, 4) + shared_line(9)
    n = 9
    ones = torch.ones(n, dtype=torch.float64)

    def hsic(k, m):  # Song et al. 2012
        k, m = k - k.diag().diag(), m - m.diag().diag()
        first, second = torch.trace(k @ m), ones @ k @ ones * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return (first + second - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))

    k, m = left @ left.T, right @ right.T
    expected = 1 - hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()
    torch.testing.assert_close(cka(left, right, debiased=True), expected)


def test_few_tokens_in_many_channels_are_alike_only_to_plain_cka():
    left, right = points(0, 20, 2000), points(1, 20, 2000)
    assert cka(left, right) < 0.1
    assert cka(left, right, debiased=True) > 0.8


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_relations_by_loops(heads):
    """MiniLMv2, from 8 and 12 channels, whatever the models' own heads were."""
    left, right, before = points(0, 6, 8), points(1, 6, 12), 2
    expected = 0.0
    for i in range(before, 6):
        for head in range(heads):
            rows = []
            for states in (left, right):
                width = states.shape[1] // heads
                part = states[:, head * width : (head + 1) * width]
                rows.append(torch.stack([part[i] @ part[j] / math.sqrt(width) for j in range(i + 1)]).softmax(0))
            expected += functional.kl_div(rows[0].log(), rows[1], reduction="sum") / heads / (6 - before)
    visible = torch.ones(4, 6).tril(before).bool()
    value = attention_relations(left[before:], left, right[before:], right, visible, heads=heads)
    torch.testing.assert_close(value, expected)


# -- sequences of a batch


def test_sequences_are_the_same_padded_and_packed():
    made = examples(5, seed=3)
    packed = collate([made[:4], made[4:]], pad_id=0)  # the second row ends in padding
    lengths = [len(example.input_ids) for example in made]
    starts = [(0, sum(lengths[:i])) for i in range(4)] + [(1, 0)]
    apart = list(zip(sequences(collate(made, pad_id=0)), sequences(packed), starts, made, strict=True))
    for one, other, (row, start), example in apart:
        expected = np.flatnonzero(example.weights) - 1
        assert one.response.tolist() == expected.tolist()
        assert one.context.tolist() == sorted(set(range(expected[-1])) - set(expected.tolist()))
        assert one.mass == pytest.approx(example.weights.sum())
        assert other.response.tolist() == (one.response + start).tolist()
        assert other.context.tolist() == (one.context + start).tolist()
        assert (other.row, other.mass) == (row, one.mass)


def test_sequences_that_train_nothing_are_left_out():
    made = examples(3)
    made[1].weights[:] = 0
    assert [sequence.row for sequence in sequences(collate(made, pad_id=0))] == [0, 2]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 13, 40])
def test_samples_are_even_and_keep_both_ends(count):
    whole = next(sequences(Batch(torch.zeros(1, 20), torch.ones(1, 20), torch.tensor([[0.0] * 7 + [1.0] * 13]))))
    taken = whole.sample(count).response
    assert len(taken) == min(count, 13)
    assert taken[0] == 6
    assert count == 1 or taken[-1] == 18
    assert len(taken) < 2 or (taken.diff().max() - taken.diff().min() <= 1 and taken.diff().min() >= 1)


# -- the loss


def test_the_options_of_the_mode_and_of_its_inner_are_the_same():
    sides = []
    for function in (relations, relations_inner):
        parameters = inspect.signature(function).parameters.values()
        sides.append({p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "inner"})
    assert sides[0] == sides[1]


@KINDS
def test_a_model_has_its_own_relations(kind, teacher, batch):
    inner = MODE.inner(teacher, teacher, kind=kind, layers="all")
    output = evaluate(MODE, teacher, teacher, inner, batch)
    assert output.total == 0
    assert inner.modules is None


@KINDS
@pytest.mark.parametrize("layers", ["last-1", TWO_LAYERS])
def test_the_sum_by_hand(kind, layers, student, teacher, batch):
    inner = MODE.inner(student, teacher, kind=kind, layers=layers)
    output = evaluate(MODE, student, teacher, inner, batch)
    ours, theirs = passes(student, teacher, inner, batch)
    expected = 0.0
    for row in range(len(batch.weights)):
        response = (batch.weights[row] > 0).nonzero()[:, 0] - 1
        context = torch.tensor([p for p in range(int(response[-1])) if p not in response], dtype=torch.int64)
        seen = context < response[:, None]
        for pair, heads in inner.plan.pairs.items():
            if kind == "attention":
                both = zip(ours.attention[pair[0]], theirs.attention[pair[1]], strict=True)
            else:
                both = [(ours.layers[pair[0]], theirs.layers[pair[1]])]
            for left, right in both:
                one = View(left[row][response], left[row][context], right[row][response], right[row][context], seen)
                value = RELATIONS[kind].compare(one, **({"heads": heads} if kind == "attention" else {}))
                expected += batch.weights[row].sum() * value / len(inner.plan.pairs)
    torch.testing.assert_close(output.total, expected)
    torch.testing.assert_close(output.weight, batch.weights.sum())
    torch.testing.assert_close(output.metrics["relations"], output.total.detach())


@KINDS
def test_padding_packing_and_splitting_change_nothing(kind, student, teacher):
    inner = MODE.inner(student, teacher, kind=kind, layers=TWO_LAYERS, max_tokens=7)
    padded = collate(examples(), pad_id=7)
    wider = Batch.from_tensors({name: functional.pad(field, (0, 9)) for name, field in padded.tensors().items()})
    packed, groups = (collate(rows, pad_id=256) for rows in ([examples()], [examples()[:3], examples()[3:]]))
    alone = [collate([example], pad_id=256) for example in examples()]
    results = []
    for batches in (alone, [padded], [wider], [packed], [groups]):
        outputs = [evaluate(MODE, student, teacher, inner, batch) for batch in batches]
        whole = LossOutput(sum(output.total for output in outputs), sum(output.weight for output in outputs))
        tokens = sum(output.metrics[f"relations_{kind}_tokens"] for output in outputs)
        results.append({"total": whole.total.detach(), "tokens": tokens} | gradients(whole, student, inner))
    for result in results[1:]:
        assert_same(result, results[0], atol=1e-5)


@KINDS
def test_only_states_that_predict_trained_tokens_get_gradients(kind, student, teacher, batch):
    inner = MODE.inner(student, teacher, kind=kind)
    ours, theirs = passes(student, teacher, inner, batch)
    states = [*ours.layers.values(), *(part for parts in ours.attention.values() for part in parts)]
    for state in states:
        state.retain_grad()
    relations(ours, theirs, batch, inner=inner).total.backward()
    predicts = functional.pad(batch.weights[:, 1:] > 0, (0, 1))
    for state in states:
        assert (state.grad[~predicts] == 0).all()
        # All of them, but for a response whose prompt is one token: that one predicts, so nothing is left before it.
        assert (state.grad[predicts].abs().sum(-1) > 0).float().mean() > (0.7 if kind == "gram_prompt" else 0.9)


@KINDS
def test_a_last_token_of_weight_zero_takes_no_part(kind, student, teacher, batch):
    inner = MODE.inner(student, teacher, kind=kind)
    last = int(batch.attention_mask[0].sum()) - 1
    batch.weights[0, last] = 0.0
    before = gradients(evaluate(MODE, student, teacher, inner, batch), student, inner)
    batch.input_ids[0, last] = (batch.input_ids[0, last] + 1) % TOKENS
    assert_same(gradients(evaluate(MODE, student, teacher, inner, batch), student, inner), before, atol=1e-7)


@KINDS
def test_responses_too_short_to_compare_add_nothing_and_are_counted(kind, student, teacher):
    """One trained token after an empty context has relations to nothing."""
    weights = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    batch = Batch(torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.int64), weights)
    inner = MODE.inner(student, teacher, kind=kind)
    output = evaluate(MODE, student, teacher, inner, batch)
    output.total.backward()
    assert output.total == 0
    assert output.metrics[f"relations_{kind}_tokens"].tolist() == ([1.0, 1.0] if kind == "attention" else [0.0, 1.0])


def test_what_a_sample_leaves_out_is_counted(student, teacher, batch):
    counts = (batch.weights > 0).sum(1)
    inner = MODE.inner(student, teacher, kind="gram", max_tokens=5)
    tokens = evaluate(MODE, student, teacher, inner, batch).metrics["relations_gram_tokens"]
    assert tokens.tolist() == [float(counts.clamp(max=5).sum()), float(counts.sum())]
    assert {RELATIONS[kind].max_tokens for kind in RELATIONS} == {48, 256}  # as the documents say


def test_kinds_are_added(student, teacher, batch):
    both = evaluate(MODE, student, teacher, MODE.inner(student, teacher, kind="rkd_distance+attention"), batch)
    names = "rkd_distance", "attention"
    parts = [evaluate(MODE, student, teacher, MODE.inner(student, teacher, kind=name), batch) for name in names]
    torch.testing.assert_close(both.total, sum(part.total for part in parts))
    for name, part in zip(names, parts, strict=True):
        torch.testing.assert_close(both.metrics[f"relations_{name}"], part.total.detach())


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_attention_of_other_architectures(family, make_model, student, batch):
    overrides = {"n_embd": 48, "n_head": 4, "n_layer": 3, "n_positions": 64} if family == "gpt2" else {}
    other = make_model(family, seed=5, **overrides).eval()
    inner = MODE.inner(student, other, kind="attention", relation_heads=2)
    assert evaluate(MODE, student, other, inner, batch).total > 0


def test_relation_heads_fit_every_width(student, teacher, make_model):
    """Widths of 32 and 16 against 48 and 24: 8 divides all, but leaves 2 channels; by default 16 stay."""
    assert MODE.inner(student, teacher, kind="attention").plan.pairs == {(2, 5): 1}
    assert MODE.inner(student, teacher, kind="attention", relation_heads=8).plan.pairs == {(2, 5): 8}
    wide = make_model("llama", hidden_size=32, head_dim=64)
    assert MODE.inner(wide, wide, kind="attention").plan.pairs == {(2, 2): 8}


def test_a_batch_that_trains_nothing_is_zero_and_has_a_graph(student, teacher, batch):
    batch.weights.zero_()
    output = evaluate(MODE, student, teacher, MODE.inner(student, teacher), batch)
    output.total.backward()
    assert output.total == 0


@KINDS
def test_half_precision_is_compared_in_float32(kind, student, teacher, batch):
    inner = MODE.inner(student, teacher, kind=kind)
    ours, theirs = passes(student.bfloat16(), teacher.bfloat16(), inner, batch)
    output = relations(ours, theirs, batch, inner=inner)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = relations(ours, theirs, batch, inner=inner)
    assert output.total.dtype == torch.float32
    assert under_autocast.total == output.total


@KINDS
def test_a_few_steps_bring_the_student_closer(kind, student, teacher, batch):
    inner = MODE.inner(student, teacher, kind=kind)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    values = []
    for _ in range(12):
        optimizer.zero_grad()
        output = evaluate(MODE, student, teacher, inner, batch)
        (output.total / output.weight).backward()
        optimizer.step()
        values.append(float(output.total.detach()))
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "rdk_angle"}, "did you mean 'rkd_angle'"),
        ({"kind": "gram+"}, "unknown kind of relation ''"),
        ({"kind": "attention", "layers": "0:0"}, "from 1 on"),
        ({"kind": "attention", "relation_heads": 5}, "must divide"),
        ({"kind": "gram", "relation_heads": 2}, "belongs to the kind 'attention'"),
        ({"kind": "rkd_angle", "max_tokens": 2}, "at least 3"),
        ({"layers": "all"}, "equal depth"),
        ({"kind": "distill.losses.relations:gram"}, "must name a distill.losses.relations.Relation"),
    ],
)
def test_refused_before_training(options, says, student, teacher):
    with pytest.raises(UserError, match=says):
        MODE.inner(student, teacher, **options)
