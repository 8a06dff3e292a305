"""From a recipe's settings to an `Experience`, and the stand-in for a data set that transformers' loop walks over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.config import TrainConfig
from distill.reinforce.experience import Experience
from distill.reinforce.journal import RolloutJournal
from distill.reinforce.questions import Questions
from distill.reinforce.recipes import Recipe
from distill.reinforce.rewards import Scorer
from distill.render import decode
from distill.rollouts import Rollouts


@dataclass(frozen=True, slots=True)
class Slots(Sequence[int]):
    """Places for completions: an epoch asks every question once, cut to whole optimizer steps, of which it has one."""

    number: int

    @classmethod
    def of(cls, questions: int, recipe: Recipe, rows: int) -> Slots:
        """Return the places of an epoch; `rows` are those of an optimizer step on all ranks."""
        return cls(max(1, questions * recipe.num_generations // rows) * rows)

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < self.number:
            raise IndexError(place)
        return place


class Places:
    """What collating places gives: a batch that says only how many completions belong in it."""

    def __init__(self, items: Sequence[int]) -> None:
        self.items = items

    def tensors(self) -> dict[str, Tensor]:
        """Return the places, (B,)."""
        return {"places": torch.tensor(list(self.items))}


def open_experience(
    config: TrainConfig,
    recipe: Recipe,
    questions: Questions,
    scorer: Scorer,
    *,
    tokenizer: Any,
    rollouts: Rollouts,
    alone: bool,
    world: int,
    rank: int,
) -> Experience:
    """Return what samples and rewards in a run.

    Args:
        alone: nothing but rewards teaches.
        world, rank: ranks of the run, and which this is.

    Raises:
        UserError: prompts that leave too little room, or an optimizer step without whole groups.
    """
    names = list(scorer.weights)
    return Experience(
        questions,
        scorer,
        rollouts,
        recipe,
        partial(decode, tokenizer),
        rows=config.per_device_train_batch_size,
        micro_batches=config.gradient_accumulation_steps,
        pad_id=rollouts.pad_id,
        world=world,
        rank=rank,
        alone=alone,
        rows_at_once=config.rollout_batch_size,
        journal=RolloutJournal(config.out, most=config.log_completions, names=names, author=config.student)
        if rank == 0
        else None,
    )
