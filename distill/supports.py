"""What makes two models' outputs comparable: a pair of log-probability rows over the same outcomes.

A support takes the student's logits first and what is known of the teacher second, and returns
``(student_logp, teacher_logp)``, both ``(..., outcomes)``, float32 or wider, each summing to one, so that any function
of `distill.divergences` applies. `dense` compares whole vocabularies.

Upcasting happens here, once. Nothing here weights or averages positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.errors import UserError


def dense(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    num_outcomes: int,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return both models' log-probabilities over the first `num_outcomes` entries of a shared vocabulary.

    Models of one family pad the same vocabulary to different widths (Qwen2.5: 151936 and 152064 logits for 151665
    tokens). Entries from `num_outcomes` on are padding: they are dropped *before* the softmax, so no probability is
    spent on them and the widths may differ.

    Args:
        student_logits: ``(..., V_student)``.
        teacher_logits: ``(..., V_teacher)``, the same leading shape.
        num_outcomes: entries that mean a token, normally ``len(tokenizer)``.
        student_temperature: divides the student's logits; likewise `teacher_temperature`. No T² factor is applied.

    Raises:
        UserError: a model has fewer logits than `num_outcomes`.
    """
    widths = {"student": student_logits.shape[-1], "teacher": teacher_logits.shape[-1]}
    for who, width in widths.items():
        if width < num_outcomes:
            raise UserError(
                f"the {who} has {width} logits for a vocabulary of {num_outcomes} tokens: resize its embeddings"
            )
    return (
        _log_softmax(student_logits[..., :num_outcomes], student_temperature),
        _log_softmax(teacher_logits[..., :num_outcomes], teacher_temperature),
    )


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide if temperature == 1.0 else wide / temperature, dim=-1)
