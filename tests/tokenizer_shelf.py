"""Small tokenizers of every kind, trained in memory; real ones where `shared/data` has them; texts they differ over."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distill.models import load_tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = tuple(f"{file.parent.parent.name}/{file.parent.name}" for file in sorted(DATA.glob("*/*/tokenizer.json")))
CORPUS = (
    "Natalia sold 48/2 = 24 clips in May, and 48+24 = 72 altogether.\n#### 72\n",
    "def area(radius):\n    if radius < 0:\n\treturn None\n        return 3.14 * radius ** 2\n",
    "小红有12个苹果，吃了3个，还剩9个。 The café's naïve \\frac{1}{2} of 2001 is 1000.5.\r\n",
) * 4
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
PIECES = (
    *("数学", "一二三", "👩‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "e\u0301", "é", "ǆ", "①", "ﬁ", "½", "Å", "\u200b", "\u00a0"),
    *(
        "\ufeff",
        "\\frac{1}{2}",
        "$x^{2}$",
        "\\boxed{42}",
        "def f(x):\n",
        "\treturn x\n",
        "  # a",
        "clips",
        " clips",
        "sold",
    ),
    *("7", "42", "201", "1234567", "3.14", "1,000", "\n", "\r\n", "\n\n", "\t", " ", "\x00", "\x04", "\x7f"),
    *("<|im_end|>", "</s>", "<s>", "<unk>", "<think>", "</think>\n\n", "▁", "<0x41>", "Ġ", "the", "'s", "I'LL"),
)


def texts(*, without: str = "") -> st.SearchStrategy[str]:
    """Texts made of pieces that tokenizers trip over, runs of spaces and any characters, some left out."""
    piece = st.sampled_from(PIECES) | st.integers(1, 32).map(" ".__mul__) | st.text(max_size=4)
    joined = st.lists(piece, max_size=8).map("".join).filter(lambda text: not any(c in text for c in without))
    return joined.filter(_is_unicode)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def byte_level(*, digits: int = 0, prefix_space: bool = False, normalizer: Any = None, size: int = 420) -> Tokenizer:
    """Byte-level BPE, its digits in runs of at most `digits` (0: as they come)."""
    backend = Tokenizer(models.BPE())
    stage = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=True)
    split = pre_tokenizers.Split(Regex(rf"\d{{1,{digits}}}"), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, stage]) if digits else stage
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece(*, scheme: str = "always", byte_fallback: bool = True, split: bool = False) -> Tokenizer:
    """BPE over characters, `▁` for a space: as Mistral's, with one put before by `scheme`, or Llama 2's ("prepend")."""
    backend = Tokenizer(models.BPE(byte_fallback=byte_fallback, unk_token="<unk>", fuse_unk=True))
    swap = normalizers.Replace(" ", "▁")
    if scheme == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), swap])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=split)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)][: 4 if scheme != "never" else 3])
    spelled = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(spelled), special_tokens=[*SPECIAL, *spelled], show_progress=False, max_token_length=12
    )
    backend.train_from_iterator([line for text in CORPUS for line in text.split("\n")], trainer)
    return _ordinary(backend, spelled)


def unigram(*, collapsing: bool = True) -> Tokenizer:
    """Unigram, as T5's: compatible characters are folded, runs of spaces collapsed, unknown characters lost."""
    backend = Tokenizer(models.Unigram())
    if collapsing:
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def lossy() -> Tokenizer:
    """Byte-level BPE without tokens for four bytes (SmolLM2 lacks 21): they vanish, and some ids are free."""
    rules = json.loads(byte_level().to_str())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gone = {"ð", *(letters.pre_tokenize_str(c)[0][0] for c in "\x00\x04\x7f")}  # ð is 0xF0, which opens every emoji
    model = rules["model"]
    model["vocab"] = {token: index for token, index in model["vocab"].items() if not gone & set(token)}
    model["merges"] = [pair for pair in model["merges"] if not gone & set("".join(pair))]
    return Tokenizer.from_str(json.dumps(rules))


def _ordinary(backend: Tokenizer, spelled: list[str]) -> Tokenizer:
    """Return a tokenizer whose byte pieces are entries of the vocabulary and no longer special tokens."""
    rules = json.loads(backend.to_str())
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] not in spelled]
    return Tokenizer.from_str(json.dumps(rules))


SMALL: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, digit by digit": lambda: byte_level(digits=1, size=380),
    "byte-level, three digits": lambda: byte_level(digits=3, size=460),
    "byte-level, space before": lambda: byte_level(prefix_space=True),
    "byte-level, NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte-level, bytes missing": lossy,
    "sentencepiece, Llama 2": lambda: sentencepiece(scheme="prepend"),
    "sentencepiece, always": sentencepiece,
    "sentencepiece, first, words apart": lambda: sentencepiece(scheme="first", split=True),
    "sentencepiece, Gemma": lambda: sentencepiece(scheme="never"),
    "sentencepiece, no byte pieces": lambda: sentencepiece(byte_fallback=False),
    "unigram": lambda: unigram(collapsing=False),
    "unigram, NFKC and single spaces": unigram,
}


@lru_cache
def small_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `SMALL`, made once; do not change it."""
    return wrap(SMALL[name]())


def wrap(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """Return a transformers tokenizer around a backend."""
    named: dict[str, Any] = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**named, **options})


@lru_cache
def real_tokenizer(name: str) -> Any:
    """Return a real tokenizer by its place in `shared/data` (`tokenizers/gpt2`), as the toolkit loads it, or skip."""
    if not (DATA / name).is_dir():
        pytest.skip("no shared/data beside the repository")
    return load_tokenizer(str(DATA / name))
