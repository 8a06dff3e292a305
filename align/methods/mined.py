"""MinED: the teacher's probabilities moved to the student's nearest spelling (FuseLLM, arXiv 2401.10491, section 3.2).

Every teacher token counts for the student token with the same bytes, or else for the one with the fewest edits. Where
both sides have one token for the same text, and the teacher's counts for the student's, the student is compared with
the mapped distribution; everywhere else with the realised token alone. The published sequence map is dynamic time
warping over edit distances, which approximates what spans of bytes are exactly, so those are used.

What it cannot do: the nearest spelling is not the meaning ("cat" is one edit from "car" and three from " kitten"), and
a student's mistakes in spans of several tokens are taught by hard labels. A teacher of which only the top-k is known is
what it was made for (10 of them): what is listed is renormalised, as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from align.byte_view import ByteView
from align.kernels.chain import student_rows
from align.kernels.string_maps import exact_matching, nearest_by_edits
from align.kernels.teacher_rows import Teacher
from distill.divergences import NEVER, forward_kl


def spelling_map(student: ByteView, teacher: ByteView, *, specials: Mapping[int, int] | None = None) -> Tensor:
    """Return ``(V_T,)`` int64 the student token that each teacher token counts for, -1 for special tokens without one.

    Seconds to a minute for two vocabularies of today's sizes; the last few pairs are remembered.

    Args:
        specials: student id -> teacher id of special tokens that mean the same.
    """
    exact = exact_matching(student, teacher, specials=specials)
    pieces = tuple(teacher.tokens[token] for token in exact.teacher_alone.tolist() if teacher.tokens[token])
    index = torch.full((len(teacher),), -1)
    index[exact.teacher] = exact.student
    spelled = torch.tensor([bool(token) for token in teacher.tokens])
    index[spelled & (index < 0)] = _nearest(pieces, student.tokens)
    return index


def mined(
    student_logits: Tensor,
    teacher: Teacher,
    tables: Tensor,
    *,
    width: int,
    labels: Tensor,
    teacher_labels: Tensor,
    one_to_one: Tensor,
) -> Tensor:
    """Return ``(n,)`` KL(target || student) in nats; with a realised token as the target, its cross-entropy.

    Args:
        student_logits: (n, V_S or more), already divided by a temperature.
        teacher: n rows, at its own temperature; where `one_to_one` is False anything.
        tables: (V_T,) `spelling_map`.
        width: V_S, the student's tokens; logits behind are padding.
        labels, teacher_labels: (n,) int64 the tokens that each row predicted, on either side.
        one_to_one: (n,) bool, whether both sides have one token for the same text there.

    Raises:
        UserError: fewer logits than tokens.
    """
    student = student_rows(student_logits, width)
    mapped = teacher.log_masses(tables, width).detach().to(student.dtype)
    taught = one_to_one & (tables[teacher_labels] == labels) & (mapped > NEVER).any(-1)
    realised = torch.full_like(student, NEVER).scatter_(-1, labels[:, None], 0.0)
    target = torch.where(taught[:, None], mapped, realised).log_softmax(-1)
    return forward_kl(student, target)


@lru_cache(maxsize=4)
def _nearest(pieces: tuple[bytes, ...], tokens: tuple[bytes | None, ...]) -> Tensor:
    return torch.from_numpy(nearest_by_edits(pieces, ByteView(tokens, {}, "byte-level", False)))
