"""The further models that CompassOPD scores with: a weak one of the teacher's family, and the student as it began."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from align.engine.places import Places
from align.engine.realised import realised
from align.identity import same_vocabulary
from align.methods.entry import Pair
from distill.batch import Batch
from distill.errors import UserError
from distill.forward import read_head, run
from distill.head import Head
from distill.models import load_model, load_tokenizer


@dataclass(frozen=True, slots=True)
class References:
    """Two models that are not trained, with their heads.

    Attributes:
        weak, weak_head: reads the teacher's tokens.
        initial, initial_head: the student as it was; reads the student's tokens.
    """

    weak: Any
    weak_head: Head
    initial: Any
    initial_head: Head

    @property
    def scorers(self) -> tuple[tuple[Any, Literal["student", "teacher"]], ...]:
        """Both for the ledger: `distill.losses.base.Inner.scorers`."""
        return (self.initial.config.get_text_config(), "student"), (self.weak.config.get_text_config(), "teacher")

    @torch.no_grad()
    def read(self, batch: Batch, met: Places, labels: Tensor, outcomes: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return what the student gave to its trained tokens (N,) at first, and the weak model to the teacher's (M,).

        Args:
            labels: (M,) the teacher's tokens.
            outcomes: tokens of the student's and of the teacher's vocabulary.
        """
        assert batch.other is not None
        trained, device = batch.trained(), batch.input_ids.device
        own = run(self.initial, self.initial_head, batch).hidden[:, :-1][trained.rows]
        theirs = run(self.weak, self.weak_head, batch.other.batch()).hidden
        at = theirs[met.teacher_rows.to(device), met.teacher_positions.to(device) - 1]
        first = realised(own, self.initial_head, trained.labels, who="student", num_outcomes=outcomes[0])
        weak = realised(at, self.weak_head, labels, who="weak reference", num_outcomes=outcomes[1])
        return first.logp, weak.logp


def references(
    pair: Pair, student_model: Any, teacher_model: Any, *, weak_reference: str | None = None
) -> References | None:
    """Return the models that are read beside teacher and student; None without a weak one.

    Args:
        weak_reference: MODEL with the teacher's tokenizer: a small one of its family.

    Raises:
        UserError: one with another tokenizer, or that cannot be loaded.
    """
    if weak_reference is None:
        return None
    found = same_vocabulary(load_tokenizer(weak_reference), pair.teacher.tokenizer)
    if not found.same:
        raise UserError(
            f"opd_scalar: the weak reference {weak_reference} has another tokenizer than the teacher: {found.why}"
        )
    dtype = str(teacher_model.dtype).removeprefix("torch.")
    weak = load_model(weak_reference, dtype=dtype).to(student_model.device)
    initial = copy.deepcopy(student_model)
    for model in (weak, initial):
        model.requires_grad_(False).eval()
    return References(weak, read_head(weak, "weak reference"), initial, read_head(initial, "student"))
