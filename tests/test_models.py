"""Names become models and tokenizers, the known traps are caught, and nothing wrong passes silently.

Real tokenizers and models are used where a `shared/data` folder lies beside the repository; the traps are also rebuilt
here in small, so that every test means something without it.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from distill.errors import UserError
from distill.models import (
    context_length,
    end_token_ids,
    fingerprint,
    load_model,
    load_tokenizer,
    locate,
    model_identity,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL_TOKENIZERS = sorted(file.parent for file in DATA.glob("*/*/tokenizer.json"))
TEXTS = ["Hello, 数学 x = 3", "  two\n\n three\t😀", "f(x)\n    return 12345  # ½", "Ωmega naïve 日本語 \\boxed{42}"]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def byte_level(*, digits: bool = False, nfc: bool = False) -> Tokenizer:
    """A trained byte-level BPE tokenizer with ChatML's special tokens."""
    backend = Tokenizer(models.BPE())
    bytes_stage = pre_tokenizers.ByteLevel(add_prefix_space=False)
    stages = [pre_tokenizers.Digits(individual_digits=True), bytes_stage]
    backend.pre_tokenizer = pre_tokenizers.Sequence(stages) if digits else bytes_stage
    backend.normalizer = normalizers.NFC() if nfc else None
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat, the hat\n\n" * 4], trainer)
    return backend


def tokenizer(**options) -> PreTrainedTokenizerFast:
    named = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(**options), chat_template=CHATML, **named)


def tiny_model() -> torch.nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=320, max_position_embeddings=77, **sizes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model folder."""
    path = tmp_path / "tiny"
    tiny_model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def declare(folder: Path, **changes: object) -> None:
    """Change tokenizer_config.json."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---- tokenizers


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_rebuilt_tokenizer_is_caught_and_tokenizer_json_used(folder: Path, name: str, caplog) -> None:
    declare(folder, tokenizer_class=name)
    rebuilt = AutoTokenizer.from_pretrained(folder)
    broken = rebuilt.decode(rebuilt.encode(TEXTS[0], add_special_tokens=False)) != TEXTS[0]  # so in transformers 5.19

    with caplog.at_level(logging.WARNING, logger="distill"):
        loaded = load_tokenizer(str(folder))
    warnings = [record.message for record in caplog.records if record.name.startswith("distill")]
    assert len(warnings) == broken
    assert all("tokenizer.json is used" in line and "\n" not in line for line in warnings)
    for text in TEXTS:
        ids = loaded.encode(text, add_special_tokens=False)
        assert ids == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
        assert loaded.decode(ids) == text
    assert (loaded.eos_token, loaded.chat_template) == ("<|endoftext|>", CHATML)

    loaded.save_pretrained(folder.parent / "again")  # what a student inherits is free of the trap
    again = AutoTokenizer.from_pretrained(folder.parent / "again")
    assert fingerprint(again) == fingerprint(loaded) == fingerprint(tokenizer())


def test_sound_tokenizer_loads_without_a_word(folder: Path, caplog) -> None:
    loaded = load_tokenizer(str(folder))
    assert fingerprint(loaded) == fingerprint(tokenizer())
    assert not [record for record in caplog.records if record.name.startswith("distill")]


@pytest.mark.parametrize("path", REAL_TOKENIZERS, ids=lambda path: path.name)
@pytest.mark.parametrize("declared", [None, "LlamaTokenizerFast"])
def test_real_tokenizer_agrees_with_its_tokenizer_json(path: Path, declared: str | None, tmp_path: Path) -> None:
    for file in path.iterdir():
        if file.name.startswith(("tokenizer.json", "tokenizer_config.json", "chat_template", "special")):
            shutil.copyfile(file, tmp_path / file.name)
    if declared:
        declare(tmp_path, tokenizer_class=declared)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded = load_tokenizer(str(tmp_path))
    reference = Tokenizer.from_file(str(path / "tokenizer.json"))
    for text in TEXTS:
        ids = loaded.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert loaded.decode(ids, clean_up_tokenization_spaces=False) == reference.decode(ids)
    assert loaded.pad_token is not None


def test_missing_padding_token_becomes_the_end_token_in_the_object_only(folder: Path) -> None:
    before = (folder / "tokenizer_config.json").read_bytes()
    assert load_tokenizer(str(folder)).pad_token == "<|endoftext|>"
    assert (folder / "tokenizer_config.json").read_bytes() == before


def test_chat_template_file_fills_the_gap_and_does_not_replace(folder: Path, tmp_path: Path, caplog) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages }}")
    assert load_tokenizer(str(folder), chat_template=file).chat_template == CHATML
    assert "is not used" in caplog.text
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(str(folder), chat_template=file).chat_template == "{{ messages }}"
    with pytest.raises(UserError, match="cannot read the chat template"):
        load_tokenizer(str(folder), chat_template=tmp_path / "none.jinja")


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer in .*tokenizer\.json") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_broken_tokenizer_file_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(UserError, match="tokenizer") as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value)


# ---- names


