"""BPM, byte-prefix marginalisation (arXiv 2607.22334), with ESCD's completion term (arXiv 2609.34738).

A teacher token counts for the longest student token that its bytes begin with. So nothing the teacher says is lost
where the student's tokens are shorter: what remains of the bytes is compared in interior rows and, with completion,
after any first token that the student writes. Where the student's tokens are longer, the teacher's mass stays on the
shorter one: a student that writes "201" as one token is told to write "2". Tokens of whitespace alone are best left out
(`whitespace`): their rows teach the teacher's way of splitting an indent, and the authors saw code pass@8 fall from 49
to 9 by it.

Not built: the mass of the one longer token that the student did write, as a product over the teacher's tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.byte_view import ByteView, byte_view
from align.kernels.cell_rows import Tables, interior_rows, root_rows
from align.kernels.cells import prefix_cells
from align.kernels.first_tokens import longest_prefixes
from align.kernels.pooling import pool_flat
from align.kernels.prefixes import NO_CELL, Inside, SortedTokens
from align.kernels.teacher_rows import Teacher
from distill.divergences import NEVER

__all__ = ["Completion", "completion_rows", "interior_rows", "root_rows", "tables", "whitespace"]


def tables(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    stops: tuple[Iterable[int], Iterable[int]] = ((), ()),
    specials: Mapping[int, int] | None = None,
) -> Tables:
    """Return the tables of a pair of tokenizers; arguments and errors: `align.kernels.cells.prefix_cells`.

    There are interior rows where the student is finer only.
    """
    student, teacher = byte_view(student_tokenizer), byte_view(teacher_tokenizer)
    cells = prefix_cells(student, teacher, stops=stops, specials=specials)
    table = cells.student.numpy()
    ids = {token: index for index, token in enumerate(student.tokens) if token}

    def cells_at(texts: Sequence[bytes], place: int) -> np.ndarray:
        begins = longest_prefixes((text[place:] for text in texts), ids)
        found = np.array([table[ids[token]] if token else NO_CELL for token in begins], np.int64)
        found[found == cells.bottom] = NO_CELL
        return found

    return Tables(cells, finer=Inside(teacher, cells_at, table))


def whitespace(view: ByteView) -> Tensor:
    """Return (V,) bool, by id: a token of spaces and tabs alone."""
    return torch.tensor([token is not None and token != b"" and not token.strip(b" \t") for token in view.tokens])


class Completion:
    """ESCD's child term: what a student's first token leaves of the teacher's tokens that the student does not have.

    Those tokens are grouped, each with all that it begins; a group stands for its shortest.

    Args:
        student, teacher: the two vocabularies.
    """

    def __init__(self, student: ByteView, teacher: ByteView) -> None:
        own = {token for token in student.tokens if token}
        self.student = student
        self._begins = SortedTokens(student)
        self.groups: list[bytes] = []
        table = np.full(len(teacher), -1)
        alone = sorted((token, index) for index, token in enumerate(teacher.tokens) if token and token not in own)
        for token, index in alone:
            if not self.groups or not token.startswith(self.groups[-1]):
                self.groups.append(token)
            table[index] = len(self.groups) - 1
        self.table = torch.from_numpy(table)
        self._known: dict[int, _Children] = {}

    def after(self, token: int) -> _Children:
        """Return what may complete a group behind a student's token."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._after(self.student.tokens[token])
        return known

    def _after(self, beginning: bytes | None) -> _Children:
        groups, sizes, ids = [], [], [torch.empty(0, dtype=torch.int64)]
        if beginning:
            place = bisect_right(self.groups, beginning)
            while place < len(self.groups) and self.groups[place].startswith(beginning):
                _, found = self._begins.beginning_with(self.groups[place][len(beginning) :])
                if len(found):
                    groups.append(place)
                    sizes.append(len(found))
                    ids.append(torch.from_numpy(found))
                place += 1
        return _Children(
            torch.tensor(groups, dtype=torch.int64), torch.tensor(sizes, dtype=torch.int64), torch.cat(ids)
        )


@dataclass(frozen=True, slots=True)
class _Children:
    """G groups behind a token: their numbers, how many student tokens complete each, and which, one after another."""

    groups: Tensor
    sizes: Tensor
    ids: Tensor


def completion_rows(student_logits: Tensor, teacher: Teacher, tables: Completion, *, student_tokens: Tensor) -> Tensor:
    """Return ``(n,)`` nats: minus the sum over groups of the teacher's mass times the student's log-mass completing it.

    A cross-entropy: its least value is not 0, and a row is 0 where the first token leaves nothing to complete.

    Args:
        student_logits: (n, V), the rows *behind* a first token.
        teacher: n rows, the root rows that the first token was predicted beside.
        student_tokens: (n,) int64, those first tokens.
    """
    wide = student_logits[:, : len(tables.student)].to(torch.promote_types(student_logits.dtype, torch.float32))
    logp = wide.log_softmax(-1)
    masses = teacher.masses(tables.table.to(wide.device), len(tables.groups))
    children = [tables.after(token) for token in student_tokens.tolist()]
    count = max((len(each.groups) for each in children), default=0)
    if count == 0:
        return (wide * 0).sum(-1)
    device = wide.device
    row = torch.cat([torch.full((len(each.ids),), n) for n, each in enumerate(children)]).to(device)
    place = torch.cat([torch.repeat_interleave(each.sizes) for each in children]).to(device)
    ids = torch.cat([each.ids for each in children]).to(device)
    completing = pool_flat(logp[row, ids], row, place, len(wide), count)
    teachers = torch.zeros_like(completing)
    for n, each in enumerate(children):
        teachers[n, : len(each.groups)] = masses[n, each.groups.to(device)]
    return -(teachers * completing.masked_fill(completing == NEVER, 0.0)).sum(-1)
