"""Where a model keeps its decoder blocks, and a block its query, key and value projections.

Found by structure, not by a list of models: the decoder's list of blocks, and the module in a block that has `q_proj`,
`k_proj` and `v_proj`. The layouts that pack the three into one projection differ between models that name it alike,
so those are known by the class of the attention module; an unknown one is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from distill.errors import UserError

Parts = tuple[Tensor, Tensor, Tensor]  # query, key, value
SEPARATE = ("q_proj", "k_proj", "v_proj")


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside wrappers of distributed training (`.module`) and of PEFT, if any."""
    while True:
        if isinstance(inside := getattr(model, "module", None), nn.Module):
            model = inside
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the decoder blocks of a causal language model, first to last.

    Raises:
        UserError: the decoder has not one list of blocks.
    """
    decoder = unwrapped(model).get_decoder()
    lists = {name: child for name, child in decoder.named_children() if isinstance(child, nn.ModuleList)}
    if "layers" in lists:
        return lists["layers"]
    if len(lists) != 1:
        found = ", ".join(lists) or "none"
        raise UserError(f"{type(decoder).__name__} must have one list of decoder blocks to look inside; found {found}")
    return next(iter(lists.values()))


def projections(block: nn.Module) -> tuple[tuple[nn.Module, ...], Callable[..., Parts]]:
    """Return the modules whose outputs hold a block's queries, keys and values, and how to take them apart.

    The second is given the modules' outputs, (B, T, ...) each, and returns query, key and value, (B, T, heads * dim)
    each: what the projections put out, before any norm of queries and keys (Qwen3, Gemma 3) and before rotation.

    Raises:
        UserError: the block has no such projections, or they are packed in an unknown way.
    """
    for module in block.modules():
        parts = [part for name in SEPARATE if isinstance(part := getattr(module, name, None), nn.Module)]
        if len(parts) == len(SEPARATE):
            return tuple(parts), lambda query, key, value: (query, key, value)
        if type(module).__name__ in PACKED:
            name, split = PACKED[type(module).__name__]
            return (getattr(module, name),), partial(split, module)
    raise UserError(
        f"{type(block).__name__} has no query, key and value projections that are known "
        f"({', '.join(SEPARATE)}, or one of {', '.join(PACKED)}); compare hidden states instead"
    )


def _in_a_row(attention: Any, output: Tensor) -> Parts:
    keys = attention.num_key_value_heads * attention.head_dim
    query, key, value = output.split([output.shape[-1] - 2 * keys, keys, keys], dim=-1)
    return query, key, value


def _thirds(_: Any, output: Tensor) -> Parts:
    query, key, value = output.chunk(3, dim=-1)
    return query, key, value


def _by_head(attention: Any, output: Tensor) -> Parts:
    query, key, value = output.unflatten(-1, (-1, 3, attention.head_size)).unbind(-2)
    return query.flatten(-2), key.flatten(-2), value.flatten(-2)


# The attention's class: its packed projection, and how that holds queries, keys and values.
PACKED: dict[str, tuple[str, Callable[[Any, Tensor], Parts]]] = {
    "Phi3Attention": ("qkv_proj", _in_a_row),
    "GPT2Attention": ("c_attn", _thirds),
    "GPTNeoXAttention": ("query_key_value", _by_head),
}
