"""What every stage cost: FLOPs, seconds and tokens, added up per stage and stored in manifests and `run.json`.

FLOPs are *model* FLOPs from the architecture (2 per multiply-add), attention included, recomputation not: the same
formula on every machine, so that arms can be matched by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


@dataclass(slots=True)
class Ledger:
    """Running totals of one stage. `flops` is 0.0 where nothing was computed, and None where it is unknown."""

    flops: float | None = 0.0
    seconds: float = 0.0
    tokens: int = 0

    def forward(self, cost: ForwardCost | None, length: int) -> None:
        """Add one forward pass over a causal sequence of `length` tokens; without a cost the sum is unknown."""
        if cost is None:
            self.flops = None
        elif self.flops is not None:
            self.flops += cost.flops(length, length / 2)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return asdict(self)


def total(ledgers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sum of ledgers in their JSON form; what is unknown in one of them is unknown in the sum."""
    listed = list(ledgers)
    names = Ledger().to_json()
    return {
        name: None if any(each[name] is None for each in listed) else sum(each[name] for each in listed)
        for name in names
    }


class ForwardCost(NamedTuple):
    """What a forward pass of one model costs: `weights` entries of its matrices, and `reach`, its attention's width.

    `reach` is layers * heads * head_dim. A backward pass costs twice a forward pass.
    """

    weights: int
    reach: int

    def flops(self, num_tokens: float, mean_context: float) -> float:
        """Return the FLOPs of `num_tokens` tokens.

        Per token: 2 per weight of every matrix product (attention projections, gated MLP, lm_head) plus
        ``4 * reach * mean_context`` for scores and values.

        Args:
            num_tokens: tokens passed through the model, prompt included.
            mean_context: positions that a token attends to on average; half the length of one causal sequence.
        """
        return num_tokens * (2.0 * self.weights + 4.0 * self.reach * mean_context)


def forward_flops(config: Any, num_tokens: float, mean_context: float) -> float:
    """Return the FLOPs of one forward pass (see `ForwardCost.flops`) of the model with this transformers config."""
    return forward_cost(config).flops(num_tokens, mean_context)


def forward_cost(config: Any) -> ForwardCost:
    """Return what a token costs a Llama- or Qwen-style decoder, by its transformers config."""
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    projections = width * head_dim * (2 * heads + 2 * kv_heads)
    # A mixture of experts computes only the experts a token is sent to; a config without a gated MLP has two matrices.
    experts = getattr(config, "num_experts_per_tok", None)
    inner = experts * config.moe_intermediate_size if experts else getattr(config, "intermediate_size", None)
    mlp = 3 * width * inner if inner else 2 * width * (getattr(config, "n_inner", None) or 4 * width)
    weights = layers * (projections + mlp) + width * config.vocab_size
    return ForwardCost(weights, layers * heads * head_dim)