def test_missing_path_suggests_a_sibling(folder: Path) -> None:
    for load in (load_tokenizer, load_model, model_identity):
        with pytest.raises(UserError, match=r"no such folder.*did you mean 'tiny'"):
            load(str(folder.parent / "tinny"))
    with pytest.raises(UserError, match="no such folder"):
        load_model(str(folder.parent / "none.gguf"))


def test_file_is_no_model(folder: Path) -> None:
    with pytest.raises(UserError, match="is a file"):
        locate(str(folder / "config.json"))


def test_hub_id_when_offline_is_one_line_at_once(monkeypatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for load in (load_tokenizer, load_model):
        with pytest.raises(UserError, match=r"no-one/no-model.*HF_HUB_OFFLINE is set") as caught:
            load("no-one/no-model")
        assert "\n" not in str(caught.value)


def test_hub_id_is_its_own_identity(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_identity("someone/model") == "someone/model"


# ---- models


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_loads_in_the_dtype_asked_for(folder: Path, dtype: str) -> None:
    loaded = load_model(str(folder), dtype=dtype)
    wanted = getattr(torch, dtype)
    for name, tensor in tiny_model().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(wanted)), name


def test_unknown_dtype_suggests(folder: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        load_model(str(folder), dtype="bfloat61")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing", "no config", "unknown type", "lacks a tensor"])
def test_damaged_model_is_refused_in_one_line(folder: Path, damage: str) -> None:
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "garbage":
        weights.write_bytes(b"not weights at all")
    elif damage == "missing":
        weights.unlink()
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "unknown type":
        (folder / "config.json").write_text('{"model_type": "nonesuch"}')
    else:
        from safetensors.torch import load_file, save_file

        state = load_file(weights)
        state.pop("model.layers.1.mlp.up_proj.weight")
        save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# ---- fingerprints and identities


def test_fingerprint_ignores_what_changes_no_text() -> None:
    one, other = tokenizer(), tokenizer()
    other.padding_side = "left"
    other.pad_token = other.eos_token
    other(["a", "longer text"], padding=True, truncation=True, max_length=4)  # leaves state in the backend
    other.chat_template = None
    assert fingerprint(one) == fingerprint(other)


def test_fingerprint_sees_each_rule() -> None:
    more = tokenizer()
    more.add_tokens(["<tool>"])
    prints = [fingerprint(t) for t in (tokenizer(), tokenizer(digits=True), tokenizer(nfc=True), more)]
    assert len(set(prints)) == 4
    assert all(len(p) == 16 for p in prints)


def test_identity_survives_moving_and_sees_changes(folder: Path, tmp_path: Path) -> None:
    name = model_identity(str(folder))
    assert name.startswith("tiny@")
    assert model_identity(f"{folder}/") == name
    shutil.copytree(folder, tmp_path / "elsewhere" / "tiny")
    moved = tmp_path / "elsewhere" / "tiny"
    (moved / "notes.json").write_text("{}")  # a run's own files are no part of the model
    assert model_identity(str(moved)) == name

    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    assert model_identity(str(moved)) != name
    shutil.copyfile(folder / "model.safetensors", moved / "model.safetensors")
    assert model_identity(str(moved)) == name
    (moved / "chat_template.jinja").write_text("{{ messages }}")
    assert model_identity(str(moved)) != name


def test_identity_of_large_weights_samples_every_tensor(tmp_path: Path, monkeypatch) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr("distill.identity._WHOLE_BYTES", 1000)
    path = tmp_path / "large"
    path.mkdir()
    state = {f"layer{i}": torch.zeros(5000) for i in range(3)}
    names = set()
    for changed in (None, "layer0", "layer1", "layer2"):
        edited = {name: tensor + (name == changed) for name, tensor in state.items()}
        save_file(edited, path / "model.safetensors")
        names.add(model_identity(str(path)))
    assert len(names) == 4
    (path / "model.safetensors").write_bytes(b"\xff" * 5000)
    with pytest.raises(UserError, match="damaged"):
        model_identity(str(path))


# ---- ends and lengths


def test_end_tokens_are_the_configs_the_tokenizers_and_the_templates() -> None:
    tok = tokenizer()
    text_end, turn_end = tok.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert end_token_ids(SimpleNamespace(eos_token_id=None), tok) == [text_end, turn_end]
    assert end_token_ids(SimpleNamespace(eos_token_id=[7, 9]), tok) == sorted([text_end, turn_end, 7, 9])
    model = tiny_model()
    model.generation_config.eos_token_id = 11
    assert end_token_ids(model, tok) == sorted([text_end, turn_end, 11])
    tok.chat_template = None
    assert end_token_ids(SimpleNamespace(eos_token_id=7), tok) == sorted([text_end, 7])
    tok.chat_template = "{{ messages[9].content }}"
    with pytest.raises(UserError, match="cannot be rendered"):
        end_token_ids(SimpleNamespace(eos_token_id=7), tok)


def test_context_length() -> None:
    from transformers import GPT2Config

    assert context_length(tiny_model().config) == 77
    assert context_length(GPT2Config(n_positions=33)) == 33
    assert context_length(SimpleNamespace()) is None
