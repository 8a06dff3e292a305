"""GRPO: the loss and its gradient are TRL's and the closed form's; rows, masses and options mean what they say."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from distill.batch import Batch
from distill.errors import UserError
from distill.forward import read_head, run
from distill.losses.grpo import grpo, grpo_inner
from distill.reinforce.advantages import group_advantages, has_signal
from distill.reinforce.reference import Readers
from distill.reinforce.rewards import Reward, totals
from distill.reinforce.rows import Row, mass, packed, policy_batch, unpacked, weigh
from distill.render import Example
from distill.rollouts import Rollouts

TOKENS, LONGEST = 259, 12
VARIANTS = {
    "grpo": {"loss_type": "grpo", "beta": 0.04},
    "grpo, k3 alone": {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-2, "epsilon_high": 4e-2},
}
LOSS = ("beta", "use_bias_correction_kl", "epsilon", "epsilon_high", "importance_sampling_level")


def written(count: int, seed: int) -> list[Example]:
    """Completions of unlike lengths to prompts of unlike lengths."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt, length = int(rng.integers(2, 6)), int(rng.integers(1, LONGEST))
        weights = np.zeros(prompt + length, np.float32)
        weights[prompt:] = 1.0
        made.append(Example(rng.integers(0, 256, prompt + length).astype(np.int32), weights, begin=prompt))
    return made


def rows_of(examples: list[Example], loss_type: str, *, seed: int, model=None, masked: tuple[int, ...] = ()):
    """Rows with random advantages; with `model`, old and reference log-probabilities near its own."""
    rng = np.random.default_rng(seed)
    rows = []
    for place, example in enumerate(examples):
        known = {}
        if model is not None:
            own = logps(model, example)
            for name, spread in (("old", 0.3), ("reference", 0.5)):
                known[name] = np.where(example.weights > 0, own + spread * rng.standard_normal(len(own)), 0.0)
        rows.append(Row(weigh(example, loss_type), float(rng.standard_normal()), place in masked, **known))
    return rows


def logps(model, example: Example) -> np.ndarray:
    """Each token's log-probability, from the model's own logits."""
    with torch.no_grad():
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        logp = model(ids).logits[0, :-1].float().log_softmax(-1)
    return np.concatenate([[0.0], logp.gather(-1, ids[0, 1:, None])[:, 0].numpy()])


def evaluate(model, batch: Batch, **options):
    forward = run(model, read_head(model, "student"), batch)
    inner = grpo_inner(model, None, **options)
    return grpo(forward, None, batch, num_outcomes=TOKENS, inner=inner, **options)


