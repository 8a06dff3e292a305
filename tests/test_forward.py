"""What a forward pass keeps of a model's inside: on every architecture, under wrappers, and without a trace left."""

from __future__ import annotations

import copy
import importlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distill import forward
from distill.batch import Batch, collate
from distill.blocks import decoder_blocks, projections
from distill.errors import UserError
from distill.forward import Capture, probe, read_head, run
from distill.packing import pack
from distill.render import Example

EVERYTHING = Capture(layers=frozenset({0, 1, 2}), attention=frozenset({1, 2}))
NEOX = {"intermediate_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "gemma2": {},
    "gemma3_text": {"rope_theta": 100.0},
    "phi3": {},
    "gpt2": GPT2,
    "gpt_neox": NEOX,
}


@pytest.fixture
def batch():
    ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(3))
    return Batch(ids, torch.ones_like(ids), torch.ones(ids.shape))


def captured(model, batch, capture=EVERYTHING):
    return run(model, read_head(unbatched(model), "student"), batch, capture)


def unbatched(model):
    return getattr(model, "module", model)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_the_models_own(family, make_model, batch):
    model = make_model(family, **FAMILIES[family]).eval()
    with torch.no_grad():
        kept = captured(model, batch)
        own = model(input_ids=batch.input_ids, output_hidden_states=True).hidden_states
    assert set(kept.layers) == {0, 1, 2}
    for number in (0, 1):
        torch.testing.assert_close(kept.layers[number], own[number], atol=0, rtol=0)
    # transformers names the last one after the final norm; here it is before, as the blocks' outputs are.
    torch.testing.assert_close(kept.hidden, own[2], atol=0, rtol=0)
    decoder = model.get_decoder()
    norm = next(getattr(decoder, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(decoder, name))
    torch.testing.assert_close(norm(kept.layers[2]), kept.hidden, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_what_attention_is_made_of(family, make_model, batch):
    """Queries, keys and values, put through the model's own norm and rotation, give the block's own attention."""
    model = make_model(family, **FAMILIES[family]).eval()
    seen = {}
    block = decoder_blocks(model)[1]
    attention = next(module for name, module in block.named_children() if "attn" in name or name == "attention")
    hook = attention.register_forward_hook(lambda module, args, output: seen.update(out=output[0]))
    with torch.no_grad():
        query, key, value = captured(model, batch).attention[2]
        hook.remove()
        config = model.config
        heads = config.num_attention_heads
        width = getattr(attention, "head_dim", None) or attention.head_size
        split = [states.unflatten(-1, (-1, width)) for states in (query, key, value)]
        for place, norm in enumerate(("q_norm", "k_norm")):
            split[place] = getattr(attention, norm, nn.Identity())(split[place])
        query, key, value = (states.transpose(1, 2) for states in split)
        if family != "gpt2":
            rotate = importlib.import_module(type(model).__module__).apply_rotary_pos_emb
            embed = model.get_decoder().rotary_emb
            places = torch.arange(query.shape[2])[None]
            kind = (config.layer_types[1],) if family == "gemma3_text" else ()
            query, key = rotate(query, key, *embed(query, places, *kind))
        key, value = (states.repeat_interleave(heads // states.shape[1], dim=1) for states in (key, value))
        scores = query @ key.transpose(2, 3) * attention.scaling
        if cap := getattr(config, "attn_logit_softcapping", None):
            scores = torch.tanh(scores / cap) * cap
        causal = torch.ones(scores.shape[-2:]).tril().bool()
        mixed = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ value
        out = next(getattr(attention, name) for name in ("o_proj", "c_proj", "dense") if hasattr(attention, name))
        torch.testing.assert_close(out(mixed.transpose(1, 2).flatten(2)), seen["out"], atol=1e-5, rtol=1e-4)


def gradients(model, batch, capture=EVERYTHING):
    model.zero_grad()
    kept = captured(model, batch, capture)
    states = [*kept.layers.values(), *(part for parts in kept.attention.values() for part in parts)]
    (sum(state.square().sum() for state in states) + kept.hidden.square().sum()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_checkpointed_gradients_are_the_plain_ones(family, make_model, batch):
    model = make_model(family, **FAMILIES[family]).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, batch)
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], atol=0, rtol=0)


def test_reentrant_checkpointing_is_refused(make_model, batch):
    model = make_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()  # as every user of reentrant checkpointing does
    with pytest.raises(UserError, match="use_reentrant"):
        captured(model, batch)
    captured(model, batch, Capture())  # nothing is looked at inside, so nothing is hidden
    with torch.no_grad():
        captured(model, batch)


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_no_hook_stays(make_model, batch):
    model = make_model("qwen3")
    captured(model, batch)
    assert hooks(model) == 0
    with pytest.raises(UserError, match="blocks are 1 to 2"):
        captured(model, batch, Capture(layers=frozenset({0, 1, 3}), attention=frozenset({1})))
    broken = Batch(batch.input_ids + 10_000, batch.attention_mask, batch.weights)
    with pytest.raises(IndexError):
        captured(model, broken)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    "capture", [Capture(layers=frozenset({-1})), Capture(attention=frozenset({0})), Capture(attention=frozenset({3}))]
)
def test_numbers_outside_the_model_are_refused(capture, make_model, batch):
    with pytest.raises(UserError, match="no block"):
        captured(make_model("llama"), batch, capture)


def test_unknown_attention_is_refused_by_name(make_model):
    model = make_model("bloom", n_head=4, hidden_size=32, n_layer=2)
    with pytest.raises(UserError, match="BloomBlock"):
        projections(decoder_blocks(model)[0])
    assert set(probe(model, Capture(layers=frozenset({0, 2}))).layers) == {0, 2}


@pytest.fixture
def alone():
    """A process group of this one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_models_keep_the_same(make_model, batch, alone):
    from peft import LoraConfig, get_peft_model

    plain = make_model("llama").eval()
    adapted = get_peft_model(
        copy.deepcopy(plain), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    )
    expected = captured(plain, batch)
    for model in (DistributedDataParallel(plain), adapted.eval(), DistributedDataParallel(adapted)):
        kept = captured(model, batch)
        for number, states in expected.layers.items():
            torch.testing.assert_close(kept.layers[number], states)
        for number, parts in expected.attention.items():
            torch.testing.assert_close(kept.attention[number], parts)


def test_a_block_that_does_not_run_is_refused(make_model, batch):
    model = make_model("llama")
    model.get_decoder().layers[1].forward = lambda hidden_states, **_: hidden_states  # a block without attention
    captured(model, batch, Capture(layers=frozenset({2})))
    with pytest.raises(UserError, match=r"did not run \(2, 0\)"):
        captured(model, batch, Capture(attention=frozenset({1, 2})))


def test_adapters_are_inside_the_projections(make_model, batch):
    """A LoRA on the queries changes what is kept of them, and is trained by it."""
    from peft import LoraConfig, get_peft_model

    plain = make_model("llama").eval()
    adapted = get_peft_model(
        copy.deepcopy(plain), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    before, after = captured(plain, batch), captured(adapted, batch)
    assert not torch.allclose(before.attention[1][0], after.attention[1][0])
    torch.testing.assert_close(before.attention[1][1], after.attention[1][1])
    after.attention[1][0].square().sum().backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("layers.0.self_attn.q_proj.lora" in name for name in trained)


def test_a_peft_model_makes_no_logits_it_does_not_need(make_model, batch):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    head = read_head(model, "student")
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    run(model, head, batch)
    assert shapes == [(2, 1, 259)]


def test_probe_leaves_the_model_as_it_was(make_model):
    model = make_model("qwen3").train()
    kept = probe(model, EVERYTHING)
    assert kept.layers[2].shape == (1, 4, 32)
    assert [part.shape[-1] for part in kept.attention[1]] == [32, 16, 16]
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def unlike_lengths() -> list[Example]:
    rng = np.random.default_rng(0)
    lengths = (3, 40, 5, 41, 12, 4)
    return [
        Example(rng.integers(0, 256, length).astype(np.int32), np.r_[0, np.ones(length - 1)].astype(np.float32))
        for length in lengths
    ]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_rows_of_unlike_lengths_run_apart_give_the_same_numbers_and_gradients(family, make_model, monkeypatch):
    model = make_model(family)
    batch = collate(unlike_lengths(), pad_id=256)
    passes: list[int] = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    answers = []
    for products in (float("inf"), 0.0):
        monkeypatch.setattr(forward, "PASS_PRODUCTS", products)
        head = read_head(model, "student")
        passes.clear()
        kept = run(model, head, batch, EVERYTHING)
        tensors = [
            kept.hidden,
            *(kept.layers[n] for n in (0, 1, 2)),
            *(each for n in (1, 2) for each in kept.attention[n]),
        ]
        real = [tensor[batch.attention_mask > 0] for tensor in tensors]
        model.zero_grad()
        sum((tensor * torch.arange(tensor.numel()).view_as(tensor).sin()).sum() for tensor in real).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        answers.append((real, gradients, list(passes)))
    (whole, gradients, one), (apart, split, many) = answers
    assert one == [6 * 41]
    assert sum(many) == int(batch.attention_mask.sum())
    for ours, theirs in zip(apart, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert split.keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(split[name], value, atol=1e-4, rtol=1e-4)


def test_packed_rows_and_ranks_are_run_in_one_pass(make_model, monkeypatch):
    monkeypatch.setattr(forward, "PASS_PRODUCTS", 0.0)
    model = make_model("llama")
    passes: list[int] = []
    model.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    head = read_head(model, "student")
    passes.clear()
    run(model, head, collate(pack(unlike_lengths(), 48), pad_id=256))
    assert len(passes) == 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    run(model, head, collate(unlike_lengths(), pad_id=256))
    assert len(passes) == 2
