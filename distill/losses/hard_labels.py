"""Hard labels: cross-entropy on the tokens the teacher wrote (sequence-level distillation, arXiv 1606.07947)."""

from __future__ import annotations

from distill.batch import Batch
from distill.forward import Forward
from distill.fused import fused_loss
from distill.losses.base import LossOutput


def hard_labels(
    student: Forward, teacher: Forward | None, batch: Batch, *, chunk_tokens: int | None = None
) -> LossOutput:
    """Return the cross-entropy of the trace's own tokens; the teacher is not asked.

    Metrics (sums): `cross_entropy`; `token_accuracy`, how often no token is likelier to the student than the label.

    Args:
        chunk_tokens: positions projected to the vocabulary at once; None chooses by bytes.
    """
    trained = batch.trained()
    rows = student.hidden[:, :-1][trained.rows]
    total, metrics = fused_loss(
        rows, student.head, trained.labels, trained.weights, None, hard_weight=1.0, chunk_tokens=chunk_tokens
    )
    return LossOutput(total, trained.weights.sum(), metrics)
