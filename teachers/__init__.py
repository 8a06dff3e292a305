"""The teachers' room: who speaks (backends), what is asked (prompts), and whom we believe (verifiers, filters)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.tables import lookup

BACKENDS = {
    "transformers": "teachers.transformers_engine:TransformersEngine",
    "vllm": "teachers.vllm_engine:VllmEngine",
}

WORTH_VLLM = 50_000_000  # bytes of weights; below, starting vLLM costs more than it saves


def choose_backend(name: str, model: str) -> tuple[str, str]:
    """Resolve `auto` and return (backend, why in a few words)."""
    if name != "auto":
        return name, "asked for"
    if importlib.util.find_spec("vllm") is None:
        return "transformers", "vLLM is not installed"
    folder = Path(model)
    if folder.is_dir():
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if size < WORTH_VLLM:
            return "transformers", f"{size / 1e6:.1f} MB of weights are too few to start vLLM for"
    if folder.suffix == ".gguf":
        return "transformers", "a .gguf file is dequantised on loading"
    return "vllm", "installed, and the model is large enough"


def open_backend(name: str, model: str, **options: Any) -> Any:
    """Open a backend by its name in `BACKENDS` (not `auto`, see `choose_backend`).

    Raises:
        UserError: the name is unknown, the model cannot be loaded, or an option is refused.
    """
    backend = lookup(BACKENDS, name, "backend")
    if not callable(backend):
        raise UserError(f"backend {name!r} is not a class")
    return backend(model, **options)


__all__ = ["BACKENDS", "choose_backend", "open_backend"]
