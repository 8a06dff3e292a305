"""LoRA: a student whose own weights are frozen and that learns small matrices beside them (arXiv 2106.09685), by PEFT.

A linear layer ``W x`` becomes ``W x + alpha / r * B A x``, with A (r, in) random and B (out, r) zero at the start: the
student begins as it was. With a base of 4 bits (QLoRA, arXiv 2305.14314) W is NF4, with quantised scales.

What is saved at the end is a plain model: the products are added to the weights, so that whatever loads models loads
it, and the adapter lies beside in `adapter/`. The sum is taken in float32 and rounded once. A 4-bit base is dequantised
for it and stays so: the saved weights are those that training saw, plus what it learnt, in the type it computed in.
(Adding into 4-bit weights would round away most of an adapter; adding to the weights before quantisation would be a
model that nobody trained.)

PEFT is imported where it is needed. Loading in few bits is `distill.quantisation`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.tables import suggest

ADAPTER = "adapter"  # the folder beside a saved model
_NAME = "default"  # PEFT's name of a model's only adapter


def add_lora(
    model: Any,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Literal["all-linear"] | Sequence[str] = "all-linear",
) -> Any:
    """Return `model` frozen, with adapters; they alone are trained. The adapters are float32, whatever the model is.

    The output embedding is never adapted: losses read it as one matrix.

    Args:
        model: a causal language model; it is changed in place.
        r: rank of the adapters.
        alpha: their weight is alpha / r.
        dropout: share of a layer's inputs that its adapter does not see, while training.
        target_modules: names of linear layers (`q_proj`), or "all-linear" for all but the output embedding. Experts
            that a model keeps in one tensor are no linear layers and stay as they are.

    Raises:
        UserError: a name that no linear layer has, or the output embedding's; a quantised model on the CPU.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    # bitsandbytes repacks weights on the CPU when a model first runs in evaluation, for kernels without a backward
    # pass: gradients are wrong from then on, without an error (version 0.50).
    if getattr(model, "is_quantized", False) and model.device.type == "cpu":
        raise UserError("--load-in-4bit trains on a GPU only: leave it out, or take --dtype bfloat16")
    if target_modules != "all-linear":
        _check_names(model, target_modules)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT only divides it by r
        lora_dropout=dropout,
        target_modules=target_modules if target_modules == "all-linear" else list(target_modules),
        task_type=TaskType.CAUSAL_LM,
    )
    return get_peft_model(model, config)


def is_lora(model: Any) -> bool:
    """Whether `model` came out of `add_lora`."""
    return hasattr(model, "get_base_model")


def merged(model: Any, state: Mapping[str, Tensor] | None = None) -> Any:
    """Return the plain model that computes what `model` does; `model` stays as it is.

    Args:
        model: what `add_lora` returned.
        state: its state dict, gathered, where its parameters are spread over ranks; default: its own.

    Returns:
        A model of the base's class on the CPU, for `save_pretrained` or to run. Where `model` is there, too, they share
        the weights that no adapter changes.
    """
    from accelerate import init_empty_weights

    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        plain = type(base)(config)
    plain.load_state_dict(_merged_state(model, model.state_dict() if state is None else state), assign=True)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(base.generation_config)
    return plain.eval()


def save_merged(model: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the merged model into `folder` and the adapter alone into its `adapter/`; see `merged`."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        merged(model, state).save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    adapters = None if state is None else dict(state)
    model.save_pretrained(folder / ADAPTER, state_dict=adapters, save_embedding_layers=False)


def _check_names(model: Any, names: Sequence[str]) -> None:
    head = model.get_output_embeddings()
    modules = {name: module for name, module in model.named_modules() if name and not len(list(module.children()))}
    linear = {name: module for name, module in modules.items() if getattr(module, "weight", torch.zeros(0)).dim() == 2}
    known = {name.rpartition(".")[2] for name, module in linear.items() if not isinstance(module, nn.Embedding)}
    for wanted in names:
        found = [module for name, module in linear.items() if name == wanted or name.endswith("." + wanted)]
        if any(module is head or isinstance(module, nn.Embedding) for module in found):
            raise UserError(f"--lora-target-modules {wanted!r}: embeddings are not adapted, in or out")
        if not found:
            listed = ", ".join(sorted(known))
            raise UserError(f"--lora-target-modules {wanted!r}: known are {listed}{suggest(wanted, known)}")


def _merged_state(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of the base model, on the CPU, with each adapter's product added to its layer's weight."""
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    state = {key.removeprefix(prefix): value.detach() for key, value in state.items()}
    layers = dict(model.get_base_model().named_modules())
    adapted = {name: layer for name, layer in layers.items() if isinstance(layer, LoraLayer)}
    plain: dict[str, Tensor] = {}
    scales: list[str] = []  # of 4-bit weights: they lie beside them in the state
    for name, layer in layers.items():
        if name not in adapted and hasattr(getattr(layer, "weight", None), "quant_state"):
            plain[name.removesuffix(".base_layer") + ".weight"] = _dequantised(layer.weight).cpu()
            scales.append(name + ".weight.")
    for name, value in state.items():
        if ".lora_" not in name and not name.startswith(tuple(scales)):
            plain.setdefault(name.replace(".base_layer.", "."), value.cpu())
    for name, layer in adapted.items():
        down, up = (state[f"{name}.lora_{which}.{_NAME}.weight"].cpu().float() for which in "AB")
        delta = layer.scaling[_NAME] * (up @ down)
        weight = plain[name + ".weight"]
        turned = delta.T if getattr(layer, "fan_in_fan_out", False) else delta  # GPT-2 keeps (in, out)
        plain[name + ".weight"] = (weight.float() + turned).to(weight.dtype)
    return plain


def _dequantised(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)
