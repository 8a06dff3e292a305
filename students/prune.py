"""Cut a smaller decoder out of a larger one: fewer layers, and optionally a narrower MLP.

Kept layers are copied bit for bit. Evenly spread layers with the first and the last among them are the usual start for
a distilled student (DistilBERT, Sanh et al. 2019, arXiv:1910.01108, takes every second layer; Minitron, Muralidharan
et al. 2024, arXiv:2407.14679, ranks them). MLP channels are kept by weight norm, the data-free criterion.

Only decoders built as Llama and Qwen are, with `model.layers` holding `self_attn` and a gated `mlp`. Heads and hidden
width are not cut.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from distill.errors import UserError
from distill.tables import suggest

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_OPTIONS = ("layers", "keep", "intermediate_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneSpec:
    """What `prune:MODEL?layers=12` asks for: `layers` how many, or `keep` which (from 0); the MLP's width or None."""

    source: str
    layers: int | None = None
    keep: tuple[int, ...] | None = None
    intermediate_size: int | None = None


def parse_prune(spec: str) -> PruneSpec:
    """Read `prune:MODEL?layers=N`, `prune:MODEL?keep=0,2,5` and `&intermediate_size=N`.

    Raises:
        UserError: no model, nothing to cut, unknown options or values that are no whole numbers.
    """
    source, _, query = spec.removeprefix("prune:").partition("?")
    example = "write prune:MODEL?layers=12, prune:MODEL?keep=0,2,5 or prune:MODEL?intermediate_size=1024"
    if not source or not query:
        raise UserError(f"{spec!r} does not say what to cut: {example}")
    values: dict[str, Any] = {"source": source}
    pairs = parse_qsl(query, keep_blank_values=True)
    if not pairs:
        raise UserError(f"{spec!r} does not say what to cut: {example}")
    for key, text in pairs:
        if key not in _OPTIONS:
            raise UserError(
                f"prune takes no option {key!r}: accepted are {', '.join(_OPTIONS)}{suggest(key, _OPTIONS)}"
            )
        if key in values:
            raise UserError(f"{spec!r} sets {key!r} twice")
        try:
            values[key] = tuple(int(part) for part in text.split(",")) if key == "keep" else int(text)
        except ValueError as error:
            kind = "whole numbers with commas between" if key == "keep" else "a whole number"
            raise UserError(f"prune: {key} is {kind}, given {text!r}") from error
    if "layers" in values and "keep" in values:
        raise UserError(f"{spec!r} says both layers and keep: give one")
    return PruneSpec(**values)


def spread(total: int, layers: int) -> tuple[int, ...]:
    """Return `layers` of `range(total)`, evenly spread, the first and the last among them (one layer: the first).

    Raises:
        UserError: not between 1 and `total`.
    """
    if not 1 <= layers <= total:
        raise UserError(f"cannot keep {layers} layers of a model with {total}: give 1 to {total}")
    if layers == 1:
        return (0,)
    # Whole-number rounding, so that no floating-point tie decides a layer.
    return tuple((2 * i * (total - 1) + layers - 1) // (2 * (layers - 1)) for i in range(layers))


def prune(
    model: Any, *, layers: int | None = None, keep: Sequence[int] | None = None, intermediate_size: int | None = None
) -> Any:
    """Return a new model made of some of the layers of `model`, which is left as it is.

    Args:
        model: a Llama- or Qwen-style causal language model.
        layers: how many layers to keep, evenly spread.
        keep: which layers to keep instead, ascending, from 0.
        intermediate_size: channels of each MLP to keep, those of largest weight norm, in their order.

    Raises:
        UserError: another architecture, or layers and widths that the model does not have.
    """
    import torch

    config = model.config
    if config.model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise UserError(f"cannot prune a model of type {config.model_type!r}: known are {known}")
    total = config.num_hidden_layers
    if layers is not None and keep is not None:
        raise UserError("prune takes layers or keep, not both")
    kept = tuple(keep) if keep is not None else spread(total, layers if layers is not None else total)
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= total:
        raise UserError(f"keep lists layers from 0 to {total - 1}, ascending, each once, given {list(kept)}")
    width = config.intermediate_size if intermediate_size is None else intermediate_size
    if not 1 <= width <= config.intermediate_size:
        raise UserError(f"cannot keep {width} MLP channels of {config.intermediate_size}: prune only narrows")

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        small = type(model)(_pruned_config(config, kept, width)).to(model.dtype)
        small.load_state_dict(_pruned_weights(model, kept, width), strict=True)
    small.tie_weights()
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.eval()


def _pruned_config(config: Any, kept: Sequence[int], width: int) -> Any:
    values = config.to_dict()
    values["num_hidden_layers"] = len(kept)
    values["intermediate_size"] = width
    for name in ("layer_types", "no_rope_layers"):  # one entry per layer
        if values.get(name):
            values[name] = [values[name][i] for i in kept]
    if "max_window_layers" in values:  # layers below it attend to everything
        values["max_window_layers"] = sum(i < values["max_window_layers"] for i in kept)
    return type(config)(**values)


def _pruned_weights(model: Any, kept: Sequence[int], width: int) -> dict[str, Any]:
    """Return the state of the pruned model: kept layers renumbered, MLP channels selected."""
    state = model.state_dict()
    new_index = {old: new for new, old in enumerate(kept)}
    channels = {old: _strongest_channels(model.model.layers[old].mlp, width) for old in kept}
    weights = {}
    for name, tensor in state.items():
        if not name.startswith("model.layers."):
            weights[name] = tensor
            continue
        old, rest = name.removeprefix("model.layers.").split(".", 1)
        if int(old) not in new_index:
            continue
        index = channels[int(old)]
        if index is not None and rest.startswith("mlp."):
            # gate and up have one row (and bias) per channel, down one column; down's bias belongs to the output
            if not rest.startswith("mlp.down_proj."):
                tensor = tensor[index]
            elif tensor.dim() == 2:
                tensor = tensor[:, index]
        weights[f"model.layers.{new_index[int(old)]}.{rest}"] = tensor
    return weights


def _strongest_channels(mlp: Any, width: int) -> Any:
    """Return the kept channels, ascending (width,), or None when all are: largest product of the three norms."""
    gate, up, down = (getattr(mlp, name).weight.float() for name in ("gate_proj", "up_proj", "down_proj"))
    if width == gate.shape[0]:
        return None
    score = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    return score.topk(width).indices.sort().values
