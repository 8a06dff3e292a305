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

from align.engine.places import Places
from align.engine.rows import Comparison
from align.kernels.cell_rows import Came, Tables, interior_rows, root_rows
from align.kernels.covered_rows import Covered, covered_rows
from align.kernels.prefixes import Pairs
from align.kernels.teacher_rows import Teacher
from align.methods import bpm, cspc, shared_kl
from align.methods import mined as nearest
from align.methods.entry import Pair
from distill.batch import Batch
from distill.errors import UserError

Options = Mapping[str, Any] | None


def cspc_rows(
    pair: Pair,
    tables: Tables,
    places: Places,
    batch: Batch,
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    divergence_options: Options = None,
    interior: bool = True,
    interior_weight: float = 1.0,
    covered: bool = True,
    labels: bool | None = None,
) -> list[Comparison]:
    """Return CSPC's rows: at boundaries of both sides, inside a token of either, and those of the text's own tokens.

    Args:
        interior: compare inside tokens, too.
        covered: take what a model knows of its last token out of the rows behind it (`align.kernels.covered_rows`).
        labels: the text's own tokens teach what cells leave open; None: with `forward_kl` at temperature 1.

    Raises:
        UserError: `labels` where they do not mean anything.
    """
    if labels is None:
        labels = divergence == "forward_kl" and temperature == 1.0
    elif labels and (divergence != "forward_kl" or temperature != 1.0):
        raise UserError(
            f"labels=true with {divergence} at temperature {temperature}: the text's tokens stand for what cells leave "
            "open of forward_kl at temperature 1; take labels=false, and --hard-label-weight for labels beside it"
        )
    whole = tables.cells.exact  # a cell a token: nothing is left open
    came = _came(places, batch) if labels and not whole else None
    kernel: dict[str, Any] = {"divergence": divergence, "options": divergence_options}
    later = places.behind.clone() if covered and not whole else torch.zeros_like(places.behind)
    for side, begins, lengths in zip(
        _tokens(places, batch), (places.student, places.teacher), pair.lengths, strict=True
    ):
        later &= torch.from_numpy(lengths)[side[(begins - 1).clamp(min=0)]] > 0  # what ends there is text
    rows = [
        _some(_roots(places, tables, came, **kernel), ~later),
        _covered(places, batch, tables, came, later, **kernel),
    ]
    if interior:
        rows.append(_interior(places, tables, interior_weight, came, **kernel))
    if came is not None:
        rows.append(_labels(batch))
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
        return [_roots(places, tables, divergence=divergence, options=divergence_options)]
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
    kernel: dict[str, Any] = {"divergence": divergence, "options": divergence_options}
    rows = [_roots(places, tables.cells, **kernel)]
    if interior:
        rows.append(_interior(places, tables.cells, interior_weight, **kernel))
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
    labels, theirs = _tokens(places, batch)
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


def _roots(places: Places, tables: Tables, came: Came | None = None, **kernel: Any) -> Comparison:
    said = _at(came, places.student, places.teacher)

    def compare(logits: Tensor, own: Tensor, teacher: Teacher, others: Tensor, piece: slice | Tensor) -> Tensor:
        next_ = _at(said, piece, piece, logits.device)
        return root_rows(logits[own], teacher.rows(others), tables, came=next_, **kernel)

    return Comparison(places.student, places.teacher, compare)


def _covered(
    places: Places, batch: Batch, tables: Tables, came: Came | None, which: Tensor, **kernel: Any
) -> Comparison:
    """Return the root rows `which` (S,) bool, each with the one before it."""
    student, teacher = places.student[which], places.teacher[which]
    own_tokens, their_tokens = _tokens(places, batch)
    ended, said = (own_tokens[student - 1], their_tokens[teacher - 1]), _at(came, student, teacher)

    def compare(logits: Tensor, own: Tensor, teacher: Teacher, others: Tensor, piece: slice | Tensor) -> Tensor:
        last = (side[piece].to(logits.device) for side in ended)
        next_ = _at(said, piece, piece, logits.device)
        return covered_rows(
            logits, teacher, tables, Covered(own, others, own - 1, others - 1, *last), came=next_, **kernel
        )

    return Comparison(student, teacher, compare, reach=1 if len(student) else 0)


def _interior(places: Places, tables: Tables, weight: float, came: Came | None = None, **kernel: Any) -> Comparison:
    # A method need not have rows inside tokens of both sides.
    inside = places.interior
    known = torch.zeros_like(inside.coarser)
    for coarser, table in ((True, tables.coarser), (False, tables.finer)):
        if table is not None:
            known |= inside.coarser == coarser
    student, teacher = inside.student[known], inside.teacher[known]
    running, said = [part[known] for part in (inside.token, inside.cut, inside.coarser)], _at(came, student, teacher)

    def compare(logits: Tensor, own: Tensor, teacher: Teacher, others: Tensor, piece: slice | Tensor) -> Tensor:
        pairs = Pairs(own, others, *(part[piece].to(logits.device) for part in running))
        return interior_rows(logits, teacher, tables, pairs, came=_at(said, piece, piece, logits.device), **kernel)

    return Comparison(student, teacher, compare, weight)


def _labels(batch: Batch) -> Comparison:
    """Return minus the log-probability of every trained token."""
    labels = batch.trained().labels.cpu()

    def compare(logits: Tensor, own: Tensor, _: Teacher, __: Tensor, piece: slice | Tensor) -> Tensor:
        wide = logits[own].to(torch.promote_types(logits.dtype, torch.float32))
        return wide.logsumexp(-1) - wide.gather(-1, labels[piece, None].to(logits.device))[:, 0]

    return Comparison(torch.arange(len(labels)), None, compare)


def _tokens(places: Places, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (N,) and (M,) int64, on the CPU: the tokens that the rows of both sides were followed by."""
    assert batch.other is not None
    return batch.trained().labels.cpu(), batch.other.input_ids.cpu()[places.teacher_rows, places.teacher_positions]


def _came(places: Places, batch: Batch) -> Came:
    return Came(*_tokens(places, batch))


def _at(came: Came | None, student: Any, teacher: Any, device: torch.device | str = "cpu") -> Came | None:
    return None if came is None else Came(came.student[student].to(device), came.teacher[teacher].to(device))


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

    assert rows.teacher is not None
    return Comparison(rows.student[kept], rows.teacher[kept], compare, rows.weight, rows.reach)
