"""CSPC, consistent shared-prefix coarsening: both vocabularies on one set of cells, the text for what these leave open.

Our own method; no paper. A cell is what both sides' tokenizers agree to begin a text with
(`align.kernels.cells.consistent_cells`), so a student that writes the teacher's distribution in its own tokens is right
about (nearly) every cell, whichever side has the longer tokens: "201" against "2", "0", "1" is one cell at the root,
and is then compared digit by digit in interior rows. Mass is conserved on both sides.

Three kinds of rows compare cells: *covered* rows, at boundaries of both sides (`align.kernels.covered_rows`; plain root
rows at the beginning of an answer and behind a special token, where nothing has ended), and *interior* rows inside a
token of either side. Interior rows count only tokens that the other side would split there, and lead only where the
running side would run on, as their own tokenizers say.

Cells say nothing of which of their tokens the student should take, and a student taught by them alone forgets it. The
text knows one. By the chain rule the log-probability of a text is the sum over its rows of the log-probability of the
cell it took, and of what is left, the token within all that its rows tell apart. So the loss is

    sum_t -log S(y_t)  +  sum over rows of [ KL(T_row || S_row) + log S_row(cell that the text took) ]:

hard labels, with the teacher's expectation in the place of the draw wherever the teacher can say it. (A conditional
expectation in the place of a draw has the same mean and less variance: Rao and Blackwell. It is the same mean where the
text is the teacher's.) With one vocabulary nothing is left of the labels and this is forward KL; where no row compares
anything, it is the cross-entropy. A row whose two sides took different cells is left to the labels: there the text
itself shows that the cells are not one event.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from align.byte_view import ByteView, byte_view
from align.kernels.cell_rows import Tables, interior_rows, root_rows
from align.kernels.cells import consistent_cells
from align.kernels.covered_rows import Covered, covered_rows
from align.kernels.first_tokens import Splits
from align.kernels.prefixes import EXCLUDED, NO_CELL, Inside

__all__ = ["Covered", "covered_rows", "interior_rows", "root_rows", "tables"]


def tables(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    stops: tuple[Iterable[int], Iterable[int]] = ((), ()),
    specials: Mapping[int, int] | None = None,
    longest: bool = True,
) -> Tables:
    """Return the tables of a pair of tokenizers; arguments and errors: `align.kernels.cells.consistent_cells`."""
    views = byte_view(student_tokenizer), byte_view(teacher_tokenizer)
    splits = Splits(student_tokenizer, views[0]), Splits(teacher_tokenizer, views[1])
    cells = consistent_cells(
        *views, student_splits=splits[0], teacher_splits=splits[1], stops=stops, specials=specials, longest=longest
    )
    own, others = cells.student.numpy(), cells.teacher.numpy()
    return Tables(
        cells,
        finer=_inside(views[1], splits[1], views[0], splits[0], own, cells.bottom),
        coarser=_inside(views[0], splits[0], views[1], splits[1], others, cells.bottom),
    )


def _inside(
    running: ByteView, running_splits: Splits, standing: ByteView, splits: Splits, table: np.ndarray, bottom: int
) -> Inside:
    """Return what is known where a token of `running` runs over a boundary of `standing`, whose cells are `table`.

    A token that the standing side would not split there is excluded: that side has a boundary. And a token of the
    standing side leads on only if the running side would run over the boundary into it.
    """

    def cells_at(texts: Sequence[bytes], place: int) -> np.ndarray:
        tokens = splits.at(texts, place)
        found = np.where(tokens < 0, EXCLUDED, table[tokens])
        found[(found == bottom) | (found == -1) | np.array([len(text) == place for text in texts])] = NO_CELL
        return found

    def runs_over(beginning: bytes, ids: np.ndarray) -> np.ndarray:
        texts = [beginning + (standing.tokens[index] or b"") for index in ids.tolist()]
        return running_splits.first_is_longer(texts, len(beginning))

    return Inside(running, cells_at, table, runs_over)
