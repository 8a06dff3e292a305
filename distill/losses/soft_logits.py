"""Soft logits: a divergence between the student's and the teacher's next-token distributions (Hinton et al. 2015).

Needs one vocabulary (the first `num_outcomes` logits of both models mean the same tokens) and both models run on the
same input ids. Widths of the hidden states and of the padded vocabularies may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill.batch import Batch
from distill.divergences import DIVERGENCES, entropy
from distill.forward import Forward
from distill.losses.base import LossOutput, cross_entropy, sum_over_chunks
from distill.supports import dense
from distill.tables import bind, lookup


def soft_logits(
    student: Forward,
    teacher: Forward | None,
    batch: Batch,
    *,
    num_outcomes: int,
    divergence: str = "forward_kl",
    divergence_options: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    hard_label_weight: float = 0.0,
    chunk_tokens: int = 1024,
) -> LossOutput:
    """Return ``sum w_t [D(student_t, teacher_t) + hard_label_weight * CE_t]`` over the trained tokens.

    Metrics (sums): `divergence`, `student_entropy`, `teacher_entropy` (nats, at the temperature compared),
    `top1_agreement`, and `cross_entropy` when it takes part.

    Args:
        num_outcomes: tokens of the shared vocabulary; logits beyond are padding.
        divergence: a name of `DIVERGENCES` or ``pkg.mod:function``.
        divergence_options: its keyword-only arguments.
        temperature: divides both models' logits inside the divergence. The loss is the divergence *at* that
            temperature: there is no hidden T² factor, so the gradient shrinks about as 1/T²; raise the learning rate
            or lower `hard_label_weight` accordingly. The cross-entropy stays at temperature 1.
        hard_label_weight: weight of the cross-entropy of the trace's own tokens, from the same projection.
        chunk_tokens: positions projected to the vocabulary at once.

    Raises:
        UserError: unknown divergence or option; a model narrower than `num_outcomes`.
    """
    assert teacher is not None, "soft_logits declares that it needs the teacher"
    compare = bind(
        lookup(DIVERGENCES, divergence, "divergence"), divergence_options or {}, f"divergence {divergence!r}"
    )

    def chunk_loss(
        student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert teacher_logits is not None
        student_logp, teacher_logp = dense(
            student_logits,
            teacher_logits,
            num_outcomes=num_outcomes,
            student_temperature=temperature,
            teacher_temperature=temperature,
        )
        total = (weights * compare(student_logp, teacher_logp)).sum()
        metrics = {"divergence": total.detach()}
        if hard_label_weight:
            hard = (weights * cross_entropy(student_logits, labels)).sum()
            total = total + hard_label_weight * hard
            metrics["cross_entropy"] = hard.detach()
        with torch.no_grad():
            metrics["student_entropy"] = (weights * entropy(student_logp)).sum()
            metrics["teacher_entropy"] = (weights * entropy(teacher_logp)).sum()
            metrics["top1_agreement"] = (weights * (student_logp.argmax(-1) == teacher_logp.argmax(-1))).sum()
        return total, metrics

    return sum_over_chunks(chunk_loss, student, teacher, batch, chunk_tokens=chunk_tokens)