def ours(model, rows: list[Row], loss_type: str, *, pieces: int = 1, **options):
    """Loss and gradients of one optimizer step, as the trainer puts it together."""
    model.zero_grad()
    divisor = mass(rows, loss_type, longest=LONGEST)
    total = 0.0
    for part in np.array_split(np.arange(len(rows)), pieces):
        kept = [rows[i] for i in part if not rows[i].masked]
        if kept:
            loss = evaluate(model, policy_batch(kept, pad_id=256), **options).total / divisor
            loss.backward()
            total += float(loss.detach())
    return total, {name: each.grad.clone() for name, each in model.named_parameters()}


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """TRL's trainer around a tiny model: asked for its loss on batches we give it, it trains nothing."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = tiny_model(num_hidden_layers=1).float()
    config = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=6,
        num_generations=2,
        max_completion_length=LONGEST,
        gradient_checkpointing=False,
        report_to="none",
    )
    data = Dataset.from_list([{"prompt": "a"}] * 6)
    trainer = trl.GRPOTrainer(
        model, reward_funcs=lambda **_: 0.0, args=config, train_dataset=data, processing_class=byte_tokenizer()
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def theirs(trainer, rows: list[Row], options: dict):
    """The same batch as TRL lays it out: prompts padded on the left, completions on the right."""
    settings = {"beta": 0.0, "epsilon": 0.2, "importance_sampling_level": "token", **options}
    trainer.loss_type, trainer.beta = settings["loss_type"], settings["beta"]
    trainer.epsilon_low = settings["epsilon"]
    trainer.epsilon_high = settings.get("epsilon_high") or settings["epsilon"]
    trainer.args.use_bias_correction_kl = settings.get("use_bias_correction_kl", True)
    trainer.importance_sampling_level = settings["importance_sampling_level"]
    begins = [int((row.example.weights > 0).argmax()) for row in rows]
    longest, most = max(begins), max(len(row.example) - begin for row, begin in zip(rows, begins, strict=True))

    def laid(values, *, fill=0, left=False):
        width = longest if left else most
        pad = [[fill] * (width - len(value)) for value in values]
        return torch.tensor([p + list(v) if left else list(v) + p for v, p in zip(values, pad, strict=True)])

    ids = [row.example.input_ids.tolist() for row in rows]
    mask = laid([[0 if row.masked else 1] * (len(i) - b) for row, i, b in zip(rows, ids, begins, strict=True)])
    inputs = {
        "prompt_ids": laid([i[:b] for i, b in zip(ids, begins, strict=True)], fill=256, left=True),
        "prompt_mask": laid([[1] * b for b in begins], left=True),
        "completion_ids": laid([i[b:] for i, b in zip(ids, begins, strict=True)], fill=256),
        "completion_mask": mask,
        "advantages": torch.tensor([row.advantage for row in rows]),
        "num_items_in_batch": mask.sum(),
    }
    for key, name in (("old_per_token_logps", "old"), ("ref_per_token_logps", "reference")):
        inputs[key] = laid([getattr(r, name)[b:].tolist() for r, b in zip(rows, begins, strict=True)], fill=0.0)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.train()
    model.zero_grad()
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    return float(loss.detach()), {name: each.grad.clone() for name, each in model.named_parameters()}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("masked", [(), (1, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_those_of_trl(peer, name, masked, seed):
    options = dict(VARIANTS[name])
    model = tiny_model(num_hidden_layers=1, seed=seed)
    peer.accelerator.unwrap_model(peer.model).load_state_dict(model.state_dict())
    rows = rows_of(written(6, seed), options["loss_type"], seed=seed, model=model, masked=masked)
    expected, expected_gradients = theirs(peer, rows, options)
    loss_options = {key: options[key] for key in LOSS if key in options}
    found, gradients = ours(model, rows, options["loss_type"], pieces=2, **loss_options)
    assert math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-7)
    whole = torch.cat([expected_gradients[key].flatten() for key in gradients])
    difference = torch.cat([gradients[key].flatten() for key in gradients]) - whole
    assert float(difference.norm() / whole.norm()) < 1e-4


def test_on_the_policy_the_gradient_is_that_of_weighted_log_likelihood():
    """With r = 1 everywhere nothing is clipped: the gradient is -sum of A grad log pi, whatever epsilon is."""
    model = tiny_model(seed=1)
    rows = rows_of(written(5, 1), "dapo", seed=1)
    value, gradients = ours(model, rows, "dapo", epsilon=0.01)
    model.zero_grad()
    tokens = sum(int((row.example.weights > 0).sum()) for row in rows)
    total = 0.0
    for row in rows:
        ids = torch.from_numpy(row.example.input_ids.astype(np.int64))[None]
        logp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        trained = torch.from_numpy(row.example.weights[1:] > 0)
        (-row.advantage * logp[trained].sum() / tokens).backward()
        total += -row.advantage * int(trained.sum()) / tokens
    assert math.isclose(value, total, rel_tol=1e-5)
    for name, each in model.named_parameters():
        torch.testing.assert_close(gradients[name], each.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_micro_batches_and_completions_without_advantage_do_not_change_the_gradient(loss_type):
    model = tiny_model(seed=2)
    rows = rows_of(written(6, 2), loss_type, seed=2, model=model)
    rows[2] = Row(rows[2].example, 0.0, False, rows[2].old, rows[2].reference)
    whole = ours(model, rows, loss_type)
    apart = ours(model, rows, loss_type, pieces=3)
    divisor = mass(rows, loss_type, longest=LONGEST)
    model.zero_grad()
    without = policy_batch([row for row in rows if row.advantage], pad_id=256)
    (evaluate(model, without).total / divisor).backward()
    for name, each in model.named_parameters():
        torch.testing.assert_close(whole[1][name], apart[1][name], atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(whole[1][name], each.grad, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_value_of_a_constant_is_the_same_constant_for_completions_of_one_length(loss_type):
    """Every type is a mean: where all completions have the longest length, the advantage alone is left."""
    examples = []
    for row in range(4):
        weights = np.zeros(3 + LONGEST, np.float32)
        weights[3:] = 1.0
        examples.append(Example(np.full(3 + LONGEST, row, np.int32), weights, begin=3))
    rows = [Row(weigh(example, loss_type), 0.7) for example in examples]
    value, _ = ours(tiny_model(), rows, loss_type)
    assert math.isclose(value, -0.7, rel_tol=1e-5)


def test_clipping_takes_the_gradient_of_what_has_moved_far_enough():
    """Advantage > 0: no gradient once r > 1 + epsilon_high; < 0: none once r < 1 - epsilon. The other ways stay."""
    model = tiny_model(seed=3)
    for advantage, moved, alive in ((1.0, 0.5, False), (1.0, -0.5, True), (-1.0, -0.5, False), (-1.0, 0.5, True)):
        (example,) = written(1, 3)
        old = np.where(example.weights > 0, logps(model, example) - moved, 0.0)
        _, gradients = ours(model, [Row(example, advantage, old=old)], "dapo", epsilon=0.2, epsilon_high=0.28)
        assert any(float(each.abs().max()) > 0 for each in gradients.values()) is alive


def test_the_temperature_is_that_of_the_rollouts():
    model = tiny_model(seed=4)
    (example,) = written(1, 4)
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    with torch.no_grad():
        logp = (model(ids).logits[0, :-1] / 0.7).log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    old = np.concatenate([[0.0], logp.numpy()])
    batch = policy_batch([Row(example, 1.0, old=old)], pad_id=256)
    inner = grpo_inner(model, None, rollouts=rollouts(model, temperature=0.7))
    forward = run(model, read_head(model, "student"), batch)
    output = grpo(forward, None, batch, num_outcomes=TOKENS, inner=inner)
    torch.testing.assert_close(output.metrics["ratio"] / output.weight, torch.tensor(1.0), atol=1e-5, rtol=0)


def rollouts(model, **options) -> Rollouts:
    settings = {"end_ids": [258], "pad_id": 256, "num_outcomes": TOKENS, "max_length": 64, "seed": 0}
    return Rollouts(model, **{**settings, "max_completion_length": LONGEST, **options})


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_what_readers_read_is_what_the_loss_reads(beta):
    """At once after sampling the student is its own past and its own reference: ratio 1, no KL."""
    model = tiny_model(seed=5)
    head = read_head(model, "student")
    readers = Readers(
        model, head, num_outcomes=TOKENS, temperature=1.0, reference=True, sync_steps=None, autocast=nullcontext
    )
    examples = written(3, 5)
    batch = policy_batch([Row(example, 1.0) for example in examples], pad_id=256)
    old, reference = readers(batch, False), readers(batch, True)
    rows = [
        Row(e, 1.0, old=old[i, : len(e)].numpy(), reference=reference[i, : len(e)].numpy())
        for i, e in enumerate(examples)
    ]
    output = evaluate(model, policy_batch(rows, pad_id=256), beta=beta)
    torch.testing.assert_close(output.metrics["ratio"] / output.weight, torch.tensor(1.0), atol=1e-5, rtol=0)
    if beta:
        torch.testing.assert_close(output.metrics["reference_kl"], torch.tensor(0.0), atol=1e-5, rtol=0)


def test_k3_estimates_the_kl_to_the_reference_without_bias():
    """Its mean over all tokens, by their probability, is KL(student || reference), and it is never negative."""
    torch.manual_seed(0)
    student, reference = torch.randn(2, 11, dtype=torch.float64).log_softmax(-1)
    difference = reference - student
    estimate = difference.exp() - difference - 1
    assert (estimate >= 0).all()
    torch.testing.assert_close((student.exp() * estimate).sum(), (student.exp() * (student - reference)).sum())


def test_a_row_survives_a_checkpoint():
    (row,) = rows_of(written(1, 6), "grpo", seed=6, model=tiny_model())
    back = unpacked(packed(row))
    assert back.advantage == row.advantage
    np.testing.assert_array_equal(back.example.input_ids, row.example.input_ids)
    np.testing.assert_array_equal(back.example.weights, row.example.weights)
    np.testing.assert_array_equal(back.old, row.old)
    np.testing.assert_array_equal(back.reference, row.reference)


REWARDS = st.lists(st.one_of(st.floats(-3, 3), st.just(math.nan)), min_size=4, max_size=4)


@given(st.lists(REWARDS, min_size=1, max_size=5))
def test_advantages_are_the_groups_deviations(groups):
    rewards = np.array(groups).ravel()
    for scale in ("group", "batch", "none"):
        found = group_advantages(rewards, 4, scale=scale, batch_deviation=2.0)
        assert found.shape == rewards.shape
        assert np.isfinite(found).all()
        assert (found[np.isnan(rewards)] == 0).all()
        for group, advantages in zip(rewards.reshape(-1, 4), found.reshape(-1, 4), strict=True):
            known = torch.tensor(group[~np.isnan(group)])
            if len(known) < 2:
                assert (advantages == 0).all()
                continue
            divisor = {"group": float(known.std()) + 1e-4, "batch": 2.0 + 1e-4, "none": 1.0}[scale]
            expected = (known - known.mean()) / divisor
            np.testing.assert_allclose(advantages[~np.isnan(group)], expected.numpy(), atol=1e-9)


@given(st.lists(REWARDS, min_size=1, max_size=5))
def test_a_group_has_signal_where_an_advantage_is_not_zero(groups):
    rewards = np.array(groups).ravel()
    moved = np.abs(group_advantages(rewards, 4, scale="none")).reshape(-1, 4).max(1)
    spread = [np.ptp(group[~np.isnan(group)]) if (~np.isnan(group)).any() else 0.0 for group in rewards.reshape(-1, 4)]
    np.testing.assert_array_equal(has_signal(rewards, 4), np.array(spread) > 0)
    assert (moved[np.array(spread) > 1e-9] > 0).all()


def test_a_reward_without_opinion_counts_neither_for_nor_against():
    rows = [[Reward(1.0), Reward(None)], [Reward(None), Reward(None)], [Reward(0.5), Reward(-1.0)]]
    found = totals(rows, [1.0, 2.0])
    np.testing.assert_array_equal(np.isnan(found), [False, True, False])
    np.testing.assert_allclose(found[[0, 2]], [1.0, -1.5])
    with pytest.raises(ValueError, match="not finite"):
        totals([[Reward(math.nan), Reward(0.0)]], [1.0, 1.0])


@pytest.mark.parametrize(
    "options",
    [{"epsilon": 0.0}, {"epsilon_high": -1.0}, {"beta": -0.1}, {"importance_sampling_level": "word"}],
)
def test_options_out_of_range_are_refused_before_training(options):
    with pytest.raises(UserError, match=next(iter(options))):
        grpo_inner(None, None, **options)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_p": 0.9}])
def test_rollouts_that_are_not_the_students_own_distribution_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        grpo_inner(None, None, rollouts=rollouts(tiny_model(), **settings))
