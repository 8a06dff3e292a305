"""One forward pass of a causal language model, stopped before its vocabulary: hidden states and the head apart.

A loss needs logits only where something is trained, so the model's decoder runs once over the sequence and the head is
applied later, to chosen rows. `read_head` checks on a few tokens that head and hidden states together give the model's
own logits, so a model that transforms its logits in a way unknown here is refused instead of trained on wrong numbers.
A loss that looks deeper says so by a `Capture`; where a model keeps its blocks is `distill.blocks`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from distill.batch import Batch
from distill.blocks import Parts, decoder_blocks, projections, unwrapped
from distill.errors import UserError
from distill.head import Head


@dataclass(frozen=True, slots=True)
class Capture:
    """What of a model's inside a loss reads, beside the last hidden states.

    Attributes:
        layers: hidden states by number: 0 is the embeddings, i the output of the i-th decoder block (from 1), before
            the final norm.
        attention: decoder blocks (from 1) whose query, key and value projections are kept: their outputs, so before
            any norm of queries and keys (Qwen3) and before rotation.
    """

    layers: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Forward:
    """One model's pass over a batch.

    Attributes:
        hidden: (B, T, D) after the final norm.
        head: what reads it.
        layers: number -> (B, T, D), what `Capture.layers` asked for.
        attention: number -> query, key, value, each (B, T, heads * dim), what `Capture.attention` asked for.
    """

    hidden: Tensor
    head: Head
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, Parts] = field(default_factory=dict)


def run(model: nn.Module, head: Head, batch: Batch, capture: Capture | None = None) -> Forward:
    """Run `model`, which may be wrapped for distributed training or by PEFT, and keep its decoder's last hidden state.

    The wrapper's own forward is called, not the decoder's: gradient synchronisation and autocast live there. What
    `capture` asks for is taken by hooks that exist during this call only, so a block that gradient checkpointing runs
    again in the backward pass is not seen twice.

    On a CPU, rows of unlike lengths are run apart (`_groups`): the same numbers, and no padding is computed.

    Raises:
        UserError: a layer outside the model; attention projections that are not known or not run; gradient
            checkpointing with `use_reentrant=True`, which cuts the inside of a block off from gradients.
    """
    capture = capture or Capture()
    groups = _groups(model, batch)
    if len(groups) == 1:
        return _run(model, head, batch, capture)
    parts = []
    for rows in groups:
        longest = int(batch.attention_mask[rows].sum(1).max())
        ids, mask, weights = (each[rows, :longest] for each in (batch.input_ids, batch.attention_mask, batch.weights))
        parts.append(_run(model, head, Batch(ids, mask, weights), capture))
    back = torch.cat(groups).argsort()

    def whole(pieces: Iterable[Tensor]) -> Tensor:
        length = batch.input_ids.shape[1]
        return torch.cat([pad(piece, (0, 0, 0, length - piece.shape[1])) for piece in pieces])[back]

    layers = {number: whole(part.layers[number] for part in parts) for number in capture.layers}
    attention = {
        number: tuple(whole(pieces) for pieces in zip(*(part.attention[number] for part in parts), strict=True))
        for number in capture.attention
    }
    return Forward(whole(part.hidden for part in parts), head, layers, attention)  # type: ignore[arg-type]


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode: nothing is dropped out; every module is as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


# What one more pass costs a CPU in each layer, in products of two numbers: those it makes while a layer is dispatched.
PASS_PRODUCTS = 6e6


def _groups(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Return the batch's rows in groups to be run apart: of like lengths, where that costs less.

    One group on a GPU, which has packing for that; where ranks must call the wrapper once a step; and of packed rows.
    """
    rows = torch.arange(len(batch.input_ids), device=batch.input_ids.device)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rows.device.type != "cpu" or batch.position_ids is not None or distributed:
        return [rows]
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    numbers = sum(p.numel() for p in inner.get_decoder().parameters()) - inner.get_input_embeddings().weight.numel()
    padding = PASS_PRODUCTS * config.num_hidden_layers / max(numbers, 1)  # tokens that one more pass is worth
    lengths, order = batch.attention_mask.sum(1).sort(descending=True, stable=True)
    groups: list[list[int]] = []
    spare = 0
    for place, length in enumerate(lengths.tolist()):
        longest = int(lengths[groups[-1][0]]) if groups else 0
        spare += longest - length
        if not groups or spare > padding:
            groups.append([])
            spare = 0
        groups[-1].append(place)
    return [order[group] for group in groups]


