"""One forward pass of a causal language model, stopped before its vocabulary: hidden states and the head apart.

A loss needs logits only where something is trained, so the model's decoder runs once over the sequence and the head is
applied later, to chosen rows. `read_head` checks on a few tokens that head and hidden states together give the model's
own logits, so a model that transforms its logits in a way unknown here is refused instead of trained on wrong numbers.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError


@dataclass(frozen=True, slots=True)
class Head:
    """What turns hidden states into logits: the output embedding (tied or not), then a scale, then a soft cap."""

    linear: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Project ``(N, D)`` hidden states to ``(N, V)`` logits, float32 or wider."""
        logits = self.linear(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


@dataclass(frozen=True, slots=True)
class Forward:
    """One model's pass over a batch: `hidden` (B, T, D) after the final norm, and the `head` that reads it."""

    hidden: Tensor
    head: Head


def run(model: nn.Module, head: Head, input_ids: Tensor, attention_mask: Tensor) -> Forward:
    """Run `model`, which may be wrapped for distributed training, and keep its decoder's last hidden state.

    The wrapper's own forward is called, not the decoder's: gradient synchronisation and autocast live there.
    """
    inner: Any = getattr(model, "module", model)
    kept: list[Tensor] = []
    hook = inner.get_decoder().register_forward_hook(lambda module, args, output: kept.append(output[0]))
    # The model's own logits are not used: ask for those of one position only, where it can.
    brief = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(inner).forward).parameters else {}
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **brief)
    finally:
        hook.remove()
    return Forward(kept[-1], head)


def read_head(model: Any, who: str) -> Head:
    """Return the head of a causal language model, proved on four tokens.

    Args:
        who: "student" or "teacher", for the message.

    Raises:
        UserError: the model has no output embedding or decoder, or its logits are something else than
            softcap(scale * head(hidden)).
    """
    linear = model.get_output_embeddings()
    decoder = model.get_decoder()
    if linear is None or decoder is None or decoder is model:
        raise UserError(f"the {who} ({type(model).__name__}) is not a causal language model with a decoder and a head")
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    head = Head(linear, scale, getattr(config, "final_logit_softcapping", None))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.arange(4, device=linear.weight.device)[None] % linear.weight.shape[0]
            expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
            got = head(run(model, head, ids, torch.ones_like(ids)).hidden[0])
    finally:
        model.train(was_training)
    tolerance = 1e-4 if linear.weight.dtype in (torch.float32, torch.float64) else 3e-2
    # A NaN here means broken weights, not an unknown transform: the first step will say so.
    if (got - expected).abs().max() > tolerance * (1 + expected.abs().max()):
        raise UserError(f"the {who} ({type(model).__name__}) transforms its logits in a way that is not supported")
    return head
