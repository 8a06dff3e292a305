"""The tensors of one forward pass, with one mask.

`weights[b, t]` is the weight of *predicting token t* of sequence b; 0 means untrained (prompt, padding). Every loss
reads this one mask through `Batch.trained`; nobody re-derives it from labels or padding. Sequences are padded on the
right, where causal attention cannot see the padding.

Tokenising is `distill.render`; packing several sequences into one row is not done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distill.render import Example


@dataclass(frozen=True, slots=True)
class Batch:
    """B sequences of up to T tokens.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: (B, T) int64, 1 on tokens, 0 on padding.
        weights: (B, T) float32, the weight of predicting token t; column 0 is always 0.
    """

    input_ids: Tensor
    attention_mask: Tensor
    weights: Tensor

    def trained(self) -> Trained:
        """Return where predictions are trained, what they should be and how much each counts."""
        weights = self.weights[:, 1:]
        rows = weights > 0
        return Trained(rows, self.input_ids[:, 1:][rows], weights[rows])

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields by name, as a `transformers.Trainer` moves them between devices."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "weights": self.weights}


class Trained(NamedTuple):
    """N trained predictions: `rows` (B, T-1) bool selects hidden states, `labels` (N,), `weights` (N,) float32."""

    rows: Tensor
    labels: Tensor
    weights: Tensor


def collate(examples: Sequence[Example], *, pad_id: int) -> Batch:
    """Pad examples on the right to the longest.

    Raises:
        ValueError: an example is empty, its weights do not match its tokens, or it trains its first token, which
            nothing predicts.
    """
    for example in examples:
        if len(example.input_ids) == 0 or len(example.input_ids) != len(example.weights):
            raise ValueError(f"an example has {len(example.input_ids)} tokens and {len(example.weights)} weights")
        if example.weights[0] != 0:
            raise ValueError("an example gives weight to its first token, which nothing predicts")
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    weights = torch.zeros(shape, dtype=torch.float32)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.as_tensor(example.input_ids, dtype=torch.int64)
        attention_mask[row, :length] = 1
        weights[row, :length] = torch.as_tensor(example.weights, dtype=torch.float32)
    return Batch(input_ids, attention_mask, weights)
