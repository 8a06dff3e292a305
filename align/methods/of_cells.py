"""The methods that compare rows, as comparisons: which rows of a batch each looks at, with which kernel and options.

Each is ``f(pair, tables, places, batch, *, options)``; the kernels, and what they mean, are the modules named after the
methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.cell_rows import Tables, interior_rows, root_rows
from align.methods import bpm, cspc, shared_kl
from align.methods import mined as nearest
from align.methods.entry import Pair
from align.places import Places
from align.prefixes import Pairs
from align.rows import Comparison
from align.teacher_rows import Teacher
from distill.batch import Batch

Options = Mapping[str, Any] | None


def cspc_rows(
    pair: Pair,
    tables: Tables,
    places: Places,
    batch: Batch,
    *,
    divergence: str = "forward_kl",
    divergence_options: Options = None,
    interior: bool = True,
    interior_weight: float = 1.0,
) -> list[Comparison]:
    """Return CSPC's rows: those at boundaries of both sides, and with `interior` those inside a token of either."""
    rows = [_roots(places, tables, divergence, divergence_options)]
    if interior:
        rows.append(_interior(places, tables, interior_weight, divergence, divergence_options))
    return rows


def cspc_tables(pair: Pair, *, longest: bool = True) -> Tables:
    """Return CSPC's tables; `longest` also joins a token with its longest beginning that both sides have."""
    return cspc.tables(*pair.tokenizers, stops=pair.stops, specials=pair.specials, longest=longest)


def shared_rows(
    pair: Pair,
    tables: Tables,
    places: Places,
    batch: Batch,
    *,
    divergence: str = "forward_kl",
    divergence_options: Options = None,
    strict_top_k: int | None = None,
) -> list[Comparison]:
    """Return the rows of shared tokens and all else; with `strict_top_k` only rows of one token on both sides.

    Args:
        strict_top_k: compare the student's so many likeliest shared tokens alone, renormalised (2610.08448).
    """
    if strict_top_k is None:
        return [_roots(places, tables, divergence, divergence_options)]
    one = _one_to_one(places)
    kernel = {"divergence": divergence, "options": divergence_options, "top_k": strict_top_k}

    def compare(logits: Tensor, own: Tensor, teacher: Teacher, others: Tensor, _: slice | Tensor) -> Tensor:
        return shared_kl.strict_rows(logits[own], teacher.rows(others), tables, **kernel)  # type: ignore[arg-type]

    return [Comparison(places.student[one], places.teacher[one], compare)]


def shared_tables(pair: Pair) -> Tables:
    """Return the cells of the shared tokens."""
    return shared_kl.tables(*pair.tokenizers, stops=pair.stops, specials=pair.specials)


@dataclass(frozen=True, slots=True)
class BpmTables:
    """BPM's cells, which of the student's tokens are white space, and ESCD's groups."""

    cells: Tables
    whitespace: Tensor
    completion: bpm.Completion

    def to(self, device: torch.device | str) -> BpmTables:
        """Return the tables on another device; the groups are looked up on the CPU."""
        return BpmTables(self.cells.to(device), self.whitespace, self.completion)


def bpm_rows(
    pair: Pair,
    tables: BpmTables,
    places: Places,
    batch: Batch,
    *,
    divergence: str = "forward_kl",
    divergence_options: Options = None,
    interior: bool = True,
    interior_weight: float = 1.0,
    skip_whitespace: bool = True,
    completion: bool = True,
    completion_weight: float = 1.0,
) -> list[Comparison]:
    """Return BPM's rows: at boundaries of both sides, inside the teacher's tokens, and ESCD's behind a first token.

    Args:
        skip_whitespace: leave out rows whose token is spaces and tabs alone.
        completion: ESCD's term, arXiv 2609.34738.
    """
    labels = batch.trained().labels.cpu()
    rows = [_roots(places, tables.cells, divergence, divergence_options)]
    if interior:
        rows.append(_interior(places, tables.cells, interior_weight, divergence, divergence_options))
    if completion:
        rows.append(_completion(places, tables.completion, labels, completion_weight))
    if not skip_whitespace:
        return rows
    return [_some(each, ~tables.whitespace[labels[each.student]]) for each in rows]


