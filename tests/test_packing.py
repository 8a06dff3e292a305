"""Packed rows: as full as they can be, and every sequence as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from distill.batch import collate
from distill.errors import UserError
from distill.packing import check_packing, pack
from distill.render import Example

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2")


def example_of(length: int, seed: int = 0) -> Example:
    rng = np.random.default_rng([length, seed])
    weights = np.ones(length, np.float32)
    weights[: 1 + length // 3] = 0
    return Example(rng.integers(0, 256, length).astype(np.int32), weights)


def by_segments(module, query, key, value, attention_mask, scaling=None, dropout=0.0, *, cu_seq_lens_q=None, **_):
    """Attention as flash attention's varlen kernel does it: rows laid end to end, no mask, only borders."""
    assert attention_mask is None
    rows, heads, width, _ = query.shape
    key, value = (x.repeat_interleave(heads // key.shape[1], 1) for x in (key, value))
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, rows * width + 1, width)
    flat = [x.transpose(1, 2).flatten(0, 1).transpose(0, 1) for x in (query, key, value)]
    parts = [
        scaled_dot_product_attention(*(x[None, :, begin:end] for x in flat), is_causal=True, scale=scaling)[0]
        for begin, end in torch.stack([cu_seq_lens_q[:-1], cu_seq_lens_q[1:]], 1).tolist()
    ]
    return torch.cat(parts, 1).transpose(0, 1).reshape(rows, width, heads, -1), None


@pytest.fixture(scope="module")
def varlen() -> str:
    """The name of an attention that reads borders alone, with flash attention's mask, which is none."""
    AttentionInterface.register("by_segments", by_segments)
    AttentionMaskInterface.register("by_segments", flash_attention_mask)
    return "by_segments"


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 40))
def test_packing_loses_nothing_and_no_two_rows_could_be_one(sizes, length):
    examples = [example_of(size, index) for index, size in enumerate(sizes)]
    rows = pack(examples, length)
    assert sorted(map(id, (e for row in rows for e in row))) == sorted(map(id, examples))
    used = sorted(sum(map(len, row)) for row in rows)
    assert all(0 < each <= length for each in used)
    assert len(used) < 2 or used[0] + used[1] > length
    places = {id(example): index for index, example in enumerate(examples)}
    assert all(row == sorted(row, key=lambda example: places[id(example)]) for row in rows)
    assert [[*map(id, row)] for row in pack(examples, length)] == [[*map(id, row)] for row in rows]


def test_each_goes_into_the_fullest_row_with_room():
    sizes = [[len(example) for example in row] for row in pack([example_of(n) for n in (3, 7, 2, 5, 3)], 10)]
    assert sizes == [[3, 7], [2, 5, 3]]


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="11 tokens does not fit into rows of 10"):
        pack([example_of(11)], 10)


def loss_and_logits(model, batch):
    logits = model(**batch.model_inputs(), use_cache=False).logits
    trained = batch.trained()
    losses = cross_entropy(logits[:, :-1][trained.rows], trained.labels, reduction="none")
    return (losses * trained.weights).sum(), logits


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "varlen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_are_as_if_alone(make_model, varlen, family, attention, checkpointing):
    model = make_model(family, attention_dropout=0.0).train()
    model.set_attn_implementation(varlen if attention == "varlen" else attention)
    examples = [example_of(n) for n in (11, 1, 6, 9, 4)]
    packed = collate([examples[:3], examples[3:]], pad_id=256)
    alone = [loss_and_logits(model, collate([[example]], pad_id=256)) for example in examples]
    expected = gradients(model, sum(loss for loss, _ in alone))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, logits = loss_and_logits(model, packed)
    there = torch.cat([logits[0, :18], logits[1, :13]])
    torch.testing.assert_close(there, torch.cat([each[0] for _, each in alone]), rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "varlen"])
def test_models_that_keep_sequences_apart_pass(make_model, varlen, attention, dtype):
    for family in FAMILIES[:3]:
        model = make_model(family).to(dtype).train()
        model.set_attn_implementation(varlen if attention == "varlen" else attention)
        check_packing(model, 64)
        assert model.training


def test_a_mixture_of_experts_passes(make_model):
    check_packing(make_model("qwen3_moe", moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2), 64)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mamba", {"state_size": 4}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),  # a convolution along the row, whose leak is faint
        ("bloom", {"n_head": 4}),  # makes positions of its own
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_let_sequences_see_each_other_are_refused(make_model, family, settings, dtype):
    model = make_model(family, **settings).to(dtype)
    with pytest.raises(UserError, match=f"--packing: {type(model).__name__}"):
        check_packing(model, 64)


def test_a_model_that_counts_positions_from_the_row_s_beginning_is_refused(varlen):
    from transformers import GPT2Config, GPT2LMHeadModel

    class CountsAlong(GPT2LMHeadModel):
        """Keeps attention apart by the borders, but learns nothing of positions."""

        def forward(self, input_ids, position_ids=None, **further):
            return super().forward(input_ids, **further)

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4)
    check_packing(GPT2LMHeadModel._from_config(config, attn_implementation=varlen), 64)
    with pytest.raises(UserError, match="ignores position_ids"):
        check_packing(CountsAlong._from_config(config, attn_implementation=varlen), 64)


def test_attention_in_chunks_is_refused_where_a_row_is_longer(make_model):
    model = make_model("llama4_text", attention_chunk_size=32, intermediate_size_mlp=64, num_local_experts=2)
    check_packing(model, 32)
    with pytest.raises(UserError, match=r"chunks of 32 tokens.*rows of 33"):
        check_packing(model, 33)


def test_attention_that_sees_only_that_rows_are_causal_is_refused(make_model):
    def causal(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None

    AttentionInterface.register("causal_only", causal)
    AttentionMaskInterface.register("causal_only", flash_attention_mask)
    model = make_model()
    model.set_attn_implementation("causal_only")
    with pytest.raises(UserError, match="see each other"):
        check_packing(model, 64)
