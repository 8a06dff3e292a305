"""X-Token: the student's distribution moved onto the teacher's vocabulary by a sparse matrix W (arXiv 2605.21699).

W (V_S, V_T) is built from the vocabularies alone. A student token that the teacher has byte for byte is moved there,
wholly; any other is tokenised again by the teacher's tokenizer and its mass shared out as .9 x .1^i over those tokens,
and a teacher token tokenised again by the student's gives the same shares the other way; the four largest entries of a
row are kept and add up to 1. Two losses use it:

`p_kl`
    KL(p_T || p_S W), over the teacher's tokens that W reaches, renormalised. Nothing is partitioned, so a student's
    "201" learns from a teacher's "2". The published code keeps the 8192 columns likeliest over a microbatch; here all
    are kept, so that a row's loss does not depend on which rows share its batch.
`h_kl`
    The common tokens, those W moves to one place with weight .6 or more, are compared by a KL, the others as sorted
    lists (`align.methods.uld`). All that is not common is one more outcome of the KL: the partial sum alone is not 0 in
    its gradient for a student that equals its teacher, it drains the tokens that are not common.

`choose` takes one of the two by the paper's rule: P-KL where numerals are not common, else H-KL.

What P-KL cannot do: W is not injective, and its shares are no model's. A perfect student that says "201" with
certainty, whose teacher says "2" with certainty, has p_S W = (.9009, .0901, .0090) on "2", "0", "1": a loss of .104,
and a gradient towards the student's "2". Not here: learning W, averaging a span's rows (the published code's merge;
the paper's is the chain rule, as here), and the balance sg(CE / KD) with the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.byte_view import ByteView
from align.kernels.chain import student_rows, teacher_rows
from align.kernels.pooling import compare_rows, log1mexp
from align.kernels.string_maps import Matching, TokenMap, exact_matching, matching, tokenised_again
from align.kernels.teacher_rows import Teacher
from align.methods.uld import sorted_l1
from distill.divergences import NEVER, forward_kl

FIRST, NEXT = 0.9, 0.1  # the share of a piece's first token, and of each further one in the one before


@dataclass(frozen=True, slots=True)
class Projection:
    """What X-Token needs of two vocabularies.

    Attributes:
        map: W, from the student's tokens to the teacher's.
        column: (V_T,) int64, a token's place in `map.reached`, -1 for one that W does not reach.
        common: the pairs of `h_kl`.
    """

    map: TokenMap
    column: Tensor
    common: Matching

    def to(self, device: torch.device | str) -> Projection:
        """Return the tables on another device."""
        return Projection(self.map.to(device), self.column.to(device), self.common.to(device))


def projection(
    student: ByteView,
    teacher: ByteView,
    *,
    student_tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    specials: Mapping[int, int] | None = None,
    kept: int = 4,
    common_from: float = 0.6,
) -> Projection:
    """Return W of two vocabularies.

    Args:
        student_tokenizer, teacher_tokenizer: tokenise tokens again; without them the longest token comes first.
        specials: student id -> teacher id of special tokens that mean the same.
        kept: entries of a row, and tokens that a piece is tokenised into.
        common_from: the weight from which a student token's likeliest target is a pair of `h_kl`; of several student
            tokens with one target the heaviest, of these the lowest id.
    """
    exact = exact_matching(student, teacher, specials=specials)
    forth = _shares(exact.student_alone, student, teacher, teacher_tokenizer, kept)
    columns_back, rows_back, weights_back = _shares(exact.teacher_alone, teacher, student, student_tokenizer, kept)
    back = (rows_back, columns_back, weights_back)
    rows, columns, weights = (np.concatenate(parts) for parts in zip(forth, back, strict=True))
    inexact = np.isin(rows, exact.student_alone.numpy())  # an exact match takes a row for itself
    rows, columns, weights = _largest(rows[inexact], columns[inexact], weights[inexact], len(teacher), kept)
    rows = np.concatenate([exact.student.numpy(), rows])
    columns = np.concatenate([exact.teacher.numpy(), columns])
    weights = np.concatenate([np.ones(len(exact.student)), weights])
    reached, targets = np.unique(columns, return_inverse=True)
    column = np.full(len(teacher), -1)
    column[reached] = np.arange(len(reached))
    common = _common(rows, columns, weights, common_from)
    moved = TokenMap(
        torch.from_numpy(rows),
        torch.from_numpy(targets.reshape(-1)),
        torch.from_numpy(np.log(weights)).float(),
        torch.from_numpy(reached),
    )
    return Projection(moved, torch.from_numpy(column), matching(common, len(student), len(teacher)))


def p_kl(student_logits: Tensor, teacher: Teacher, tables: Projection) -> Tensor:
    """Return ``(n,)`` KL(teacher || student W) in nats, both renormalised over the teacher's tokens that are compared.

    A span of several tokens is its last row: renormalising takes a prior out again. Of a teacher of which only the
    top-k is known the listed tokens are compared. 0 where the teacher has nothing that is reached.

    Args:
        student_logits: (n, V_S or more), already divided by a temperature.
        teacher: n rows, at its own temperature.
        tables: `projection` of the two vocabularies.

    Raises:
        UserError: fewer logits than tokens.
    """
    student = tables.map.push(student_rows(student_logits, tables.common.student_size))
    if teacher.logp is not None:
        target = teacher.logp.detach().index_select(-1, tables.map.reached)
    else:
        ids, listed = teacher.listed
        place = tables.column[ids]
        student = student.gather(-1, place.clamp(min=0))
        target = listed.detach().to(student.dtype).masked_fill(place < 0, NEVER)
        student = student.masked_fill(target == NEVER, NEVER)
    nothing = (target == NEVER).all(-1)
    sides = [side.masked_fill(nothing[:, None], 0.0).log_softmax(-1) for side in (student, target)]
    return forward_kl(sides[0], sides[1])


def h_kl(
    student_logits: Tensor,
    teacher: Teacher,
    tables: Projection,
    *,
    student_prior: Tensor | None = None,
    teacher_prior: Tensor | None = None,
    uncommon_weight: float = 1.0,
) -> Tensor:
    """Return ``(n,)`` KL(teacher || student) over the common tokens and all else, in nats, plus the others' sorted L1.

    Args:
        student_logits, teacher, tables: as in `p_kl`, the teacher dense.
        student_prior, teacher_prior: (n,) see `align.kernels.chain.priors`; None for rows of one token.
        uncommon_weight: of the sorted L1.

    Raises:
        UserError: the teacher's whole distribution is not known; fewer logits than tokens.
    """
    common = tables.common
    student = student_rows(student_logits, common.student_size, student_prior)
    target = teacher_rows(teacher, "xtoken's h_kl", teacher_prior)
    own, theirs = student[:, common.student_alone], target[:, common.teacher_alone]
    value = compare_rows(
        student[:, common.student],
        target[:, common.teacher],
        forward_kl,
        student_rest=_elsewhere(own, student_prior),
        teacher_rest=_elsewhere(theirs, teacher_prior),
        conditional=True,
    )
    return value + uncommon_weight * sorted_l1(own.exp(), theirs.exp())


def choose(tables: Projection, student: ByteView, *, coverage: float = 0.5) -> tuple[str, float]:
    """Return the loss to take, "p_kl" or "h_kl", and the share of critical tokens that are common.

    Critical are the student's numerals of more than one digit; one without any has nothing to lose (share 1). The
    paper has 0 of 1100 (Qwen3 to Llama-3, P-KL) and all (Phi-4-mini, H-KL); what is between is divided at `coverage`.
    """
    digits = torch.tensor([len(token or b"") > 1 and (token or b"").isdigit() for token in student.tokens])
    numerals = int(digits.sum())
    share = float(digits[tables.common.student].sum()) / numerals if numerals else 1.0
    return ("h_kl" if share >= coverage else "p_kl"), share


def _shares(
    alone: Tensor, view: ByteView, other: ByteView, tokenizer: Any, kept: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first `kept` tokens that the other side makes of each id's text, with shares: ids, tokens, weights."""
    pieces = {token: text for token in alone.tolist() if (text := view.tokens[token])}
    cut = [tokens[:kept] for tokens in tokenised_again(list(pieces.values()), other, tokenizer=tokenizer)]
    sizes = np.array([len(tokens) for tokens in cut], np.int64)
    place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    totals = FIRST * (1 - NEXT**sizes) / (1 - NEXT)
    found = np.fromiter((token for tokens in cut for token in tokens), np.int64, int(sizes.sum()))
    ids = np.fromiter(pieces, np.int64, len(pieces))
    return np.repeat(ids, sizes), found, FIRST * NEXT**place / np.repeat(totals, sizes)


def _largest(
    rows: np.ndarray, columns: np.ndarray, weights: np.ndarray, width: int, kept: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the entries, those of one place added up, that are among the largest of their row; rows add up to 1."""
    places, inverse = np.unique(rows * width + columns, return_inverse=True)
    total = np.bincount(inverse.reshape(-1), weights, len(places))
    order = np.lexsort((places, -total, places // width))
    places, total = places[order], total[order]
    row = places // width
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    places, total, row = places[rank < kept], total[rank < kept], row[rank < kept]
    return row, places % width, total / np.bincount(row, total, int(row.max(initial=0)) + 1)[row]


def _common(rows: np.ndarray, columns: np.ndarray, weights: np.ndarray, least: float) -> list[tuple[int, int]]:
    """Return one student token for each teacher token that is some row's largest entry, of `least` or more."""
    order = np.lexsort((columns, -weights, rows))
    top = order[np.unique(rows[order], return_index=True)[1]]
    top = top[weights[top] >= least]
    best = top[np.lexsort((rows[top], -weights[top], columns[top]))]
    best = best[np.unique(columns[best], return_index=True)[1]]
    return list(zip(rows[best].tolist(), columns[best].tolist(), strict=True))


def _elsewhere(alone: Tensor, prior: Tensor | None) -> Tensor:
    """Return (n,) log-masses of all that is not common: other tokens, and other beginnings of the span."""
    nothing = alone.new_full((len(alone), 1), NEVER)
    other = nothing if prior is None else log1mexp(prior.to(alone.dtype))[:, None]
    parts = torch.cat([alone, other], -1)
    empty = (parts == NEVER).all(-1)
    return parts.masked_fill(empty[:, None], 0.0).logsumexp(-1).masked_fill(empty, NEVER)
