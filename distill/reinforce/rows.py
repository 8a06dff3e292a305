"""Rewarded completions as rows of a batch: how their tokens count, and what a step's sum is divided by.

`loss_type` is TRL's: `grpo` takes the mean over a completion's tokens and then over completions (arXiv 2402.03300),
`dapo` the mean over all tokens of the step (arXiv 2503.14476, eq. 8), `dr_grpo` divides every completion by the longest
possible (arXiv 2503.20783). All three are a sum with weights, divided once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.batch import Batch, PolicyRows, collate
from distill.render import Example


@dataclass(frozen=True, slots=True)
class Row:
    """One completion as it is trained on.

    Attributes:
        example: prompt and completion; its weights say how much each token counts.
        advantage: how much better it was than the others to its question.
        masked: it was cut, where such completions teach nothing, or has no reward.
        old, reference: (T,) log-probability of each trained token when it was drawn, and by the reference; nats, laid
            out as the tokens. None where not asked.
    """

    example: Example
    advantage: float
    masked: bool = False
    old: np.ndarray | None = None
    reference: np.ndarray | None = None


def weigh(example: Example, loss_type: str) -> Example:
    """Return a completion whose tokens count as `loss_type` says; `example` gives each of them 1."""
    trained = example.weights > 0
    if loss_type != "grpo":
        return example
    return Example(example.input_ids, (trained / trained.sum()).astype(np.float32), begin=example.begin)


def mass(rows: Sequence[Row], loss_type: str, *, longest: int | None) -> float:
    """Return what the sum over the rows of an optimizer step is divided by.

    Args:
        rows: all of the step, those that are left out of its batches included.
        longest: most tokens of a completion, for `dr_grpo`.
    """
    if loss_type == "grpo":
        return float(len(rows))
    if loss_type == "dr_grpo":
        assert longest is not None
        return float(len(rows) * longest)
    return float(sum((row.example.weights > 0).sum() for row in rows if not row.masked))


def policy_batch(rows: Sequence[Row], *, pad_id: int) -> Batch:
    """Lay rows into a batch, padded on the right."""
    batch = collate([row.example for row in rows], pad_id=pad_id)
    width = batch.input_ids.shape[1]

    def laid(values: Sequence[np.ndarray | None]) -> Tensor | None:
        known = [np.pad(value, (0, width - len(value))) for value in values if value is not None]
        assert len(known) in (0, len(values)), "all rows of a sampling are read alike"
        return torch.from_numpy(np.stack(known).astype(np.float32)) if known else None

    policy = PolicyRows(
        torch.tensor([row.advantage for row in rows], dtype=torch.float32),
        laid([row.old for row in rows]),
        laid([row.reference for row in rows]),
    )
    return Batch(batch.input_ids, batch.attention_mask, batch.weights, policy=policy)


def packed(row: Row) -> dict[str, Any]:
    """Return a row as numbers and tensors, for a checkpoint."""
    arrays = {"ids": row.example.input_ids, "weights": row.example.weights, "old": row.old, "reference": row.reference}
    tensors = {name: None if value is None else torch.from_numpy(value) for name, value in arrays.items()}
    return {**tensors, "begin": row.example.begin, "advantage": row.advantage, "masked": row.masked}


def unpacked(kept: Mapping[str, Any]) -> Row:
    """Undo `packed`."""
    example = Example(kept["ids"].numpy(), kept["weights"].numpy(), begin=kept["begin"])
    old, reference = (None if kept[name] is None else kept[name].numpy() for name in ("old", "reference"))
    return Row(example, kept["advantage"], kept["masked"], old, reference)
