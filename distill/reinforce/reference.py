"""The log-probabilities that a policy gradient compares with: the student's own at sampling time, and a reference's.

The reference is the student as the run found it: a frozen copy, or, with LoRA, the student without its adapters, which
costs no memory. It can be made the present student every so many steps (DeepSeek-R1 does every 400).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from distill.batch import Batch
from distill.drawn import drawn_logps
from distill.forward import at_rest, read_head, run
from distill.head import Head
from distill.lora import is_lora


class Readers:
    """Reads completions with the student or the reference, without gradients.

    Args:
        student: the model itself, before anything is trained.
        head: its head.
        num_outcomes: tokens of the vocabulary.
        temperature: that completions are drawn at.
        reference: whether a reference is read at all.
        sync_steps: the reference becomes the student every so many steps; None for never.
        autocast: the trainer's context.
    """

    def __init__(
        self,
        student: Any,
        head: Head,
        *,
        num_outcomes: int,
        temperature: float,
        reference: bool,
        sync_steps: int | None,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.student, self.head = student, head
        self.num_outcomes, self.temperature, self.autocast = num_outcomes, temperature, autocast
        self.sync_steps = sync_steps if reference else None
        self.adapted = is_lora(student)
        self.reference: Any = None
        assert not (reference and self.adapted and sync_steps), "refused with the recipe"
        if reference and not self.adapted:
            self.reference = copy.deepcopy(student).requires_grad_(False).eval()
            self.reference_head = read_head(self.reference, "reference")

    def __call__(self, batch: Batch, by_reference: bool) -> Tensor:
        """Return (B, T) the log-probability of every trained token of a batch, in nats, 0 elsewhere."""
        apart = by_reference and self.reference is not None
        model, head = (self.reference, self.reference_head) if apart else (self.student, self.head)
        unadapted = self.student.disable_adapter() if by_reference and self.adapted else nullcontext()
        with torch.no_grad(), self.autocast(), unadapted, at_rest(model):
            forward = run(model, head, batch)
            logps, _ = drawn_logps(forward, batch, num_outcomes=self.num_outcomes, temperature=self.temperature)
        read = torch.zeros(batch.input_ids.shape, dtype=torch.float32, device=batch.input_ids.device)
        read[:, 1:][batch.trained().rows] = logps.float()
        return read

    def after(self, step: int) -> None:
        """Make the reference the present student where `step` says so."""
        if self.sync_steps is not None and step and step % self.sync_steps == 0:
            self.reference.load_state_dict(self.student.state_dict())

    def state(self) -> dict[str, Tensor]:
        """Return the reference's weights where they are no longer those of the first student."""
        return {} if self.sync_steps is None else dict(self.reference.state_dict())

    def restore(self, state: dict[str, Tensor]) -> None:
        """Undo `state`."""
        if state:
            self.reference.load_state_dict(state)
