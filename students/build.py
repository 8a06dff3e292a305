"""Build a student from what a user writes: a preset, a model, or a model to be pruned.

Adapters (LoRA) and training are not here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distill.dtypes import torch_dtype
from distill.errors import UserError
from distill.models import end_token_ids, load_model
from distill.quantisation import Bits
from distill.tables import suggest
from students.presets import PRESETS, is_preset, resolve_preset
from students.prune import parse_prune, prune

VOCABULARY_MULTIPLE = 64  # rows of the embedding are padded to it: faster matrix products, and vLLM's own padding


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentKind:
    """What a student spec means. `source` is the MODEL whose weights and tokenizer it takes; None for a preset."""

    kind: Literal["preset", "model", "prune"]
    source: str | None


def student_kind(spec: str) -> StudentKind:
    """Return what `spec` means, without loading anything; its own syntax is checked.

    Raises:
        UserError: an unknown or inconsistent preset, or a pruning that says nothing.
    """
    if spec.startswith("prune:"):
        return StudentKind(kind="prune", source=parse_prune(spec).source)
    if is_preset(spec) or _means_preset(spec):
        resolve_preset(spec)
        return StudentKind(kind="preset", source=None)
    return StudentKind(kind="model", source=spec)


def _means_preset(spec: str) -> bool:
    """Return whether a spec that names no preset was meant to: nothing of that name exists, and a preset is near."""
    name = spec.partition(":")[0]
    if not name or "/" in name or name.endswith(".gguf") or Path(spec).exists():
        return False
    return bool(suggest(name, PRESETS)) if ":" not in spec else "=" in spec


def build_student(
    spec: str,
    *,
    tokenizer: Any = None,
    dtype: str = "float32",
    seed: int = 0,
    quantization: Bits | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Return the student that `spec` describes, on CPU, in evaluation mode.

    Args:
        spec: PRESET (`llama-nano`, `qwen3-nano:hidden_size=96`), MODEL, or `prune:MODEL?layers=12`. `nano` is resolved
            by the command line.
        tokenizer: whose vocabulary and special tokens a preset takes; unused otherwise.
        dtype: what the weights are held in.
        seed: of a preset's initial weights; the global random state is left as it was.
        quantization: hold a MODEL in this many bits, to train LoRA beside it.

    Returns:
        A transformers PreTrainedModel that saves and loads as any other.

    Raises:
        UserError: what `student_kind` and `distill.models.load_model` refuse; a preset without tokenizer.
    """
    kind = student_kind(spec).kind
    if quantization is not None and kind != "model":
        raise UserError(f"only a whole model can be held in {quantization}, not {spec!r}: save it as a folder first")
    if kind == "preset":
        if tokenizer is None:
            raise UserError(f"the preset {spec!r} needs a tokenizer: name a model that has one (--tokenizer MODEL)")
        return _from_preset(resolve_preset(spec), tokenizer, dtype, seed)
    if spec.startswith("prune:"):
        cut = parse_prune(spec)
        model = load_model(cut.source, dtype=dtype, trust_remote_code=trust_remote_code)
        return prune(model, layers=cut.layers, keep=cut.keep, intermediate_size=cut.intermediate_size)
    device = None if quantization is None else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return load_model(spec, dtype=dtype, device=device, quantization=quantization, trust_remote_code=trust_remote_code)


def _from_preset(settings: dict[str, Any], tokenizer: Any, dtype: str, seed: int) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    values = dict(settings)
    theta = values.pop("rope_theta")
    rows = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    rope = {"rope_type": "default", "rope_theta": theta}
    config = AutoConfig.for_model(vocab_size=rows, rope_parameters=rope, **special, **values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype("float32"))
    ends = end_token_ids(config, tokenizer)
    special["eos_token_id"] = ends if len(ends) > 1 else tokenizer.eos_token_id
    model.generation_config = GenerationConfig(**special)
    return model.to(torch_dtype(dtype)).eval()
