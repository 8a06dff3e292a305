"""What a teacher said at n rows, for methods that sum it up by cell: all its logits, or the most likely outcomes.

A stored top-k teacher is known in part: what it did not list is one mass, `rest`, of which it is not known where it
lies. Random draws are no masses, and are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from align.kernels.pooling import log1mexp, pool
from distill.batch import TeacherRows
from distill.divergences import NEVER
from distill.errors import UserError
from distill.supports import Outcomes, check_width, filled, top_k_outcomes


@dataclass(frozen=True, slots=True)
class Teacher:
    """A teacher's distributions at n rows; made by `dense` or `stored`, and without a gradient.

    Attributes:
        logp: (n, V_T) log-probabilities; None where only the most likely outcomes were stored.
        outcomes: those, with the mass of all others; None where everything is known.
    """

    logp: Tensor | None = None
    outcomes: Outcomes | None = None

    @classmethod
    def dense(cls, logits: Tensor, *, num_outcomes: int, temperature: float = 1.0) -> Teacher:
        """Return what ``(n, V)`` logits say of the first `num_outcomes` ids; those behind are padding.

        Raises:
            UserError: there are fewer logits than ids.
        """
        check_width("teacher", logits.shape[-1], num_outcomes)
        wide = logits.detach()[:, :num_outcomes].to(torch.promote_types(logits.dtype, torch.float32))
        return cls(logp=(wide / temperature).log_softmax(-1))

    @classmethod
    def stored(cls, rows: TeacherRows, *, num_outcomes: int, came: Tensor | None = None) -> Teacher:
        """Return what a signal says, at temperature 1.

        Args:
            came: (n,) int64, the tokens that the rows were followed by: with `rows.realised` they are always listed.

        Raises:
            UserError: the signal is one of random draws.
        """
        if rows.logprobs is None or rows.counts is not None:
            raise UserError(
                "the signal holds random draws: comparing two vocabularies needs the most likely outcomes, "
                "score the traces again with top-k"
            )
        outcomes = top_k_outcomes(rows, num_outcomes=num_outcomes)
        if came is None or rows.realised is None:
            return cls(outcomes=outcomes)
        listed = (outcomes.ids == came[:, None]).any(-1)
        logp, rest = outcomes.logp[:, :-1], outcomes.logp[:, -1]
        # It is a part of the rest; rounding may say that it is more, and then it is all of it.
        own = torch.minimum(rows.realised.to(rest.dtype), rest).masked_fill(listed, NEVER)
        left = rest.masked_fill(rest == NEVER, 0.0)
        rest = (left + log1mexp((own - left).masked_fill(own == NEVER, NEVER))).masked_fill(rest == NEVER, NEVER)
        ids = torch.cat([outcomes.ids, came[:, None].masked_fill(listed[:, None], -1)], -1)
        return cls(outcomes=Outcomes(ids, torch.cat([logp, own[:, None], rest[:, None]], -1)))

    def __len__(self) -> int:
        return len(self._known)

    def rows(self, index: Tensor | slice) -> Teacher:
        """Return some of the rows, by a slice or (m,) int64."""
        if self.logp is not None:
            return Teacher(logp=self.logp[index])
        assert self.outcomes is not None
        return Teacher(outcomes=Outcomes(self.outcomes.ids[index], self.outcomes.logp[index]))

    @property
    def rest(self) -> Tensor:
        """Return (n,) probabilities of what is not listed; 0 where everything is known."""
        return self.log_rest.exp()

    @property
    def log_rest(self) -> Tensor:
        """Return (n,) logarithms of `rest`."""
        if self.outcomes is not None:
            return self.outcomes.logp[:, -1]
        return self._known.new_full((len(self._known),), NEVER)

    def masses(self, index: Tensor, cells: int) -> Tensor:
        """Return (n, cells) probabilities by cell: of all ids, or of those listed.

        Args:
            index: (V_T,) int64, the cell of each id; an id with -1 counts for none.
        """
        return self.log_masses(index, cells).exp()

    def log_masses(self, index: Tensor, cells: int) -> Tensor:
        """Return (n, cells) logarithms of `masses`, -inf in cells without any."""
        if self.logp is not None:
            return pool(self.logp, index, cells)
        ids, logp = self.listed
        return pool(logp, index[ids].masked_fill(logp == NEVER, -1), cells)

    @property
    def listed(self) -> tuple[Tensor, Tensor]:
        """Return the ids (n, K) of a stored teacher, with any id in empty places, and their log-probabilities."""
        assert self.outcomes is not None
        return filled(self.outcomes.ids), self.outcomes.logp[:, :-1]

    @property
    def _known(self) -> Tensor:
        known = self.logp if self.outcomes is None else self.outcomes.logp
        assert known is not None
        return known
