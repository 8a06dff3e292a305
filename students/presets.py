"""Configurations of small students, from 0.1M parameters up, in Llama's and Qwen3's architecture.

A preset fixes shapes only; vocabulary and special tokens come from a tokenizer when the student is built. Names take
overrides: `qwen3-nano:hidden_size=96,num_hidden_layers=3`. Head widths are among those that vLLM's attention accepts
on CPU, so that every student can be evaluated there.

Qwen3 differs from Llama by a norm on queries and keys (Yang et al. 2025, arXiv:2505.09388).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.errors import UserError
from distill.tables import suggest

HEAD_DIMS = (32, 64, 80, 96, 112, 128, 192, 256)  # what vLLM's CPU attention accepts


def _shape(
    width: int, layers: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, context: int
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "max_position_embeddings": context,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }


_NANO = _shape(64, 2, 2, 2, 32, 192, 1024)
_MICRO = _shape(160, 4, 5, 5, 32, 448, 2048)
_TINY = _shape(384, 8, 6, 2, 64, 1152, 8192)
_SMALL = _shape(768, 12, 12, 4, 64, 2304, 32768)

# name -> settings of the architecture `model_type`. Parameters without embeddings: nano 0.1M, micro 1.3M, tiny 14M,
# small 83M; the (tied) embeddings add hidden_size for each token of the vocabulary.
PRESETS: dict[str, dict[str, Any]] = {
    "llama-nano": {"model_type": "llama", **_NANO},
    "qwen3-nano": {"model_type": "qwen3", **_NANO},
    "llama-micro": {"model_type": "llama", **_MICRO},
    "qwen3-micro": {"model_type": "qwen3", **_MICRO},
    "llama-tiny": {"model_type": "llama", **_TINY},
    "qwen3-tiny": {"model_type": "qwen3", **_TINY},
    "llama-small": {"model_type": "llama", **_SMALL},
    "qwen3-small": {"model_type": "qwen3", **_SMALL},
}


def is_preset(spec: str) -> bool:
    """Return whether a spec names a preset, with or without overrides."""
    return spec.partition(":")[0] in PRESETS


def resolve_preset(spec: str) -> dict[str, Any]:
    """Return the settings of `NAME` or `NAME:key=value,...`, checked.

    Returns:
        A new dict: `model_type` and the architecture's settings.

    Raises:
        UserError: unknown preset or key, a value of the wrong kind, or sizes that do not go together.
    """
    name, colon, overrides = spec.partition(":")
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: known are {', '.join(PRESETS)}{suggest(name, PRESETS)}")
    settings = dict(PRESETS[name])
    given = set()
    allowed = [key for key in settings if key != "model_type"]
    for item in overrides.split(",") if colon else []:
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals:
            raise UserError(f"preset {spec!r}: overrides are written key=value,key=value, given {item!r}")
        if key not in allowed:
            raise UserError(
                f"preset {name!r} has no setting {key!r}: known are {', '.join(allowed)}{suggest(key, allowed)}"
            )
        if key in given:
            raise UserError(f"preset {spec!r} sets {key!r} twice")
        given.add(key)
        settings[key] = _typed(key, text, type(settings[key]))
    _check(spec, settings, given)
    return settings


def _typed(key: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key} is true or false, given {text!r}")
        return text.lower() == "true"
    try:
        value = kind(text)
    except ValueError as error:
        raise UserError(f"{key} is {'a whole number' if kind is int else 'a number'}, given {text!r}") from error
    if not 0 < value < float("inf"):
        raise UserError(f"{key} must be above 0, given {text!r}")
    return value


def _check(spec: str, settings: Mapping[str, Any], given: set[str]) -> None:
    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    if heads % kv_heads:
        advice = "" if "num_key_value_heads" in given else "; set num_key_value_heads too"
        raise UserError(f"preset {spec!r}: {heads} attention heads cannot share {kv_heads} key-value heads{advice}")
    if settings["head_dim"] not in HEAD_DIMS:
        raise UserError(
            f"preset {spec!r}: head_dim {settings['head_dim']} is not served by vLLM on CPU: "
            f"use one of {', '.join(map(str, HEAD_DIMS))}"
        )
