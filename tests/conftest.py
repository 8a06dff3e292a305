"""Fixtures of the whole suite: tiny models and tokenizers made in memory, nothing downloaded."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports torch or transformers: tests are offline, and two threads of a small model only wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A suite started in the background inherits an ignored Ctrl-C, and so would the commands that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# No test is timed: how long an example takes to draw or to run says how busy the machine is, not whether it is right.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHATML) -> Any:
    """Return a byte-level tokenizer: 256 bytes, then <|endoftext|>, <|im_start|>, <|im_end|> (the eos)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [AddedToken(name, special=True) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """Return an untrained causal language model of `family` (llama, qwen3, qwen2, gemma2), about 30k parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "eos_token_id": 258,
        "bos_token_id": None,
        "pad_token_id": 256,
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**settings, **overrides}))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level tokenizer with a ChatML template; do not change it."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """`byte_tokenizer`, for a template of one's own."""
    return byte_tokenizer


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """`tiny_model`: a family, a seed and config overrides."""
    return tiny_model


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Sequence[Mapping[str, Any]]], Path]:
    """Write rows as a .jsonl file in the test's folder and return its path."""

    def write(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
