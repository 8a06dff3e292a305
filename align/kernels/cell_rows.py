"""The rows of the methods that compare cells: root rows, where both sides have a token boundary, and interior rows.

A root row compares what both models say of the next token, cell by cell. An interior row compares the model that stands
at the boundary with the one whose token runs over it, on the condition that this token begins with the bytes up to
there: what remains of it says in which cell the other side goes on. A token that ends there says no more than that, so
its mass is the rest, and so is the mass of whatever the running side would not run over the boundary into.

Both take what came, the tokens that the two rows predict: then a row is its divergence plus the student's
log-probability of the cell that the text took, and 0 where the text itself shows that the two sides' cells differ. Why,
is in `align.methods.cspc`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.kernels.cells import Cells
from align.kernels.pooling import Compare, compare_rows, divergence_of, log_sum, pool, pool_flat
from align.kernels.prefixes import EXCLUDED, NO_CELL, Inside, Listed, Pairs
from align.kernels.teacher_rows import Teacher
from distill.divergences import NEVER


@dataclass(frozen=True, slots=True)
class Tables:
    """What a method of cells knows of two vocabularies, made once.

    Attributes:
        cells: the table of each side.
        finer: boundaries of the student inside the teacher's tokens; None where the method has no such rows.
        coarser: boundaries of the teacher inside the student's tokens, likewise.
    """

    cells: Cells
    finer: Inside | None = None
    coarser: Inside | None = None

    def to(self, device: torch.device | str) -> Tables:
        """Return the tables on another device."""
        return Tables(self.cells.to(device), self.finer, self.coarser)


class Came(NamedTuple):
    """The (n,) tokens that n rows predict, of the student's vocabulary and of the teacher's."""

    student: Tensor
    teacher: Tensor


def root_rows(
    student_logits: Tensor,
    teacher: Teacher,
    tables: Tables,
    *,
    divergence: str = "forward_kl",
    options: Mapping[str, Any] | None = None,
    came: Came | None = None,
) -> Tensor:
    """Return ``(n,)`` divergences in nats between two models' next tokens, by cell.

    Of a stored teacher the cells of the listed tokens are compared, and all others as one.

    Args:
        student_logits: (n, V), any width from the vocabulary's on; gets the only gradient.
        teacher: n rows.
        divergence, options: a name of `DIVERGENCES`, or ``pkg.mod:function``, and its arguments.
        came: what each row was followed by.
    """
    cells = tables.cells
    own = pool(_wide(student_logits), cells.student, cells.count)
    others = teacher.log_masses(cells.teacher, cells.count)
    compare = divergence_of(divergence, options)
    rest = None if teacher.outcomes is None else teacher.log_rest
    return compare_rows(own, others, compare, teacher_rest=rest, came=cell_that_came(cells, came))


def cell_that_came(cells: Cells, came: Came | None) -> Tensor | None:
    """Return (n,) int64, the cell of both sides' next tokens; -1 where they differ."""
    if came is None:
        return None
    own = cells.student[came.student]
    return own.where(own == cells.teacher[came.teacher], -1)


def interior_rows(
    student_logits: Tensor,
    teacher: Teacher,
    tables: Tables,
    pairs: Pairs,
    *,
    divergence: str = "forward_kl",
    options: Mapping[str, Any] | None = None,
    came: Came | None = None,
) -> Tensor:
    """Return ``(P,)`` divergences in nats at boundaries inside a token: see the module's docstring.

    Where no token ends at the boundary nothing is known of the other side's rest, and both are compared on the cells
    that the running side's tokens lead to; a boundary they lead to nowhere from is 0. Of a stored teacher's running
    tokens only the listed ones count.

    Args:
        student_logits: (n, V); `pairs.student` are rows of it, and may be repeated.
        teacher: m rows, those of `pairs.teacher`.
        tables: with `finer`, and with `coarser` if some pair is.
        came: what the two rows of each boundary were followed by: one is the running token.
    """
    compare = divergence_of(divergence, options)
    places, values = [], []
    for coarser, rows in ((False, _finer), (True, _coarser)):
        which = (pairs.coarser == coarser).nonzero().flatten()
        if len(which):
            some = Pairs(*(part[which] for part in pairs))
            next_ = None if came is None else Came(*(part[which] for part in came))
            places.append(which)
            values.append(rows(student_logits, teacher, tables, some, compare, next_))
    if not values:
        return _wide(student_logits.new_zeros(0))
    return torch.cat(values)[torch.cat(places).argsort()]


