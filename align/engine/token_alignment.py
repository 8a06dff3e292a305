"""What training asks of two tokenizers (`distill.alignment.Alignment`): pairs of sequences, and the modes that compare.

Everything about the pair of tokenizers is worked out here once. How texts meet is `align.pairing`, what is compared
there `align.engine.losses`, and which method does it `align.methods`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.engine.losses import loss_modes
from align.methods import METHODS, Pair
from align.pairing import Side, pair, side, teacher_prompt
from align.specials import special_pairs
from distill.batch import Batch, collate_others
from distill.losses import LossMode
from distill.records import Message
from distill.render import Example, Other
from distill.tables import lookup


@dataclass(frozen=True)
class TokenAlignment:
    """A student's and a teacher's tokenizer, and the method that compares across them.

    Attributes: see `distill.alignment.Alignment`.
    """

    name: str
    why: str
    student: Side
    teacher: Side

    @property
    def teacher_tokenizer(self) -> Any:
        """What the teacher's ids belong to."""
        return self.teacher.tokenizer

    @property
    def labelled(self) -> bool:
        """Whether the method teaches the text's own tokens, too."""
        return lookup(METHODS, self.name, "alignment").labelled

    @cached_property
    def specials(self) -> Mapping[int, int]:
        """Student id -> teacher id of special tokens that mean the same."""
        return special_pairs(self.student.tokenizer, self.teacher.tokenizer)

    @cached_property
    def modes(self) -> Mapping[str, LossMode]:
        """What stands in for the loss modes that ask a teacher."""
        return loss_modes(lookup(METHODS, self.name, "alignment"), Pair(self.student, self.teacher, self.specials))

    def pair(
        self, example: Example, conversation: list[Message] | tuple[str, str], *, sampled: np.ndarray | None = None
    ) -> Example | None:
        """Return an example with the teacher's tokens of the same text: see `Alignment.pair`."""
        prompt = teacher_prompt(self.teacher, conversation) if sampled is None else ()
        given = None if sampled is None else sampled.tolist()
        other = pair(self.student, self.teacher, example, prompt, specials=self.specials, sampled=given)
        return None if other is None else replace(example, other=other)

    def pair_rollouts(self, rolled: Batch, before: Batch, *, teacher_length: int | None = None) -> tuple[Batch, Tensor]:
        """Give a batch that the student has written the teacher's tokens of it: see `Alignment.pair_rollouts`."""
        assert before.other is not None, "every example of an alignment's data was paired"
        ids, weights = rolled.input_ids.cpu().numpy(), rolled.weights.cpu().numpy()
        prompts, begins = before.other.input_ids.tolist(), before.other.begins.tolist()
        others, in_part = [], 0
        for row, length in enumerate(rolled.attention_mask.sum(1).tolist()):
            begin = int(np.flatnonzero(weights[row])[0])
            example = Example(ids[row, :length], weights[row, :length], begin=begin)
            other = self._reread(example, prompts[row][: begins[row]], teacher_length)
            in_part += int((other.spans[:, 1] - other.spans[:, 0]).sum()) < int((example.weights > 0).sum())
            others.append(other)
        counted = torch.tensor([in_part, len(others)], dtype=torch.float64)
        device = rolled.input_ids.device
        return replace(rolled, other=collate_others(others, pad_id=0)).to(device), counted

    def _reread(self, example: Example, prompt: Sequence[int], most: int | None) -> Other:
        other = pair(self.student, self.teacher, example, prompt, specials=self.specials)
        if other is None:  # its mass still counts, and the teacher says nothing
            return Other(np.array(prompt, np.int32), len(prompt), np.zeros((0, 4), np.int32))
        return other.cut(teacher=most) if most is not None and len(other.input_ids) > most else other


def token_alignment(
    name: str,
    why: str,
    *,
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    student_stops: Collection[int],
    teacher_stops: Collection[int],
) -> TokenAlignment:
    """Return the alignment of two tokenizers.

    Args:
        name: of `METHODS`.
        why: one line: what decided for it.
        student_stops, teacher_stops: the ids that end an answer, of each side's own.

    Raises:
        UserError: an unknown method, or tokenizers that cannot be read as bytes.
    """
    lookup(METHODS, name, "alignment")
    return TokenAlignment(name, why, side(student_tokenizer, student_stops), side(teacher_tokenizer, teacher_stops))
