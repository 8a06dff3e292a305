"""Hard labels: cross-entropy on the tokens the teacher wrote (sequence-level distillation, arXiv 1606.07947)."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.batch import Batch
from distill.forward import Forward
from distill.losses.base import LossOutput, cross_entropy, sum_over_chunks


def hard_labels(student: Forward, teacher: Forward | None, batch: Batch, *, chunk_tokens: int = 1024) -> LossOutput:
    """Return the cross-entropy of the trace's own tokens; the teacher is not asked.

    Metrics (sums): `token_accuracy`, how often the label is the student's most probable token.

    Args:
        chunk_tokens: positions projected to the vocabulary at once.
    """

    def chunk_loss(
        student_logits: Tensor, _: Tensor | None, labels: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total = (weights * cross_entropy(student_logits, labels)).sum()
        with torch.no_grad():
            right = (weights * (student_logits.argmax(-1) == labels)).sum()
        return total, {"token_accuracy": right}

    return sum_over_chunks(chunk_loss, student, None, batch, chunk_tokens=chunk_tokens)
