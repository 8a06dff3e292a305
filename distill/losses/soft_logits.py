"""Soft logits: a divergence between the student's and the teacher's next-token distributions (Hinton et al. 2015).

The teacher runs on the same input ids, or its stored signal is read. Needs one vocabulary: the first `num_outcomes`
logits of both models mean the same tokens. Widths of the hidden states and of the padded vocabularies may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.batch import Batch
from distill.errors import UserError
from distill.forward import Forward
from distill.fused import TeacherHidden, fused_loss
from distill.losses.base import LossOutput
from distill.taid import TaidSchedule


def soft_logits(
    student: Forward,
    teacher: Forward | None,
    batch: Batch,
    *,
    num_outcomes: int,
    progress: float = 1.0,
    divergence: str = "forward_kl",
    divergence_options: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    scale_by_temperature_squared: bool = False,
    hard_label_weight: float = 0.0,
    support: str = "auto",
    top_k: int | None = None,
    taid_start: float | None = None,
    taid_end: float = 1.0,
    chunk_tokens: int | None = None,
) -> LossOutput:
    """Return ``sum w_t [D(student_t, teacher_t) + hard_label_weight * CE_t]`` over the trained tokens.

    Metrics (sums): `divergence`, `student_entropy`, `teacher_entropy` (nats, at the temperature compared),
    `top1_agreement`, `top_k_overlap`, each where it is known; `cross_entropy` and `token_accuracy` when the hard labels
    take part. See `distill.fused.fused_loss`.

    Args:
        num_outcomes: tokens of the shared vocabulary; logits beyond are padding.
        progress: the share of the training that is done, in [0, 1]; TAID reads it.
        divergence: a name of `DIVERGENCES` or ``pkg.mod:function``.
        divergence_options: its keyword-only arguments.
        temperature: divides both models' logits inside the divergence. The loss is the divergence *at* that
            temperature, and its gradient shrinks about as 1/T². The cross-entropy stays at temperature 1. This is not
            the temperature that traces are sampled with.
        teacher_temperature: divides the teacher's logits instead, where the two shall differ.
        scale_by_temperature_squared: multiply the divergence's part by `temperature` squared (Hinton et al. 2015,
            section 2), so that its gradient keeps its size beside the cross-entropy's.
        hard_label_weight: weight of the cross-entropy of the trace's own tokens, from the same projection.
        support: what the two models are compared over, a name of `distill.supports`. "auto" is "dense" for a running
            teacher; for a signal what it holds: "top_k_with_tail", "sampled_target_corrected", or "sampled" where the
            draws' probabilities were not stored.
        top_k: outcomes that "top_k_with_tail" keeps of a running teacher.
        taid_start: compare with TAID's moving target (`distill.taid`), whose share of the teacher goes from this, at
            the first step, to `taid_end` in a straight line; None compares with the teacher.
        taid_end: see `taid_start`.
        chunk_tokens: positions projected to the vocabulary at once; None chooses by bytes.

    Raises:
        UserError: a temperature that is not positive; otherwise see `distill.fused.fused_loss`.
    """
    temperatures = temperature, temperature if teacher_temperature is None else teacher_temperature
    if min(temperatures) <= 0:
        raise UserError(f"temperatures must be positive, not {temperatures[0]} and {temperatures[1]}")
    share = None if taid_start is None else TaidSchedule(start=taid_start, end=taid_end, step=0.0).share(progress)
    trained = batch.trained()
    target = batch.signal if teacher is None else TeacherHidden(teacher.hidden[:, :-1][trained.rows], teacher.head)
    assert target is not None, "soft_logits declares that it needs a teacher or its signal"
    total, metrics = fused_loss(
        student.hidden[:, :-1][trained.rows],
        student.head,
        trained.labels,
        trained.weights,
        target,
        num_outcomes=num_outcomes,
        soft_weight=temperature**2 if scale_by_temperature_squared else 1.0,
        hard_weight=hard_label_weight,
        divergence=divergence,
        divergence_options=divergence_options,
        support=support,
        top_k=top_k,
        student_temperature=temperatures[0],
        teacher_temperature=temperatures[1],
        share=share,
        chunk_tokens=chunk_tokens,
    )
    return LossOutput(total, trained.weights.sum(), metrics)
