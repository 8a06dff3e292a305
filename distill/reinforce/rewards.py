"""What a completion is worth: a value and a reason from each reward function, and their weighted sum.

The functions themselves are the caller's (`teachers.rewards`); here is what they are given and what they give back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from distill.reasoning import split_reasoning
from distill.records import Prompt, Trace, trace_uid


class Answer(NamedTuple):
    """A completion that a student wrote.

    Attributes:
        question: the prompt and its gold answer.
        text: what it wrote, beginning with what the chat template opened; without the end token.
        ids: its tokens, the end token included.
        num_prompt_tokens: of the question.
        ended: whether it came to its end token.
        number: its place among the answers to the question.
        seed: of the run.
    """

    question: Prompt
    text: str
    ids: Sequence[int]
    num_prompt_tokens: int
    ended: bool
    number: int
    seed: int


class Reward(NamedTuple):
    """One function's opinion: None where it has none, which counts neither for nor against; and why."""

    value: float | None
    reason: str = ""


def trace_of(answer: Answer, *, author: str) -> Trace:
    """Return a completion as verifiers, reward functions and viewers know it."""
    prompt = answer.question
    parts = split_reasoning(answer.text, required=False)
    return Trace(
        uid=trace_uid(prompt.uid, author, {}, answer.number),
        prompt_uid=prompt.uid,
        messages=prompt.messages,
        completion=answer.text,
        reasoning=parts.reasoning,
        answer=parts.answer,
        finish_reason="stop" if answer.ended else "length",
        num_prompt_tokens=answer.num_prompt_tokens,
        num_completion_tokens=len(answer.ids),
        sample_index=answer.number,
        seed=answer.seed,
        teacher=author,
        backend="rollouts",
        gold=prompt.gold,
        source=prompt.source,
        meta=prompt.meta,
    )


class Scorer(Protocol):
    """Reward functions with weights.

    Attributes:
        weights: reward -> weight, in the order of the columns.
        calls: verdicts asked of verifiers so far.
    """

    weights: Mapping[str, float]
    calls: int

    def __call__(self, answers: Sequence[Answer], *, group: int) -> list[list[Reward]]:
        """Return a row per answer, a reward per function; answers to one question come `group` at a time."""
        ...


def totals(rewards: Sequence[Sequence[Reward]], weights: Sequence[float]) -> np.ndarray:
    """Return each answer's weighted sum, (N,) float64; NaN where no function has an opinion.

    A function without an opinion adds nothing: a missing gold answer is neither right nor wrong.

    Raises:
        ValueError: a function returned a value that is not finite.
    """
    sums = np.full(len(rewards), math.nan)
    for row, opinions in enumerate(rewards):
        known = [(weight, each.value) for weight, each in zip(weights, opinions, strict=True) if each.value is not None]
        if any(not math.isfinite(value) for _, value in known):
            raise ValueError(f"a reward is not finite: {[each.value for each in opinions]}")
        if known:
            sums[row] = sum(weight * value for weight, value in known)
    return sums