def _finer(
    student_logits: Tensor, teacher: Teacher, tables: Tables, pairs: Pairs, compare: Compare, came: Came | None
) -> Tensor:
    assert tables.finer is not None
    cells = tables.cells
    running, standing, count = _reached(tables.finer, pairs)
    own, own_rest = _standing(student_logits, pairs.student, standing, cells.student, count)
    others, rest = _running_teacher(teacher, pairs.teacher, running, cells.teacher, count)
    taken = None
    if came is not None:
        taken = _taken((standing, came.student, cells.student), (running, came.teacher, cells.teacher), count)
    return compare_rows(own, others, compare, student_rest=own_rest, teacher_rest=rest, conditional=True, came=taken)


def _coarser(
    student_logits: Tensor, teacher: Teacher, tables: Tables, pairs: Pairs, compare: Compare, came: Came | None
) -> Tensor:
    assert tables.coarser is not None
    cells = tables.cells
    running, standing, count = _reached(tables.coarser, pairs)
    own, own_rest = _running(student_logits, pairs.student, running, count)
    others, rest = _standing_teacher(teacher, pairs.teacher, standing, cells.teacher, count)
    taken = None
    if came is not None:
        taken = _taken((standing, came.teacher, cells.teacher), (running, came.student, cells.student), count)
    return compare_rows(own, others, compare, student_rest=own_rest, teacher_rest=rest, conditional=True, came=taken)


def _taken(standing: tuple[Listed, Tensor, Tensor], running: tuple[Listed, Tensor, Tensor], count: int) -> Tensor:
    """Return (P,) int64, the cell, of `count` and the rest behind, that the text took; -1 where the two sides differ.

    A side is its listed tokens, the (P,) ones that came and its table. What the standing side did not list is the rest.
    """
    stood, ran = (listed.cells_of(ids[:, None], len(table))[:, 0] for listed, ids, table in (standing, running))
    stood = stood.masked_fill(stood == EXCLUDED, count)
    return ran.where(stood == ran, -1)


def _reached(inside: Inside, pairs: Pairs) -> tuple[Listed, Listed, int]:
    """Return the two sides' tokens with their C cells numbered anew: few of all cells are reached inside a token.

    NO_CELL of the running side becomes C, the cell behind the others.
    """
    running, standing = inside.look_up(pairs.token, pairs.cut)
    reached = running.cells[running.cells != NO_CELL].unique()
    count = len(reached)
    anew = torch.searchsorted(reached, running.cells).masked_fill(running.cells == NO_CELL, count)
    return running._replace(cells=anew), standing._replace(cells=torch.searchsorted(reached, standing.cells)), count


def _running(logits: Tensor, rows: Tensor, listed: Listed, count: int) -> tuple[Tensor, Tensor]:
    """Return (P, C) log-masses by cell, and (P,) of tokens that have none, on one scale."""
    masses = _wide(logits[rows[listed.pair], listed.ids])
    pooled = pool_flat(masses, listed.pair, listed.cells, len(rows), count + 1)
    return pooled[:, :-1], pooled[:, -1]


def _standing(logits: Tensor, rows: Tensor, listed: Listed, table: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (P, C) log-masses of the listed tokens by cell, and (P,) of all others, on one scale."""
    mine = _wide(logits[rows, : len(table)]).masked_fill(table < 0, NEVER)
    pooled = pool_flat(mine[listed.pair, listed.ids], listed.pair, listed.cells, len(rows), count)
    others = mine.index_put((listed.pair, listed.ids), mine.new_tensor(NEVER))
    return pooled, log_sum(others)


def _running_teacher(
    teacher: Teacher, rows: Tensor, listed: Listed, table: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    if teacher.logp is not None:
        return _running(teacher.logp, rows, listed, count)
    pooled, _ = _listed_masses(teacher.rows(rows), listed, table, count)
    return pooled[:, :-1], pooled[:, -1]


def _standing_teacher(
    teacher: Teacher, rows: Tensor, listed: Listed, table: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    if teacher.logp is not None:
        return _standing(teacher.logp, rows, listed, table, count)
    row = teacher.rows(rows)
    pooled, others = _listed_masses(row, listed, table, count)
    return pooled[:, :-1], torch.logaddexp(others, row.log_rest)


def _listed_masses(teacher: Teacher, listed: Listed, table: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (P, C + 1) log-masses by cell, and (P,) of what the teacher listed but does not count there."""
    ids, logp = teacher.listed
    logp = logp.masked_fill(table[ids] < 0, NEVER)
    cells = listed.cells_of(ids, len(table))
    pooled = pool(logp, cells.masked_fill(logp == NEVER, EXCLUDED), count + 1)
    return pooled, logp.masked_fill(cells != EXCLUDED, NEVER).logsumexp(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