def bpm_tables(pair: Pair) -> BpmTables:
    """Return BPM's tables."""
    cells = bpm.tables(*pair.tokenizers, stops=pair.stops, specials=pair.specials)
    views = pair.student.view, pair.teacher.view
    return BpmTables(cells, bpm.whitespace(views[0]), bpm.Completion(*views))


def mined_rows(pair: Pair, tables: MinedTable, places: Places, batch: Batch) -> list[Comparison]:
    """Return every row of a span: compared where one token is one token, else taught the token that came."""
    labels = batch.trained().labels.cpu()
    assert batch.other is not None
    theirs = batch.other.input_ids.cpu()[places.teacher_rows, places.teacher_positions]
    own = (places.student_span >= 0).nonzero()[:, 0]
    span = places.student_span[own]
    others, one = places.teacher[span], _one_to_one(places)[span]
    width = len(pair.student.view)

    def compare(logits: Tensor, rows: Tensor, teacher: Teacher, met: Tensor, piece: slice | Tensor) -> Tensor:
        device = logits.device
        given = {"labels": labels[own[piece]], "teacher_labels": theirs[others[piece]], "one_to_one": one[piece]}
        moved = {name: part.to(device) for name, part in given.items()}
        return nearest.mined(logits[rows], teacher.rows(met), tables.index, width=width, **moved)

    return [Comparison(own, others, compare)]


@dataclass(frozen=True, slots=True)
class MinedTable:
    """(V_T,) the student's token that each teacher token counts for."""

    index: Tensor

    def to(self, device: torch.device | str) -> MinedTable:
        """Return it on another device."""
        return MinedTable(self.index.to(device))


def mined_table(pair: Pair) -> MinedTable:
    """Return MinED's map."""
    return MinedTable(nearest.spelling_map(pair.student.view, pair.teacher.view, specials=pair.specials))


def _roots(places: Places, tables: Tables, divergence: str, options: Options) -> Comparison:
    def compare(logits: Tensor, own: Tensor, teacher: Teacher, others: Tensor, _: slice | Tensor) -> Tensor:
        return root_rows(logits[own], teacher.rows(others), tables, divergence=divergence, options=options)

    return Comparison(places.student, places.teacher, compare)


def _interior(places: Places, tables: Tables, weight: float, divergence: str, options: Options) -> Comparison:
    # A method need not have rows inside tokens of both sides.
    inside = places.interior
    known = torch.zeros_like(inside.coarser)
    for coarser, table in ((True, tables.coarser), (False, tables.finer)):
        if table is not None:
            known |= inside.coarser == coarser
    running = [part[known] for part in (inside.token, inside.cut, inside.coarser)]

    def compare(logits: Tensor, own: Tensor, teacher: Teacher, others: Tensor, piece: slice | Tensor) -> Tensor:
        pairs = Pairs(own, others, *(part[piece].to(logits.device) for part in running))
        return interior_rows(logits, teacher, tables, pairs, divergence=divergence, options=options)

    return Comparison(inside.student[known], inside.teacher[known], compare, weight)


def _completion(places: Places, tables: bpm.Completion, labels: Tensor, weight: float) -> Comparison:
    # The student's row behind the first token of a span, where it is trained; a stop token has none.
    behind = places.student + 1
    same = places.following[places.student]
    first, own, others = labels[places.student][same], behind[same], places.teacher[same]

    def compare(logits: Tensor, rows: Tensor, teacher: Teacher, met: Tensor, piece: slice | Tensor) -> Tensor:
        return bpm.completion_rows(logits[rows], teacher.rows(met), tables, student_tokens=first[piece])

    return Comparison(own, others, compare, weight)


def _one_to_one(places: Places) -> Tensor:
    """Return (S,) bool: one token on both sides."""
    count = len(places.student)
    sizes = [torch.bincount(span[span >= 0], minlength=count) for span in (places.student_span, places.span)]
    return (sizes[0] == 1) & (sizes[1] == 1)


def _some(rows: Comparison, kept: Tensor) -> Comparison:
    """Return a comparison without some of its rows."""
    places = kept.nonzero()[:, 0]

    def compare(logits: Tensor, own: Tensor, teacher: Teacher, others: Tensor, piece: slice | Tensor) -> Tensor:
        return rows.kernel(logits, own, teacher, others, places[piece])

    return Comparison(rows.student[kept], rows.teacher[kept], compare, rows.weight)
