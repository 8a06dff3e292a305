"""Presets are what the table says, pruning copies bit for bit, and every student saves and loads as itself."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from distill.errors import UserError
from students import PRESETS, build_student, student_kind
from students.presets import HEAD_DIMS, resolve_preset
from students.prune import prune, spread

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "<|end|>", *"abcdefghij"]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 5, 7]])
LIGHT = [name for name in PRESETS if not name.endswith("-small")]


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens([AddedToken(word, special=True) for word in words[:5]])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named)


def parameters(settings: dict, rows: int) -> int:
    """Count a Llama- or Qwen3-style decoder's parameters by hand."""
    width, heads, kv = settings["hidden_size"], settings["num_attention_heads"], settings["num_key_value_heads"]
    head = settings["head_dim"]
    attention = 2 * width * heads * head + 2 * width * kv * head
    norms = 2 * width + (2 * head if settings["model_type"] == "qwen3" else 0)
    layer = attention + 3 * width * settings["intermediate_size"] + norms
    embeddings = rows * width * (1 if settings["tie_word_embeddings"] else 2)
    return settings["num_hidden_layers"] * layer + width + embeddings


def source(kind: str = "llama", layers: int = 5, **settings):
    """A small random model, the same for the same arguments."""
    configs = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    values = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        **settings,
    }
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(configs[kind](num_hidden_layers=layers, **values)).eval()


def same_weights(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_parameters_its_settings_say(name: str) -> None:
    settings = resolve_preset(name)
    assert settings["head_dim"] in HEAD_DIMS
    model = build_student(name, tokenizer=tokenizer())
    assert model.config.vocab_size == 64  # 15 tokens, padded
    assert sum(p.numel() for p in model.parameters()) == parameters(settings, 64)
    assert model.config.model_type == settings["model_type"]
    assert model.config.rope_parameters["rope_theta"] == settings["rope_theta"]


@pytest.mark.parametrize("name", LIGHT)
def test_preset_survives_saving_and_runs(name: str, tmp_path: Path) -> None:
    model = build_student(name, tokenizer=tokenizer(), seed=3)
    with torch.no_grad():
        logits = model(IDS).logits
    assert logits.shape == (1, 8, 64)
    assert torch.isfinite(logits).all()
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_weights(model, back)
    with torch.no_grad():
        assert torch.equal(back(IDS).logits, logits)
    assert back.generation_config.eos_token_id == [2, 4]  # the tokenizer's end token and the template's end of turn
    special = back.config.bos_token_id, back.config.eos_token_id, back.config.pad_token_id
    assert special == (1, 2, 3)


def test_same_seed_same_weights_and_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_student("qwen3-nano", tokenizer=tokenizer(), seed=7)
    assert torch.equal(torch.rand(3), expected)
    assert same_weights(first, build_student("qwen3-nano", tokenizer=tokenizer(), seed=7))
    assert not same_weights(first, build_student("qwen3-nano", tokenizer=tokenizer(), seed=8))


def test_vocabulary_is_padded_to_a_multiple_of_64_and_not_beyond() -> None:
    words = [*WORDS, *(f"w{i}" for i in range(64 - len(WORDS)))]
    assert build_student("llama-nano", tokenizer=tokenizer(words)).config.vocab_size == 64
    assert build_student("llama-nano", tokenizer=tokenizer([*words, "more"])).config.vocab_size == 128


def test_overrides_and_dtype_take_effect() -> None:
    spec = "qwen3-nano:hidden_size=96,num_hidden_layers=3,tie_word_embeddings=false,rope_theta=5e4"
    model = build_student(spec, tokenizer=tokenizer(), dtype="bfloat16")
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (96, 3)
    assert model.config.rope_parameters["rope_theta"] == 5e4
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == parameters(resolve_preset(spec), 64)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("qwen3-nnao", "did you mean 'qwen3-nano'"),
        ("qwen3-nano:hiden_size=96", "did you mean 'hidden_size'"),
        ("qwen3-nano:hidden_size=wide", "whole number"),
        ("qwen3-nano:hidden_size=9.5", "whole number"),
        ("qwen3-nano:num_hidden_layers=0", "above 0"),
        ("qwen3-nano:rope_theta=nan", "above 0"),
        ("qwen3-nano:tie_word_embeddings=maybe", "true or false"),
        ("qwen3-nano:hidden_size", "key=value"),
        ("qwen3-nano:", "key=value"),
        ("qwen3-nano:hidden_size=96,hidden_size=96", "twice"),
        ("qwen3-nano:num_attention_heads=3", "set num_key_value_heads too"),
        ("qwen3-nano:head_dim=48", "use one of 32"),
        ("qwen3-nano:model_type=llama", "no setting 'model_type'"),
        ("prune:", "does not say what to cut"),
        ("prune:somewhere", "does not say what to cut"),
        ("prune:somewhere?layer=3", "did you mean 'layers'"),
        ("prune:somewhere?layers=few", "whole number"),
        ("prune:somewhere?keep=0,x", "whole numbers"),
        ("prune:somewhere?layers=2&keep=0,1", "give one"),
        ("prune:somewhere?layers=2&layers=3", "twice"),
    ],
)
def test_bad_spec_is_one_clear_line(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        student_kind(spec)
    assert "\n" not in str(caught.value)


def test_preset_without_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="needs a tokenizer"):
        build_student("llama-nano")


