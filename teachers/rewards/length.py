"""`length`: among right answers to one question, the shorter is better (Kimi k1.5, arXiv 2501.12599, 2.3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from distill.records import Trace
from distill.reinforce.rewards import Reward


def length(traces: Sequence[Trace], right: Sequence[float | None]) -> list[Reward]:
    """Return `0.5 - (length - shortest) / (longest - shortest)` for right answers, and at most 0 for others.

    Args:
        traces: the answers to one question.
        right: what the verifier said of them; None where it had no opinion, and then this has none either.
    """
    lengths = [trace.num_completion_tokens for trace in traces]
    shortest, longest = min(lengths), max(lengths)
    rewards = []
    for tokens, score in zip(lengths, right, strict=True):
        if score is None:
            rewards.append(Reward(None, "not judged"))
        elif longest == shortest:
            rewards.append(Reward(0.0, "all are equally long"))
        else:
            value = 0.5 - (tokens - shortest) / (longest - shortest)
            rewards.append(Reward(value if score >= 1 else min(0.0, value), f"{tokens} tokens"))
    return rewards


length.unit = "group"  # type: ignore[attr-defined]
