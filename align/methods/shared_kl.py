"""The tokens that both vocabularies have, byte for byte, and everything else as one outcome.

Where the vocabularies are one up to order and padding this is the divergence of the whole distributions, exactly. Else
it is a lower bound, and honest about it: the mass outside is compared too, or a student could lose all of it unpunished
(at equality a truncated sum still has a slope). What it does not see is that equal tokens need not be equal events: "2"
is a digit to a tokenizer of single digits, and to one of longer numbers a digit with none behind it.

`strict_rows` is the other published choice: only what both list, renormalised, on the tokens that the student finds
likeliest (strict top-k, arXiv 2610.08448).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from align.byte_view import byte_view
from align.kernels.cell_rows import Tables, root_rows
from align.kernels.cells import shared_cells
from align.kernels.pooling import divergence_of, pool
from align.kernels.teacher_rows import Teacher
from distill.errors import UserError

__all__ = ["root_rows", "strict_rows", "tables"]


def tables(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    stops: tuple[Iterable[int], Iterable[int]] = ((), ()),
    specials: Mapping[int, int] | None = None,
) -> Tables:
    """Return the tables of a pair of tokenizers; arguments and errors: `align.kernels.cells.shared_cells`."""
    return Tables(
        shared_cells(byte_view(student_tokenizer), byte_view(teacher_tokenizer), stops=stops, specials=specials)
    )


def strict_rows(
    student_logits: Tensor,
    teacher: Teacher,
    tables: Tables,
    *,
    top_k: int = 16,
    divergence: str = "reverse_kl",
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return ``(n,)`` divergences over the student's `top_k` likeliest shared tokens, both sides renormalised.

    Meant for rows where one student token is one teacher token. It says nothing about the mass outside those tokens.

    Raises:
        UserError: a stored teacher, which need not list the student's likeliest tokens; `top_k` below 2.
    """
    if teacher.logp is None:
        raise UserError("strict top-k looks at the student's likeliest tokens: it needs a running teacher's logits")
    if top_k < 2:
        raise UserError(f"top_k must be 2 at least to compare anything, not {top_k}")
    cells = tables.cells
    text = cells.count - (cells.bottom >= 0)
    wide = student_logits.to(teacher.logp.dtype)
    own = pool(wide, cells.student, cells.count)[:, :text]
    others = teacher.log_masses(cells.teacher, cells.count)[:, :text]
    likeliest = own.detach().topk(min(top_k, text), dim=-1).indices
    sides = [side.gather(-1, likeliest).log_softmax(-1) for side in (own, others)]
    return divergence_of(divergence, options)(*sides)
