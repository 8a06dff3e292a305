"""What a loss mode returns, and the loop that lets it see logits without ever holding (tokens, vocabulary).

A mode returns *sums* over trained tokens and their mass; the trainer divides once by the mass of the whole optimizer
step, so a mode never averages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.batch import Batch
from distill.forward import Capture, Forward

# (student_logits (N, V), teacher_logits (N, V') or None, labels (N,), weights (N,)) -> total (), metrics of sums
ChunkLoss = Callable[[Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A loss mode's answer for one batch.

    Attributes:
        total: () the weighted *sum* over trained tokens, in nats, with its graph.
        weight: () the sum of the weights.
        metrics: name -> () weighted sums over the same tokens, or (2,) a sum and the weight it is to be divided by;
            detached.
    """

    total: Tensor
    weight: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Inner:
    """What a mode looks at inside the two models, and what it trains beside the student.

    Attributes:
        student, teacher: what is captured in a forward pass.
        modules: the mode's own parameters (projectors), trained with the student and saved beside it; None has none.
        plan: whatever the mode worked out from the two models, for itself.
        scorers: further models that the mode runs forward on every batch, for the ledger: each one's text config, and
            whether it reads the student's tokens or the teacher's.
    """

    student: Capture = field(default_factory=Capture)
    teacher: Capture = field(default_factory=Capture)
    modules: nn.Module | None = None
    plan: Any = None
    scorers: tuple[tuple[Any, Literal["student", "teacher"]], ...] = ()


def sum_over_chunks(
    chunk_loss: ChunkLoss, student: Forward, teacher: Forward | None, batch: Batch, *, chunk_tokens: int
) -> LossOutput:
    """Project the trained positions `chunk_tokens` at a time, apply `chunk_loss` to each chunk and add up.

    Each chunk is recomputed in the backward pass (`torch.utils.checkpoint`), so at any time the logits of one chunk
    exist, whatever the length of the batch.
    """
    trained = batch.trained()
    student_rows = student.hidden[:, :-1][trained.rows]
    teacher_rows = None if teacher is None else teacher.hidden[:, :-1][trained.rows]

    def one_chunk(piece: slice) -> tuple[Tensor, dict[str, Tensor]]:
        teacher_logits = None
        if teacher is not None and teacher_rows is not None:
            with torch.no_grad():
                teacher_logits = teacher.head(teacher_rows[piece])
        return chunk_loss(
            student.head(student_rows[piece]), teacher_logits, trained.labels[piece], trained.weights[piece]
        )

    # Starting from a zero that hangs on the student keeps the graph whole for a batch without trained tokens.
    total = student.hidden.flatten()[:1].sum().float() * 0.0
    metrics: dict[str, Tensor] = {}
    for start in range(0, len(trained.labels), chunk_tokens):
        part, sums = checkpoint(one_chunk, slice(start, start + chunk_tokens), use_reentrant=False)
        total = total + part
        for name, value in sums.items():
            metrics[name] = metrics[name] + value.detach() if name in metrics else value.detach()
    return LossOutput(total, trained.weights.sum(), metrics)
