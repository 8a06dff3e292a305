"""GOLD: tokens that both vocabularies have compared as they are, all others as sorted lists (TRL, October 2025).

Over the tokens with equal bytes a generalised Jensen-Shannon divergence of both sides' probabilities, not renormalised;
over the rest ULD's sorted L1; both weighted, by default with the share of the teacher's vocabulary that is matched. A
span of several tokens is its last row times the realised probabilities before it, which TRL calls the *bayesian* merge
(pull request 5905). TRL's default merge, *observed*, is off by one: it takes row k for what predicts token k, while row
k predicts token k + 1. A student that predicts every token surely does not score 0 with it, and it is not offered here.

What is otherwise not TRL's: tokens match by their bytes, where it compares the vocabularies' spellings (`Ġ` is then
never `▁`); JSD of probabilities below 1e-8, which it lifts to that.

What it cannot do: tokens of the student's without a match are pulled only towards a list of sorted probabilities. Where
the teacher writes "2", "0", "1" and the student "201", the student's rows of such numbers have nothing to learn from,
and a perfect student has a loss and a gradient there (X-Token, arXiv 2605.21699, calls it suppression). A teacher of
which only the top-k is known is refused: whether a token has no probability or an unknown one decides its loss.
"""

from __future__ import annotations

from torch import Tensor

from align.kernels.chain import student_rows, teacher_rows
from align.kernels.string_maps import Matching
from align.kernels.teacher_rows import Teacher
from align.methods.uld import sorted_l1
from distill.divergences import jsd
from distill.errors import UserError


def gold(
    student_logits: Tensor,
    teacher: Teacher,
    tables: Matching,
    *,
    student_prior: Tensor | None = None,
    teacher_prior: Tensor | None = None,
    beta: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
) -> Tensor:
    """Return ``(n,)`` losses in nats (matched) and L1 (the rest): GOLD's hybrid, bayesian.

    Args:
        student_logits: (n, V_S or more), already divided by a temperature.
        teacher: n dense rows, at its own temperature.
        tables: `align.kernels.string_maps.exact_matching` of the two vocabularies.
        student_prior, teacher_prior: (n,) see `align.kernels.chain.priors`; None for rows of one token.
        beta: the teacher's share in the mixture.
        matched_weight, unmatched_weight: of the two parts; None for both is M / V_T and the rest of 1.

    Raises:
        UserError: one weight without the other; `beta` not strictly between 0 and 1; the teacher's whole distribution
            is not known; fewer logits than tokens.
    """
    if (matched_weight is None) != (unmatched_weight is None):
        raise UserError("gold: give both matched_weight and unmatched_weight, or neither")
    student = student_rows(student_logits, tables.student_size, student_prior)
    target = teacher_rows(teacher, "gold", teacher_prior)
    matched = jsd(student[:, tables.student], target[:, tables.teacher], weight=beta)
    unmatched = sorted_l1(student[:, tables.student_alone].exp(), target[:, tables.teacher_alone].exp())
    if matched_weight is None or unmatched_weight is None:
        matched_weight = len(tables.teacher) / tables.teacher_size
        unmatched_weight = 1 - matched_weight
    return matched_weight * matched + unmatched_weight * unmatched
