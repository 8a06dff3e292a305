"""A causal language model's head: what turns its last hidden states into logits.

`Head` applies it; `Head.factors` shows the matrices it is made of, for whoever multiplies with them himself
(`distill.fused`). Which models have such a head is checked in `distill.forward.read_head`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Factors(NamedTuple):
    """A head's product before scale and cap: the sum of ``rows @ matrix.T`` over `pairs`, plus `bias`.

    Attributes:
        pairs: (rows (N, d), matrix (V, d)) each, with their graphs: the hidden states with the output embedding first,
            then one pair of the adapter's rank for every LoRA adapter, so that no (V, D) product B @ A is ever made.
        bias: (V,) or None.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Head:
    """The output embedding (tied or not), then a scale, then a soft cap."""

    linear: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Project ``(N, D)`` hidden states to ``(N, V)`` logits, float32 or wider."""
        logits = self.linear(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def transform_(self, product: Tensor) -> Tensor:
        """Turn ``(N, V)`` products of the output embedding into logits, in their memory and without a graph."""
        if self.scale != 1.0:
            product.mul_(self.scale)
        return product if self.softcap is None else product.div_(self.softcap).tanh_().mul_(self.softcap)

    def factors(self, hidden: Tensor) -> Factors | None:
        """Return the matrices whose products with ``(N, D)`` hidden states the head sums up.

        None where it is not known to be such a sum: quantised weights, DoRA, hooks, a forward of its own. A weight
        that FSDP2 has sharded is gathered whole, and its gradient is averaged over the ranks as FSDP2 does.
        """
        linear: Any = self.linear
        pairs: list[tuple[Tensor, Tensor]] = []
        if hasattr(linear, "base_layer") and hasattr(linear, "lora_A"):
            adapters = _lora_pairs(linear, hidden)
            if adapters is None:
                return None
            pairs, linear = adapters, linear.base_layer
        if not _is_plain(linear):
            return None
        bias = None if linear.bias is None else _whole(linear.bias)
        return Factors(((hidden, _whole(linear.weight)), *pairs), bias)


def _lora_pairs(linear: Any, hidden: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    # What `peft.tuners.lora.Linear.forward` adds to its base layer; None where it does something else.
    if _is_hooked(linear) or getattr(linear, "lora_variant", None) or any(getattr(linear, "use_dora", {}).values()):
        return None
    if linear.merged:
        return None if linear.disable_adapters else []  # a merged adapter is in the base layer's weight
    pairs = []
    for name in [] if linear.disable_adapters else linear.active_adapters:
        if name not in linear.lora_A:
            continue
        down, up = linear.lora_A[name], linear.lora_B[name]
        if not _is_plain(up) or up.bias is not None:
            return None
        rows = down(linear.lora_dropout[name](hidden.to(down.weight.dtype))) * linear.scaling[name]
        pairs.append((rows, _whole(up.weight)))
    return pairs


def _is_plain(linear: Any) -> bool:
    weight = getattr(linear, "weight", None)
    if getattr(type(linear), "forward", None) is not nn.Linear.forward or not isinstance(weight, Tensor):
        return False
    if hasattr(weight, "full_tensor"):
        return True  # FSDP2 has hooks of its own, which gather what `_whole` gathers
    known = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.dim() == 2
    return known and not _is_hooked(linear)


def _is_hooked(linear: Any) -> bool:
    from torch.distributed.fsdp import FSDPModule

    if isinstance(linear, FSDPModule):
        return False  # FSDP2's hooks gather the weight, and it is there since the model ran, or `_whole` gathers it
    return bool("forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks)


def _whole(parameter: Any) -> Tensor:
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    mesh = parameter.device_mesh
    whole: Tensor = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:  # a sum of the ranks' gradients; gloo has no average
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole
