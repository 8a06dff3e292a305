"""Log-probabilities summed up by cell, and two models' cells compared: what every method of cells does.

A cell's mass is a logsumexp of its ids' logits, so a cell that both models find all but impossible is compared as
exactly as any other. Each row costs one pass over the vocabulary; a matrix (V_S, V_T) never exists.

On CUDA the sums of ids that share a cell are added in any order, as every scatter is there; cells of one id are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distill.divergences import DIVERGENCES, NEVER
from distill.tables import bind, lookup

Compare = Callable[[Tensor, Tensor], Tensor]


def pool(logits: Tensor, index: Tensor, cells: int) -> Tensor:
    """Return ``(n, cells)`` logsumexps of logits by cell, -inf in cells that nothing falls into.

    Args:
        logits: (n, V), float32 or wider; may be wider than `index`, what is behind is left out.
        index: (V,) or (n, V) int64, the cell of each logit; one with -1 is left out.
    """
    logits = logits[:, : index.shape[-1]]
    index = index.masked_fill(index < 0, cells).expand(len(logits), -1)
    size = (len(logits), cells + 1)
    top = _finite(logits.detach().amax(-1, keepdim=True))
    mass = logits.new_zeros(size).scatter_add(1, index, (logits - top).exp())[:, :cells]
    if not bool((mass < torch.finfo(mass.dtype).tiny).any()):
        return top + mass.log()
    # Below the smallest normal number a sum has lost digits: then each cell is measured from its own largest.
    tops = _finite(logits.new_full(size, NEVER).scatter_reduce(1, index, logits.detach(), "amax"))
    mass = logits.new_zeros(size).scatter_add(1, index, (logits - tops.gather(1, index)).exp())[:, :cells]
    top = tops[:, :cells]
    nothing = mass == 0
    return (top + mass.masked_fill(nothing, 1.0).log()).masked_fill(nothing, NEVER)


def pool_flat(logits: Tensor, row: Tensor, index: Tensor, rows: int, cells: int) -> Tensor:
    """Return ``(rows, cells)`` logsumexps of F logits, each with its row and its cell, (F,) int64."""
    place = row * cells + index
    tops = _finite(logits.new_full((rows * cells,), NEVER).scatter_reduce(0, place, logits.detach(), "amax"))
    mass = logits.new_zeros(rows * cells).scatter_add(0, place, (logits - tops[place]).exp())
    nothing = mass == 0
    pooled = (tops + mass.masked_fill(nothing, 1.0).log()).masked_fill(nothing, NEVER)
    return pooled.view(rows, cells)


def compare_rows(
    student: Tensor,
    teacher: Tensor,
    compare: Compare,
    *,
    student_rest: Tensor | None = None,
    teacher_rest: Tensor | None = None,
    conditional: bool = False,
    came: Tensor | None = None,
) -> Tensor:
    """Return ``(n,)`` divergences of two models' cells.

    With a rest, a side is known in part: cells where either side has nothing are pooled with both rests as one more
    outcome.

    Args:
        came: (n,) int64, the cell that the text took: its log-probability by the student is added (see
            `align.methods.cspc`). C is the rest; a row of -1, or one that knows nothing of where its text went, is 0.
        conditional: where only one side has mass there, leave it out and compare what both share, which is 0 if they
            share nothing. Otherwise such a mass is compared with none.
        student, teacher: (n, C) log-masses, normalised or not, which does not matter.
        student_rest, teacher_rest: (n,) log-masses, on the same scale, of what lies in no cell or in an unknown one.
    """
    if student_rest is None and teacher_rest is None:
        own, others = student.log_softmax(-1), teacher.log_softmax(-1)
        return beside(compare(own, others), own, came)
    known = (student > NEVER) & (teacher > NEVER)
    rests = [_rest(side, known, rest) for side, rest in ((student, student_rest), (teacher, teacher_rest))]
    one_sided = conditional & ((rests[0] == NEVER) | (rests[1] == NEVER))
    nothing = one_sided & ~known.any(-1)
    sides = [
        torch.cat([side.masked_fill(~known, NEVER), rest.masked_fill(one_sided, NEVER)[:, None]], -1)
        .masked_fill(nothing[:, None], 0.0)
        .log_softmax(-1)
        for side, rest in ((student, rests[0]), (teacher, rests[1]))
    ]
    if came is None:
        return compare(*sides)
    last = student.shape[-1]
    padded = torch.cat([known, torch.zeros_like(nothing)[:, None]], -1)
    outcome = came.where(padded.gather(-1, came.clamp(min=0)[:, None])[:, 0], last)
    counts = (came >= 0) & ~(one_sided & (outcome == last))
    return beside(compare(*sides), sides[0], outcome.masked_fill(~counts, -1))


def beside(values: Tensor, student: Tensor, came: Tensor | None) -> Tensor:
    """Add the student's (n, C) log-probability of the cell that came to values (n,); a row of -1 is 0."""
    if came is None:
        return values
    own = student.gather(-1, came.clamp(min=0)[:, None])[:, 0]
    return torch.where(came >= 0, values + own, torch.zeros_like(values))


def log_sum(masses: Tensor) -> Tensor:
    """Return the logsumexp over the last axis; -inf, and no slope, where all are -inf."""
    nothing = (masses == NEVER).all(-1)
    return masses.masked_fill(nothing[..., None], 0.0).logsumexp(-1).masked_fill(nothing, NEVER)


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - e^x) of x <= 0, exact at both ends; -inf with slope 0 at 0."""
    certain = x >= 0
    near = (x > -math.log(2)) & ~certain
    # Each branch sees only what it is exact for: the other's infinite slope, times 0, would be nan.
    small = (-torch.expm1(x.masked_fill(~near, -1.0))).log()
    large = torch.log1p(-x.masked_fill(near | certain, -1.0).exp())
    return torch.where(near, small, large).masked_fill(certain, NEVER)


def divergence_of(name: str, options: Mapping[str, Any] | None) -> Compare:
    """Return a divergence of `DIVERGENCES`, or ``pkg.mod:function``, with its options.

    Raises:
        UserError: an unknown name or option.
    """
    return bind(lookup(DIVERGENCES, name, "divergence"), options or {}, f"divergence {name!r}")


def _rest(masses: Tensor, known: Tensor, rest: Tensor | None) -> Tensor:
    """Return (n,) log-masses outside the known cells, -inf where there are none."""
    own = masses.new_full((len(masses),), NEVER) if rest is None else rest
    outside = torch.cat([masses.masked_fill(known, NEVER), own[:, None]], -1)
    return log_sum(outside)


def _finite(top: Tensor) -> Tensor:
    """Return the largest logits, 0 where all are -inf."""
    return top.masked_fill(top == NEVER, 0.0)
