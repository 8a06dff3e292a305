"""The questions of a reinforcement run as the student reads them, and the order in which they come.

The order is one endless stream that the seed decides: all questions in random order, then all in another. Rank r of R
takes every R-th of it, so no question is asked twice before every other has been asked once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.errors import UserError
from distill.records import Prompt, content_hash
from distill.render import render_prompt

ORDER = 3  # keeps this random stream apart from those of `distill.rollouts`


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, its tokens, and what the chat template already opened of the answer."""

    prompt: Prompt
    ids: list[int]
    prefill: str


class Questions:
    """Rendered questions in the order of a seed.

    Args:
        prompts: each once.
        tokenizer: the student's.
        seed: of the run.

    Raises:
        UserError: no question, or no chat template.
    """

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Any, *, seed: int) -> None:
        if not prompts:
            raise UserError("there is no question to learn from")
        self.seed = seed
        self.items: list[Question] = []
        for prompt in prompts:
            text, prefill = render_prompt(tokenizer, prompt.messages)
            self.items.append(
                Question(prompt, list(tokenizer.encode(text, add_special_tokens=False, verbose=False)), prefill)
            )
        self.content = content_hash([[prompt.uid, prompt.gold] for prompt in prompts])
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.items)

    def at(self, place: int) -> Question:
        """Return the question at a place of the endless stream."""
        epoch, within = divmod(place, len(self.items))
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([ORDER, self.seed, epoch]).permutation(len(self.items))
            self._epoch = epoch
        return self.items[self._permutation[within]]
