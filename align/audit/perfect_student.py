"""What a way of comparing two vocabularies would do to a perfect student; no model is needed to find out.

A perfect student's text has the teacher's distribution, so the same text tokenised by both sides is a draw of both. At
every sync boundary of that text each side has a next token, and a method puts it into one of its cells
(`align.kernels.cells`). Where the two cells differ, the teacher's probability and the student's land in different
outcomes, and the method tells a student that is right to change. The share of such boundaries bounds the total
variation between the two sides' cells (coupling inequality): the method's delta.

Coarse cells agree easily: one cell for everything always does. So what the cells still tell apart is counted as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from align.methods import bpm, cspc, shared_kl
from align.specials import special_pairs, stop_ids

COMPARED: dict[str, Any] = {"shared_kl": shared_kl, "bpm": bpm, "cspc": cspc}  # the methods that compare cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """What a method would do to a perfect student on a text.

    Attributes:
        agreement: share of boundaries where the next token of both sides falls into the same cell, 1 - delta.
        moved: share of probability that lies in different cells on the two sides by the text's own counts (total
            variation), whatever the context: at most delta.
        bits: entropy of the student's cells; what it lacks of the tokens' entropy is not taught there.
    """

    agreement: float
    moved: float
    bits: float


def judge(student_cells: np.ndarray, teacher_cells: np.ndarray) -> Outcomes:
    """Return what a method would do.

    Args:
        student_cells, teacher_cells: (S,) the cell of the token that begins each span, S > 0; -1, no cell, agrees with
            nothing.
    """
    names, places = np.unique(np.concatenate([student_cells, teacher_cells]), return_inverse=True)
    own, other = (np.bincount(part, minlength=len(names)) for part in np.split(places, 2))
    return Outcomes(
        agreement=float(((student_cells == teacher_cells) & (student_cells >= 0)).mean()),
        moved=float(np.abs(own - other).sum() / 2 / len(student_cells)),
        bits=entropy(student_cells),
    )


def entropy(values: np.ndarray) -> float:
    """Return the entropy in bits of integers by their own frequencies; 0 of none."""
    shares = np.unique(values, return_counts=True)[1] / max(1, len(values))
    return abs(float((shares * np.log2(shares)).sum()))


def judged(
    student: Any, teacher: Any, roots: np.ndarray, *, configs: tuple[Any, Any] = (None, None)
) -> dict[str, Outcomes]:
    """Return method -> what it would do, for the methods that compare distributions over cells.

    Args:
        student, teacher: transformers tokenizers.
        roots: (S, 2) ids of the first token of every span, the student's and the teacher's.
        configs: what may name further end tokens of each side (`align.specials.stop_ids`).

    Raises:
        UserError: tokenizers that no cells can be made for.
    """
    if not len(roots):
        return {}
    named: dict[str, Any] = {
        "stops": (stop_ids(student, configs[0]), stop_ids(teacher, configs[1])),
        "specials": special_pairs(student, teacher, student_config=configs[0], teacher_config=configs[1]),
    }
    cells = {name: module.tables(student, teacher, **named).cells for name, module in COMPARED.items()}
    return {
        name: judge(each.student.numpy()[roots[:, 0]], each.teacher.numpy()[roots[:, 1]])
        for name, each in cells.items()
    }
