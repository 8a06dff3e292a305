"""The methods that see a span as one row or one number: their kernels with the engine's arguments and named options.

What they compute, and what they cannot do, is said in the modules named after them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.kernels.string_maps import Matching, exact_matching
from align.kernels.teacher_rows import Teacher
from align.methods import alm, gold, opd_scalar, uld, xtoken
from align.methods.entry import Pair
from distill.errors import UserError


@dataclass(frozen=True, slots=True)
class Width:
    """V_S, the student's tokens."""

    student: int

    def to(self, device: torch.device | str) -> Width:
        """Return itself."""
        return self


def uld_spans(
    student_logits: Tensor,
    teacher: Teacher,
    tables: Width,
    *,
    student_prior: Tensor,
    teacher_prior: Tensor,
) -> Tensor:
    """Return (S,) sorted L1 distances of the spans' last rows."""
    priors = {"student_prior": student_prior, "teacher_prior": teacher_prior}
    return uld.uld(student_logits, teacher, tables.student, **priors)


def uld_width(pair: Pair) -> Width:
    """Return the width of the student's vocabulary."""
    return Width(len(pair.student.view))


def gold_spans(
    student_logits: Tensor,
    teacher: Teacher,
    tables: Matching,
    *,
    student_prior: Tensor,
    teacher_prior: Tensor,
    beta: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
) -> Tensor:
    """Return (S,) losses of GOLD's hybrid, bayesian; options: `align.methods.gold.gold`."""
    return gold.gold(
        student_logits,
        teacher,
        tables,
        student_prior=student_prior,
        teacher_prior=teacher_prior,
        beta=beta,
        matched_weight=matched_weight,
        unmatched_weight=unmatched_weight,
    )


def gold_matching(pair: Pair) -> Matching:
    """Return the tokens with equal bytes."""
    return exact_matching(pair.student.view, pair.teacher.view, specials=pair.specials)


@dataclass(frozen=True, slots=True)
class XTokenTables:
    """X-Token's matrix, and the loss that its rule takes."""

    projection: xtoken.Projection
    chosen: str

    def to(self, device: torch.device | str) -> XTokenTables:
        """Return the tables on another device."""
        return XTokenTables(self.projection.to(device), self.chosen)


def xtoken_spans(
    student_logits: Tensor,
    teacher: Teacher,
    tables: XTokenTables,
    *,
    student_prior: Tensor,
    teacher_prior: Tensor,
    loss: str = "auto",
    uncommon_weight: float = 1.0,
) -> Tensor:
    """Return (S,) losses of X-Token.

    Args:
        loss: p_kl, h_kl, or auto by whether numerals are common (`align.methods.xtoken.choose`); of a stored teacher
            auto is p_kl.
        uncommon_weight: of the sorted L1 in h_kl.

    Raises:
        UserError: an unknown loss.
    """
    by_rule = tables.chosen if teacher.logp is not None else "p_kl"
    chosen = by_rule if loss == "auto" else loss
    if chosen == "p_kl":
        return xtoken.p_kl(student_logits, teacher, tables.projection)
    if chosen != "h_kl":
        raise UserError(f"xtoken: unknown loss {loss!r}: known are auto, p_kl, h_kl")
    return xtoken.h_kl(
        student_logits,
        teacher,
        tables.projection,
        student_prior=student_prior,
        teacher_prior=teacher_prior,
        uncommon_weight=uncommon_weight,
    )


def xtoken_tables(pair: Pair) -> XTokenTables:
    """Return X-Token's tables."""
    student, teacher = pair.tokenizers
    made = xtoken.projection(
        pair.student.view,
        pair.teacher.view,
        student_tokenizer=student,
        teacher_tokenizer=teacher,
        specials=pair.specials,
    )
    return XTokenTables(made, xtoken.choose(made, pair.student.view)[0])


def alm_spans(
    student_logp: Tensor, teacher_logp: Tensor, *, loss: str = "binary_ce", tau: float = 100.0, margin: float = 1e-6
) -> Tensor:
    """Return (S,) losses of ALM; `loss` is a name of `align.methods.alm.DIVERGENCES`."""
    return alm.alm(student_logp, teacher_logp, divergence=loss, tau=tau, margin=margin)


def opd_tokens(
    student_logp: Tensor,
    teacher_logp: Tensor,
    token_logp: Tensor,
    span: Tensor,
    *,
    weak_logp: Tensor | None = None,
    initial_logp: Tensor | None = None,
    alpha: float | None = None,
    spread: str = "share",
    limit: float | None = 10.0,
    longest: int | None = 6,
) -> opd_scalar.Advantages:
    """Return the advantages of the student's n tokens: DPCA's, and with a weak reference CompassOPD's.

    Args:
        weak_logp, initial_logp: (S,) what the weak reference and the student at first say of the spans.
        alpha: how much the student is held where it began, 0.5 by default; with a weak reference only.
        spread, limit, longest: see `align.methods.opd_scalar.to_tokens`.

    Raises:
        UserError: `alpha` without a weak reference, or what `align.methods.opd_scalar` refuses.
    """
    if alpha is not None and weak_logp is None:
        raise UserError(f"opd_scalar: alpha={alpha} weighs what weak_reference=MODEL is compared with: name one")
    further: dict[str, Any] = {"weak_reference": weak_logp, "initial_logp": initial_logp} | (
        {} if alpha is None else {"alpha": alpha}
    )
    advantages = opd_scalar.opd_scalar(student_logp, teacher_logp, **further)
    return opd_scalar.to_tokens(advantages, token_logp, span, spread=spread, limit=limit, longest=longest)
