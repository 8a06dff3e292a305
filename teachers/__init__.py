"""The teachers' room: who speaks (backends), what is asked (prompts), and whom we believe (verifiers, filters)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.tables import lookup
from teachers.backend import FEATURES

BACKENDS = {
    "transformers": "teachers.engines.transformers_engine:TransformersEngine",
    "vllm": "teachers.engines.vllm_engine:VllmEngine",
    "server": "teachers.engines.server:ServerEngine",
    "ray": "teachers.engines.ray_engine:RayEngine",
    "replay": "teachers.engines.replay:ReplayEngine",
}

WORTH_VLLM = 50_000_000  # bytes of weights; below, starting vLLM costs more than it saves


def choose_backend(name: str, model: str | None, base_url: Sequence[str] = ()) -> tuple[str, str]:
    """Resolve `auto` and return (backend, why in a few words).

    Raises:
        UserError: an endpoint is named, and a backend that asks none.
    """
    if base_url and name not in ("auto", "server"):
        raise UserError(f"--base-url is for the server backend, not for {name}")
    if name != "auto":
        return name, "asked for"
    if base_url:
        return "server", "a --base-url is given"
    if model is None or importlib.util.find_spec("vllm") is None:
        return "transformers", "vLLM is not installed"
    folder = Path(model)
    if folder.is_dir():
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if size < WORTH_VLLM:
            return "transformers", f"{size / 1e6:.1f} MB of weights are too few to start vLLM for"
    if folder.suffix == ".gguf":
        return "transformers", "a .gguf file is dequantised on loading"
    return "vllm", "installed, and the model is large enough"


def backend_class(name: str, features: Iterable[str] = ()) -> Any:
    """Return a backend's class, by its name in `BACKENDS` (not `auto`) or as `pkg.mod:Class`.

    Args:
        features: what it must provide.

    Raises:
        UserError: the name is unknown, or something is asked for that it does not provide.
    """
    found = lookup(BACKENDS, name, "backend")
    if not callable(found):
        raise UserError(f"backend {name!r} is not a class")
    for feature in features:
        if feature not in found.provides:
            others = [other for other in BACKENDS if other != name and feature in backend_class(other).provides]
            there = ", ".join(sorted(found.provides))
            raise UserError(
                f"{FEATURES[feature]} needs {feature}, and the {name} backend provides {there}: "
                f"use --backend {' or '.join(others)}"
            )
    return found


def open_backend(name: str, model: str, **options: Any) -> Any:
    """Open a backend by its name in `BACKENDS` (not `auto`, see `choose_backend`).

    Raises:
        UserError: the name is unknown, the model cannot be loaded, or an option is refused.
    """
    return backend_class(name)(model, **options)


__all__ = ["BACKENDS", "backend_class", "choose_backend", "open_backend"]