@pytest.mark.parametrize(
    ("spec", "kind", "origin"),
    [
        ("llama-nano", "preset", None),
        ("qwen3-nano:hidden_size=96", "preset", None),
        ("prune:some/model?layers=3", "prune", "some/model"),
        ("prune:/a b/c?keep=0,2", "prune", "/a b/c"),
        ("some/model", "model", "some/model"),
        ("model.gguf", "model", "model.gguf"),
    ],
)
def test_student_kind(spec: str, kind: str, origin: str | None) -> None:
    found = student_kind(spec)
    assert (found.kind, found.source) == (kind, origin)


def test_an_existing_folder_named_nearly_like_a_preset_is_a_model(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "qwen3-nan0").mkdir()
    monkeypatch.chdir(tmp_path)
    assert student_kind("qwen3-nan0").kind == "model"


@given(st.integers(1, 200).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_spread_keeps_the_ends_and_even_gaps(sizes: tuple[int, int]) -> None:
    total, layers = sizes
    kept = spread(total, layers)
    assert len(kept) == layers
    assert kept[0] == 0
    assert kept[-1] == (total - 1 if layers > 1 else 0)
    gaps = [b - a for a, b in pairwise(kept)]
    assert all(gap >= 1 for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_pruning_nothing_is_the_source(kind: str, tied: bool) -> None:
    model = source(kind, tie_word_embeddings=tied)
    whole = prune(model, layers=5)
    assert same_weights(model, whole)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, whole(IDS).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_kept_layers_are_bitwise_the_sources_and_the_cut_is_what_skipping_them_gives(kind: str, tmp_path: Path) -> None:
    model = source(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = prune(model, keep=[0, 2, 4])
    assert small.config.num_hidden_layers == 3
    for new, old in enumerate([0, 2, 4]):
        kept, origin = small.model.layers[new].state_dict(), model.model.layers[old].state_dict()
        assert all(torch.equal(kept[name], origin[name]) for name in origin)
        assert small.model.layers[new].self_attn.layer_idx == new
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    small.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_weights(small, back)
    # An independent way to the same function: skip the other layers of the source itself.
    for layer in (1, 3):
        block = model.model.layers[layer]
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        torch.testing.assert_close(back(IDS).logits, expected, rtol=0, atol=0)
        # With a cache the layers must be numbered anew.
        step = back(IDS[:, :-1], use_cache=True)
        last = back(IDS[:, -1:], past_key_values=step.past_key_values).logits
    torch.testing.assert_close(last[:, 0], expected[:, -1], rtol=1e-4, atol=1e-5)


def test_pruned_student_does_not_share_weights_with_its_source() -> None:
    model = source()
    small = prune(model, layers=2)
    small.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert model.model.layers[0].mlp.up_proj.weight.abs().sum() > 0
    small.generation_config.eos_token_id = 9
    assert model.generation_config.eos_token_id != 9


def test_dead_mlp_channels_are_the_ones_cut() -> None:
    model = source(mlp_bias=True)
    dead = [1, 5, 6, 40]
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, dead] = 0  # these channels say nothing: cutting them changes nothing
    small = prune(model, intermediate_size=44)
    assert small.config.intermediate_size == 44
    assert small.model.layers[0].mlp.down_proj.weight.shape == (32, 44)
    with torch.no_grad():
        torch.testing.assert_close(small(IDS).logits, model(IDS).logits)


def test_layer_types_follow_the_kept_layers() -> None:
    types = ["full_attention", "full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]
    model = source("qwen2", layer_types=types, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    small = prune(model, keep=[0, 1, 3])
    assert small.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert small.config.max_window_layers == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 6}, "give 1 to 5"),
        ({"layers": 0}, "give 1 to 5"),
        ({"keep": [0, 5]}, "from 0 to 4"),
        ({"keep": [2, 1]}, "ascending"),
        ({"keep": [1, 1]}, "each once"),
        ({"keep": []}, "from 0 to 4"),
        ({"keep": [-1, 2]}, "from 0 to 4"),
        ({"intermediate_size": 49}, "only narrows"),
        ({"layers": 2, "keep": [0]}, "not both"),
    ],
)
def test_impossible_cut_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune(source(), **options)


def test_other_architecture_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(UserError, match=r"'gpt2': known are llama"):
        prune(model, layers=1)


def test_prune_spec_cuts_a_folder(tmp_path: Path) -> None:
    model = source("qwen3")
    model.save_pretrained(tmp_path / "teacher")
    small = build_student(f"prune:{tmp_path}/teacher?layers=3&intermediate_size=24")
    assert same_weights(small, prune(model, keep=[0, 2, 4], intermediate_size=24))
    assert same_weights(build_student(str(tmp_path / "teacher")), model)
