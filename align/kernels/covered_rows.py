"""Root rows of two models that each forget where its own last token ended: what both say of the next *bytes*.

A model's row at a boundary knows more than the text up to there: that its last token has ended. A tokenizer that has
"ab" writes "a" alone only where no "b" follows, so after "a" its model rules "b" out, and one with shorter tokens,
which stands at the same place, does not. Two models that are right about the same text differ there. What is missing is
in the row before: there the tokens that begin with the last one and run on have their mass too. Summed up both ways,

    P(cell | bytes) = [ sum of P_before(w) over longer tokens w that go on in the cell
                        + P_before(last token) P_now(cell) ] / P_before(w begins with the last token),

the two sides are compared on what they both know (a cover of the text so far, in the sense of Phan et al.,
arXiv 2410.09303, one token back). A longer token counts only if the other side splits it at the boundary. Where both
sides have one tokenizer none does, and this is the plain root row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.kernels.cell_rows import Came, Tables, cell_that_came
from align.kernels.pooling import beside, compare_rows, divergence_of, pool, pool_flat
from align.kernels.prefixes import EXCLUDED, Inside, Listed
from align.kernels.teacher_rows import Teacher
from distill.divergences import NEVER


class Covered(NamedTuple):
    """R boundaries of both sides, with the tokens that end there.

    Attributes:
        student, teacher: (R,) int64, the rows that predict what comes next.
        student_before, teacher_before: (R,) the rows that predicted the tokens ending there.
        student_token, teacher_token: (R,) those tokens' ids; they are of text.
    """

    student: Tensor
    teacher: Tensor
    student_before: Tensor
    teacher_before: Tensor
    student_token: Tensor
    teacher_token: Tensor


def covered_rows(
    student_logits: Tensor,
    teacher: Teacher,
    tables: Tables,
    places: Covered,
    *,
    divergence: str = "forward_kl",
    options: Mapping[str, Any] | None = None,
    came: Came | None = None,
) -> Tensor:
    """Return ``(R,)`` divergences in nats between what two models say of the next bytes, by cell.

    Of a stored teacher the longer tokens that it listed count; where it did not list the token that ended, its row is
    taken as it is, or with `came` left out.

    Args:
        student_logits: (n, V); rows of it are `places.student` and `places.student_before`, and both get a gradient.
        teacher: m rows.
        tables: with `finer` and `coarser`.
        divergence, options, came: see `align.kernels.cell_rows.root_rows`.
    """
    assert tables.finer is not None
    assert tables.coarser is not None
    cells, count = tables.cells, tables.cells.count
    wide = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    own = pool(wide[places.student], cells.student, count).log_softmax(-1)
    longer = _longer(tables.coarser, places.student_token, count)
    own, _, _ = _cover(own, None, longer, wide[places.student_before[longer.pair], longer.ids])
    now = teacher.rows(places.teacher)
    known = now.log_masses(cells.teacher, count)
    longer = _longer(tables.finer, places.teacher_token, count)
    longer, masses = _longer_of_teacher(teacher, places, longer, len(cells.teacher))
    compare, taken = divergence_of(divergence, options), cell_that_came(cells, came)
    if teacher.outcomes is None:  # both are whole distributions already
        others, _, _ = _cover(known.log_softmax(-1), None, longer, masses)
        return beside(compare(own, others), own, taken)
    parts = torch.cat([known, now.log_rest[:, None]], -1).log_softmax(-1)
    others, rest, unknown = _cover(parts[:, :-1], parts[:, -1], longer, masses)
    taken = None if taken is None else taken.masked_fill(unknown, -1)
    return compare_rows(own, others, compare, teacher_rest=rest, came=taken)


def _longer(inside: Inside, token: Tensor, count: int) -> Listed:
    """Return the tokens that begin with each token; those that end with it have the cell behind all others."""
    running, _ = inside.look_up(token, inside.lengths(token))
    return running._replace(cells=running.cells.where(running.cells >= 0, count))


def _longer_of_teacher(teacher: Teacher, places: Covered, longer: Listed, size: int) -> tuple[Listed, Tensor]:
    """Return those of the longer tokens that the teacher speaks of in the rows before, and its (F,) log-masses.

    Args:
        size: ids of the teacher's vocabulary.
    """
    if teacher.logp is not None:
        return longer, teacher.logp[places.teacher_before[longer.pair], longer.ids]
    before = teacher.rows(places.teacher_before)
    ids, logp = before.listed
    cells = longer.cells_of(ids, size)
    pair, place = ((cells != EXCLUDED) & (logp > NEVER)).nonzero(as_tuple=True)
    return Listed(pair, ids[pair, place], cells[pair, place]), logp[pair, place]


def _cover(now: Tensor, rest: Tensor | None, longer: Listed, masses: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (R, C) log-masses of both ways, (R,) of the rest, and (R,) bool where the last token has none.

    There they are as they were.

    Args:
        now, rest: (R, C) and (R,) what the row behind the last token says; with the rest, one distribution.
        longer, masses: the F tokens of the row before that begin with the last token, and their log-masses.
    """
    rows, count = now.shape
    alike = torch.zeros_like(longer.pair)
    total = pool_flat(masses, alike, longer.pair, 1, rows)[0]
    goes_on = longer.cells < count
    ended = pool_flat(masses[~goes_on], alike[~goes_on], longer.pair[~goes_on], 1, rows)[0]
    unknown = ended == NEVER
    share = ended.masked_fill(unknown, 0.0) - total.masked_fill(unknown, 0.0)
    both, rest = now + share[:, None], None if rest is None else rest + share
    goes_on = goes_on & ~unknown[longer.pair]
    place, to = (longer.pair * count + longer.cells)[goes_on].unique(return_inverse=True)
    if not len(place):
        return both, rest, unknown
    pair = place // count
    on = pool_flat(masses[goes_on], alike[goes_on], to, 1, len(place))[0] - total[pair]
    flat = both.flatten()
    return flat.index_put((place,), _log_add(flat[place], on)).view_as(both), rest, unknown


def _log_add(one: Tensor, other: Tensor) -> Tensor:
    """Return log(e^one + e^other); -inf, and no slope, of two -inf."""
    neither = (one == NEVER) & (other == NEVER)
    return torch.logaddexp(one.masked_fill(neither, 0.0), other.masked_fill(neither, 0.0)).masked_fill(neither, NEVER)
