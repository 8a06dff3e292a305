"""What the tests of reinforcement share: sums as questions, and a reward that a tiny model can learn within seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distill.material import Rewarded
from distill.records import Prompt
from distill.reinforce.rewards import Answer, Reward


class LetterShare:
    """The share of a completion's letters that are upper case, as a user's reward may be."""

    def __init__(self) -> None:
        self.weights: Mapping[str, float] = {"upper": 1.0}
        self.calls = 0

    def __call__(self, answers: Sequence[Answer], *, group: int) -> list[list[Reward]]:
        self.calls += len(answers)
        shares = [sum(letter.isupper() for letter in each.text) / max(1, len(each.text)) for each in answers]
        return [[Reward(share, f"{share:.0%} upper case")] for share in shares]


def rewarded(count: int = 24) -> Rewarded:
    """Questions and the reward."""
    prompts = [
        Prompt(messages=({"role": "user", "content": f"{i}+{i % 5}?"},), gold=str(i + i % 5), source=f"sums:{i}")
        for i in range(count)
    ]
    return Rewarded(prompts, LetterShare())
