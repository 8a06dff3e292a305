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

from align.cell_rows import Tables, running_masses, running_teacher_masses
from align.pooling import compare_rows, divergence_of, log_sum, pool
from align.prefixes import Inside, Listed
from align.teacher_rows import Teacher
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
) -> Tensor:
    """Return ``(R,)`` divergences in nats between what two models say of the next bytes, by cell.

    Of a stored teacher the longer tokens that it listed count; where it did not list the token that ended, its row is
    taken as it is.

    Args:
        student_logits: (n, V); rows of it are `places.student` and `places.student_before`, and both get a gradient.
        teacher: m rows.
        tables: with `finer` and `coarser`.
        divergence, options: see `align.cell_rows.root_rows`.
    """
    assert tables.finer is not None
    assert tables.coarser is not None
    cells, count = tables.cells, tables.cells.count
    wide = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    own = pool(wide[places.student], cells.student, count).log_softmax(-1)
    longer = _longer(tables.coarser, places.student_token, count)
    own, _ = _cover(own, None, *running_masses(wide, places.student_before, longer, count))
    now = teacher.rows(places.teacher)
    longer = _longer(tables.finer, places.teacher_token, count)
    before = running_teacher_masses(teacher, places.teacher_before, longer, cells.teacher, count)
    others, rest = _cover(now.log_masses(cells.teacher, count), now.log_rest, *before)
    compare = divergence_of(divergence, options)
    return compare_rows(own, others, compare, teacher_rest=None if teacher.outcomes is None else rest)


def _longer(inside: Inside, token: Tensor, count: int) -> Listed:
    """Return the tokens that begin with each token; those that end with it have the cell behind all others."""
    running, _ = inside.look_up(token, inside.lengths(token))
    return running._replace(cells=running.cells.where(running.cells >= 0, count))


def _cover(now: Tensor, rest: Tensor | None, longer: Tensor, ended: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (R, C) log-masses of both ways, and (R,) of the rest; as they are where the last token has no mass.

    Args:
        now, rest: (R, C) and (R,) what the row behind the last token says.
        longer, ended: (R, C) and (R,) the row before it: of longer tokens by cell, and of those that end with it.
    """
    unknown = ended == NEVER
    total = log_sum(torch.cat([longer, ended.masked_fill(unknown, 0.0)[:, None]], -1))
    share = (ended.masked_fill(unknown, 0.0) - total).masked_fill(unknown, 0.0)
    on = (longer - total[:, None]).masked_fill(unknown[:, None], NEVER)
    now = now + share[:, None]
    neither = (on == NEVER) & (now == NEVER)
    both = torch.logaddexp(on.masked_fill(neither, 0.0), now.masked_fill(neither, 0.0)).masked_fill(neither, NEVER)
    return both, None if rest is None else rest + share
