"""DSKD, dual-space distillation (arXiv 2406.17328): each model's hidden states through the other's head.

A head reads any state of its own width. So a learned map takes the teacher's state into the student's space, where
the student's head makes of it a distribution over the student's tokens; and another takes the student's state into the
teacher's space. Each pair is then compared in one vocabulary, and no token is ever mapped. Three terms, all over rows
at which both models have read the same bytes:

    CE(W_S P(h_T), y)                 teaches the map what the teacher's states say in the student's tokens,
    D(sg softmax(W_S P(h_T)), S)      teaches the student, where that projected teacher is right about y,
    KL(T || softmax(W_T P'(h_S)))     teaches the student, and the map back.

W_S is not trained by the first, nor W_T at all. The first edition finds which states meet by attention over both
sequences; the second (arXiv 2504.11426) by equal histories of equal tokens. Spans of bytes do that exactly, whatever
the tokens are called, so there is no attention here; and no target embeddings in the values, which only it needed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.fused import CHUNK, TeacherHidden, fused_loss
from distill.head import Head
from distill.projectors import linear


class Rows(NamedTuple):
    """What one model says at R rows: states (R, D), its head, the tokens that came (R,), and its vocabulary's size."""

    hidden: Tensor
    head: Head
    labels: Tensor
    outcomes: int


def dskd(
    student: Rows,
    teacher: Rows,
    weights: Tensor,
    maps: nn.ModuleDict,
    *,
    divergence: str = "forward_kl",
    divergence_options: Mapping[str, Any] | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of the three terms with its graph, and metrics.

    Metrics (sums): `projected_cross_entropy`, the first term; `to_student`, `to_teacher`, the others; `agreement`, the
    share of rows where the projected teacher is right.

    Args:
        student, teacher: the same R rows of both; the teacher's states have no graph.
        weights: (R,) of each row.
        maps: `maps_for`.
        divergence, divergence_options: compares the projected teacher with the student.

    Raises:
        UserError: a student's head that is no plain matrix.
    """
    head, theirs = frozen(student.head, student.outcomes), teacher.head
    projected = maps["to_student"](teacher.hidden)
    known, numbers = fused_loss(projected, head, student.labels, weights, None, hard_weight=1.0)
    right = _right(projected.detach(), head, student.labels, chunk_tokens or max(1, CHUNK // (4 * student.outcomes)))
    options: dict[str, Any] = {"chunk_tokens": chunk_tokens}
    to_student, _ = fused_loss(
        student.hidden,
        student.head,
        student.labels,
        weights * right,
        TeacherHidden(projected.detach(), head),
        num_outcomes=student.outcomes,
        divergence=divergence,
        divergence_options=divergence_options,
        **options,
    )
    to_teacher, _ = fused_loss(
        maps["to_teacher"](student.hidden),
        theirs,
        teacher.labels,
        weights,
        TeacherHidden(teacher.hidden, theirs),
        num_outcomes=teacher.outcomes,
        **options,
    )
    metrics = {
        "projected_cross_entropy": numbers["cross_entropy"],
        "to_student": to_student.detach(),
        "to_teacher": to_teacher.detach(),
        "agreement": torch.stack([(weights * right).sum(), weights.sum()]),
    }
    return known + to_student + to_teacher, metrics


def maps_for(student_model: Any, teacher_model: Any, *, map_seed: int = 0) -> nn.ModuleDict:
    """Return the two linear maps between the models' spaces.

    Args:
        map_seed: of their initial weights.
    """
    widths = [model.config.get_text_config().hidden_size for model in (student_model, teacher_model)]
    draw: dict[str, Any] = {"inner_width": None, "bias": False, "generator": torch.Generator().manual_seed(map_seed)}
    return nn.ModuleDict({"to_student": linear(*widths[::-1], **draw), "to_teacher": linear(*widths, **draw)})


def frozen(head: Head, outcomes: int) -> Head:
    """Return a head that gives the first `outcomes` logits, and gets no gradient.

    Raises:
        UserError: it is something else than a plain matrix (quantised, or with an adapter).
    """
    if type(head.linear) is not nn.Linear:
        raise UserError(
            f"dskd reads the student's head as a plain matrix, and it is a {type(head.linear).__name__}: train the "
            "student whole, or take --align cspc"
        )
    still = copy.copy(head.linear)
    still._parameters = {
        name: None if weight is None else nn.Parameter(weight.detach()[:outcomes], requires_grad=False)
        for name, weight in head.linear._parameters.items()
    }
    still.out_features = outcomes
    return Head(still, head.scale, head.softcap)


@torch.no_grad()
def _right(projected: Tensor, head: Head, labels: Tensor, chunk_tokens: int) -> Tensor:
    """Return (R,) 1 where the likeliest token is the one that came, else 0."""
    best = [head(rows).argmax(-1) for rows in projected.split(chunk_tokens)]
    return (torch.cat([*best, labels[:0]]) == labels).to(projected.dtype)
