"""ULD: two distributions as sorted lists of probabilities, compared place by place (arXiv 2402.12030, eq. 3).

The sum over places of |P - Q|, both sorted downwards and the shorter list continued with zeros. It asks for no map
between the vocabularies, because it does not look at tokens. That is what it cannot do:

- It is blind to identity. A student that gives the teacher's probabilities to other tokens has loss 0. Nor does it
  notice rows that are one off, where both models are equally sure of what they predict. And a permuted teacher
  vocabulary gives exactly the loss of one vocabulary, with nothing that ties a token to its own.
- Its slope does not vanish on the way to equality: a rounding away it is still ±p, and only exact equality has none.
- Positions are paired by index in the published method (`by_index`), so that after the first span of unequal token
  counts each row is compared with another place of the text. The kernel compares the rows it is given: pairing the
  last rows of spans instead, with priors (`align.kernels.chain`), is TRL's "extended" ULD.

Not here: the cross-entropy beside it, skipping the end token, MultiLevelOT's sort over a whole batch. A teacher of
which only the top-k is known is refused: the tail is in every place of the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.kernels.chain import student_rows, teacher_rows
from align.kernels.teacher_rows import Teacher


def uld(
    student_logits: Tensor,
    teacher: Teacher,
    width: int,
    *,
    student_prior: Tensor | None = None,
    teacher_prior: Tensor | None = None,
) -> Tensor:
    """Return ``(n,)`` L1 distances of sorted probabilities, in [0, 2].

    Args:
        student_logits: (n, V_S or more), already divided by a temperature.
        teacher: n dense rows, at its own temperature.
        width: V_S, the student's tokens; logits behind are padding.
        student_prior, teacher_prior: (n,) see `align.kernels.chain.priors`; None for rows of one token.

    Raises:
        UserError: the teacher's whole distribution is not known; fewer logits than tokens.
    """
    student = student_rows(student_logits, width, student_prior)
    return sorted_l1(student.exp(), teacher_rows(teacher, "uld", teacher_prior).exp())


def sorted_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ``(n,)`` sums of |p - q| over two lists (n, A) and (n, B) sorted downwards; where one ends it is 0."""
    own, theirs = (side.sort(-1, descending=True).values for side in (student, teacher))
    both = min(own.shape[-1], theirs.shape[-1])
    near = (own[:, :both] - theirs[:, :both]).abs().sum(-1)
    return near + own[:, both:].sum(-1) + theirs[:, both:].sum(-1)


def by_index(student_sequence: Tensor, teacher_sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows the published method compares: the k-th of each sequence with the k-th, while both have one.

    Args:
        student_sequence: (N,) int64, rising: the sequence that each of the student's rows belongs to.
        teacher_sequence: (M,) int64, likewise the teacher's.

    Returns:
        Rows of the student's and of the teacher's, (P,) int64 each.
    """
    place = torch.arange(len(student_sequence), device=student_sequence.device)
    place = place - torch.searchsorted(student_sequence, student_sequence)
    theirs = torch.searchsorted(teacher_sequence, student_sequence) + place
    paired = theirs < torch.searchsorted(teacher_sequence, student_sequence, right=True)
    return paired.nonzero()[:, 0], theirs[paired]