def _run(model: nn.Module, head: Head, batch: Batch, capture: Capture) -> Forward:
    inner = unwrapped(model)
    taken: dict[Hashable, Tensor] = {}
    packed: dict[int, tuple[int, Callable[..., Parts]]] = {}
    with ExitStack() as hooks:
        hooks.callback(_watch(inner.get_decoder(), "hidden", taken).remove)
        for number in capture.layers:
            block = _block(inner, number or 1)
            hooks.callback(_watch(block, number, taken, entering=number == 0).remove)
        for number in capture.attention:
            modules, split = projections(_block(inner, number))
            packed[number] = len(modules), split
            for place, module in enumerate(modules):
                hooks.callback(_watch(module, (number, place), taken).remove)
        hooks.callback(inner.register_forward_hook(partial(_hand_out, taken), prepend=True).remove)
        # The model's own logits are not used: ask for those of one position only, where it can.
        brief = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(inner).forward).parameters else {}
        model(**batch.model_inputs(), use_cache=False, **brief)
    try:
        layers = {number: taken[number] for number in capture.layers}
        attention = {
            number: split(*(taken[number, place] for place in range(count)))
            for number, (count, split) in packed.items()
        }
    except KeyError as missing:
        raise UserError(
            f"{type(inner).__name__} did not run {missing} (block, or block and projection): it is compiled, "
            "or shares keys and values between blocks; compare other layers"
        ) from None
    return Forward(taken["hidden"], head, layers, attention)


def _hand_out(taken: Mapping[Hashable, Tensor], module: nn.Module, args: Any, output: Any) -> Any:
    """Make the last hidden states an output of the model, before any hook of a wrapper sees its outputs.

    FSDP2 gathers a module's weights for the backward pass when a gradient comes to one of its outputs; a loss begins at
    the hidden states.
    """
    output["hidden_states"] = (taken["hidden"],)
    return output


def _block(model: Any, number: int) -> nn.Module:
    blocks = decoder_blocks(model)
    if not 1 <= number <= len(blocks):
        raise UserError(f"there is no block {number} in {type(model).__name__}: its blocks are 1 to {len(blocks)}")
    return blocks[number - 1]


def _watch(module: nn.Module, name: Hashable, taken: dict[Hashable, Tensor], *, entering: bool = False) -> Any:
    """Keep what leaves `module`, or the hidden states that enter it, under `name`; return the hook's handle."""
    traced = torch.is_grad_enabled()

    def keep(value: Any) -> None:
        # Reentrant checkpointing runs a block without gradients: a loss on what is seen there would train nothing.
        if traced and not torch.is_grad_enabled():
            raise UserError(
                "gradient checkpointing with use_reentrant=True hides the inside of a model from a loss; "
                'set gradient_checkpointing_kwargs to {"use_reentrant": false}'
            )
        taken[name] = value if isinstance(value, Tensor) else value[0]

    if entering:
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: keep(args or kwargs["hidden_states"]), with_kwargs=True
        )
    return module.register_forward_hook(lambda _, args, output: keep(output))


def widened(states: Tensor) -> Tensor:
    """Return `states` in float32, or in their own type where that is wider."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def probe(model: Any, capture: Capture) -> Forward:
    """Run `model` on four tokens without gradients: what `capture` keeps, for its shapes."""
    with _four_tokens(model) as batch:
        return run(model, Head(model.get_output_embeddings()), batch, capture)


@contextmanager
def _four_tokens(model: Any) -> Iterator[Batch]:
    """Set `model` to evaluation without gradients, for a batch of four tokens."""
    weight = model.get_output_embeddings().weight
    ids = torch.arange(4, device=weight.device)[None] % weight.shape[0]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield Batch(ids, torch.ones_like(ids), torch.zeros(ids.shape))
    finally:
        model.train(was_training)


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
    with _four_tokens(model) as batch:
        expected = model(**batch.model_inputs(), use_cache=False).logits[0].float()
        got = head(run(model, head, batch).hidden[0])
    tolerance = 1e-4 if linear.weight.dtype in (torch.float32, torch.float64) else 3e-2
    # A NaN here means broken weights, not an unknown transform: the first step will say so.
    if (got - expected).abs().max() > tolerance * (1 + expected.abs().max()):
        raise UserError(f"the {who} ({type(model).__name__}) transforms its logits in a way that is not supported")
    return head
