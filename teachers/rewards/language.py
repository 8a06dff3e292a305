"""`language_consistency`: the share of the reasoning that is in the language of the question (DeepSeek-R1, 2.3.2)."""

from __future__ import annotations

from distill.records import Trace
from distill.reinforce.rewards import Reward
from teachers.filters.style import foreign_share


def language_consistency(trace: Trace) -> Reward:
    """Return the share of words in a script that the question has, too; code does not count.

    Latin and Greek letters are at home everywhere, mathematics being written in them, so English inside a Chinese
    reasoning is not seen. The reasoning is looked at where there is one, else the whole answer.
    """
    text = trace.reasoning or trace.completion
    share = foreign_share(text, [message["content"] for message in trace.messages])
    return Reward(1.0 - share, f"{share:.0%} of the words are in another script" if share else "")
