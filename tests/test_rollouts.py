"""Rollouts: what the student writes depends on seed, step and row alone, and is trained exactly as it was drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from distill.batch import Batch, collate
from distill.errors import UserError
from distill.render import Example
from distill.rollouts import BITS, Choice, Rollouts

TOKENS, PAD, ENDS = 259, 256, (*range(8), 258)  # a model without training meets one of nine ends soon


def example(prompt: int, completion: int = 5, seed: int = 0) -> Example:
    ids = np.random.default_rng([prompt, seed]).integers(0, 256, size=prompt + completion).astype(np.int32)
    return Example(ids, np.array([0.0] * prompt + [1.0] * completion, np.float32))


EXAMPLES = [example(7), example(3), example(12), example(1)]


def rollouts(model, **settings) -> Rollouts:
    fixed = {"end_ids": ENDS, "pad_id": PAD, "num_outcomes": TOKENS, "max_length": 512, "seed": 3}
    return Rollouts(model, **{**fixed, "max_completion_length": 8, **settings})


def roll(model, examples=EXAMPLES, *, step: int = 0, first_row: int = 0, **settings) -> Batch:
    batch = collate(examples, pad_id=PAD)
    return rollouts(model, **settings).roll(batch, step=step, first_row=first_row).batch


def completions(batch: Batch) -> list[list[int]]:
    return [ids[weights > 0].tolist() for ids, weights in zip(batch.input_ids, batch.weights, strict=True)]


@pytest.fixture(scope="module")
def model(make_model):
    """float64, so that a differently padded batch moves no draw."""
    return make_model("qwen3", seed=1).double()


def test_a_row_is_its_prompt_then_what_the_student_wrote_trained_to_the_end_token(model):
    batch = roll(model, max_completion_length=40)
    ended = 0
    for row, given_row in enumerate(EXAMPLES):
        prompt = int((given_row.weights == 0).sum())
        length = int(batch.attention_mask[row].sum())
        assert batch.input_ids[row, :prompt].tolist() == given_row.input_ids[:prompt].tolist()
        assert batch.weights[row].tolist() == [0.0] * prompt + [1.0] * (length - prompt) + [0.0] * (
            batch.weights.shape[1] - length
        )
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (batch.weights.shape[1] - length)
        *before, last = completions(batch)[row]
        assert not set(before) & set(ENDS)
        assert last in ENDS or length - prompt == 40
        ended += last in ENDS
    assert 0 < ended < len(EXAMPLES), "the test should see both ways to end"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_greedy_completions_are_those_of_generate_for_each_prompt_alone(make_model, family):
    model = make_model(family, seed=1).double().eval()
    written = completions(roll(model, temperature=0.0))
    for row, own in enumerate(written):
        prompt = torch.tensor(EXAMPLES[row].input_ids[EXAMPLES[row].weights == 0][None].astype(np.int64))
        expected = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=list(ENDS),
            pad_token_id=PAD,
        )
        assert own == expected[0, prompt.shape[1] :].tolist()


def test_a_row_depends_on_seed_step_and_its_number_not_on_its_neighbours_or_the_split(model):
    whole = completions(roll(model))
    assert completions(roll(model)) == whole
    split = [completions(roll(model, EXAMPLES[i : i + 2], first_row=i)) for i in (0, 2)]
    assert split[0] + split[1] == whole
    for other in (roll(model, step=1), roll(model, seed=4), roll(model, first_row=1)):
        assert all(mine != theirs for mine, theirs in zip(completions(other), whole, strict=True))


def test_the_same_prompt_in_two_rows_is_completed_in_two_ways(model):
    first, second = completions(roll(model, [EXAMPLES[0], EXAMPLES[0]]))
    assert first != second


def test_the_global_random_state_is_neither_read_nor_moved(model):
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1]
    before = completions(roll(model))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    torch.manual_seed(6)
    assert completions(roll(model)) == before


def test_the_student_is_left_as_it_was_and_its_own_generation_settings_are_not_obeyed(make_model):
    model = make_model("llama", seed=1, attention_dropout=0.5).double().eval()
    expected = completions(roll(model))
    model.train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
    model.generation_config = own = GenerationConfig(repetition_penalty=50.0, top_k=1, max_new_tokens=2)
    modes = [module.training for module in model.modules()]
    written = roll(model)
    assert completions(written) == expected
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is own
    assert model.is_gradient_checkpointing
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    model(**written.model_inputs(), use_cache=False).logits.sum().backward()


def test_a_student_with_adapters_writes_with_them(make_model):
    peft = pytest.importorskip("peft")
    base = make_model("llama", seed=1)
    plain = completions(roll(base))
    own = base.generation_config
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=True)).double()
    assert completions(roll(adapted)) == plain
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    assert completions(roll(adapted)) != plain
    assert base.generation_config is own


def test_truncated_completions_and_lengths_are_counted(model):
    settings = {"max_completion_length": 40}
    rolled = rollouts(model, **settings).roll(collate(EXAMPLES, pad_id=PAD), step=0, first_row=0)
    written = completions(rolled.batch)
    cut = [own for own in written if own[-1] not in ENDS]
    assert 0 < len(cut) < len(written)
    assert rolled.metrics["truncated"].tolist() == [len(cut), len(written)]
    assert rolled.metrics["completion_length"].tolist() == [sum(map(len, written)), len(written)]
    lengths = rolled.batch.attention_mask.sum(1)
    assert rolled.counts["rollout_tokens"] == lengths.sum()
    assert rolled.counts["rollout_squares"] == (lengths**2).sum()


def test_padding_rows_of_the_embedding_are_never_drawn(make_model):
    wide = make_model("llama", seed=1, vocab_size=1024)
    for temperature in (0.0, 1.0, 100.0):
        batch = roll(wide, temperature=temperature, max_completion_length=30, end_ids=(258,))
        assert int(batch.input_ids.max()) < TOKENS


def test_without_a_limit_each_row_goes_on_to_the_end_of_its_context(make_model):
    """GPT-2 has a table of positions: a row that went on beyond it would crash."""
    model = make_model("gpt2", seed=1, max_position_embeddings=24, n_positions=24).double()
    settings = {"max_length": 24, "max_completion_length": None, "end_ids": (258,)}
    batch = roll(model, **settings)
    assert batch.attention_mask.sum(1).tolist() == [24] * len(EXAMPLES)
    alone = [completions(roll(model, [one], first_row=row, **settings))[0] for row, one in enumerate(EXAMPLES)]
    assert completions(batch) == alone


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_length": 19}, "12 tokens and a completion of 8 exceed the 19"),
        ({"max_length": 12, "max_completion_length": None}, "12 tokens and a completion of at least one exceed the 12"),
    ],
)
def test_too_little_room_is_refused_before_training_and_when_it_is_met(model, settings, said):
    for refused in (
        lambda: roll(model, **settings),
        lambda: rollouts(model, **settings).check(EXAMPLES),
    ):
        with pytest.raises(UserError, match=said):
            refused()
    enough = {**settings, "max_length": settings["max_length"] + 1}
    rollouts(model, **enough).check(EXAMPLES)
    assert roll(model, **enough).attention_mask.shape[1] <= enough["max_length"]
    rollouts(model, **settings, student_share=0.0).check(EXAMPLES)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"student_share": 1.1}, "student_share must be from 0 to 1"),
        ({"max_completion_length": 0}, "max_completion_length must be 1 or more, not 0"),
        ({"max_length": None, "max_completion_length": None}, "give max_completion_length"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        rollouts(None, **settings)


def test_packed_rows_and_sequences_without_a_prompt_are_refused(model):
    batch = collate(EXAMPLES, pad_id=PAD)
    packed = Batch(batch.input_ids, batch.attention_mask, batch.weights, position_ids=batch.input_ids)
    with pytest.raises(UserError, match="switch packing off"):
        rollouts(model).roll(packed, step=0, first_row=0)
    untrained = Batch(batch.input_ids, batch.attention_mask, torch.zeros_like(batch.weights))
    with pytest.raises(ValueError, match="where its prompt ends"):
        rollouts(model).roll(untrained, step=0, first_row=0)


def test_a_sharded_student_is_refused(make_model):
    model = make_model("llama")
    next(model.parameters()).ds_id = 0  # what ZeRO-3 marks a parameter with
    with pytest.raises(UserError, match="sharded"):
        roll(model)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_students_share_of_the_steps_is_kept_and_known_in_advance(share):
    decisions = [rollouts(None, student_share=share).writes(step) for step in range(1000)]
    assert abs(np.mean(decisions) - share) < 4 * np.sqrt(share * (1 - share) / 1000) + 1e-12
    assert decisions == [rollouts(None, student_share=share).writes(step) for step in range(1000)]


def test_steps_that_are_not_the_students_keep_the_batch(model):
    source = rollouts(model, student_share=0.5)
    batch = collate(EXAMPLES, pad_id=PAD)
    for step in range(6):
        rolled = source.roll(batch, step=step, first_row=0)
        assert (rolled.batch is batch) == (not source.writes(step))
        assert bool(rolled.metrics) == source.writes(step)
    assert {source.writes(step) for step in range(6)} == {True, False}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7)])
def test_draws_follow_the_warped_distribution(temperature, top_p):
    """Against the distribution written out; 40000 draws, five standard deviations."""
    rows = 40_000
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, float("-inf"), 9.0])  # the last is padding
    probabilities = (logits[:5] / temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(-1) - probabilities[order]
    probabilities[order[before >= top_p]] = 0.0
    probabilities /= probabilities.sum()
    draws = torch.tensor(np.random.default_rng(0).integers(2**BITS, size=(rows, 1)))
    chosen = Choice(draws, 5, temperature=temperature, top_p=top_p)(None, logits.repeat(rows, 1)).argmax(-1)
    seen = torch.bincount(chosen, minlength=6) / rows
    assert (seen[:5] - probabilities).abs().max() < 5 * 0.5 / np.sqrt(rows)
    assert (seen[:5][probabilities == 0] == 0).all()
    assert seen[5] == 0


@given(
    st.lists(st.floats(-40, 40) | st.just(float("-inf")), min_size=1, max_size=8),
    st.sampled_from([0, 1, 2**BITS - 1]) | st.integers(0, 2**BITS - 1),
)
def test_whatever_the_number_a_possible_token_is_drawn(logits, number):
    logits = [*logits, 0.0]
    row = torch.tensor([logits])
    before = row.clone()
    chosen = Choice(torch.tensor([[number]]), len(logits), temperature=1.0, top_p=1.0)(None, row)
    assert torch.isfinite(row[0, chosen.argmax()])
    assert torch.equal(row, before), "what the model said is not overwritten"
