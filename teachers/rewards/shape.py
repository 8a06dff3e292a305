"""Rewards for the form of an answer: its reasoning tags, its end, and what it says twice."""

from __future__ import annotations

from distill.errors import UserError
from distill.reasoning import split_reasoning
from distill.records import Trace
from distill.reinforce.rewards import Reward


def format(trace: Trace) -> Reward:
    """Return 1 for one `<think>...</think>` at the beginning and an answer after it, else 0 with what is wrong.

    DeepSeek-R1 (arXiv 2501.12948, 2.2.2). An empty answer and a second pair of tags are wrong, too.
    """
    fault = split_reasoning(trace.completion, required=True).fault
    return Reward(1.0 if fault is None else 0.0, fault or "")


def soft_overlong(trace: Trace, *, limit: int, cache: int | None = None) -> Reward:
    """Return 0 up to `limit - cache` tokens, then down in a line to -1 at `limit` (DAPO, arXiv 2503.14476, eq. 13).

    Args:
        limit: most tokens of a completion; the run's `max_completion_length` unless said otherwise.
        cache: tokens before it in which the penalty grows; a fifth of it, as DAPO's 4096 of 20 480, unless given.

    Raises:
        UserError: `cache` is not between 1 and `limit`.
    """
    room = max(1, limit // 5) if cache is None else cache
    if not 1 <= room <= limit:
        raise UserError(f"soft_overlong: cache must be from 1 to {limit}, the most tokens of a completion, not {cache}")
    over = trace.num_completion_tokens - (limit - room)
    return Reward(0.0) if over <= 0 else Reward(-min(1.0, over / room), f"{trace.num_completion_tokens} tokens")


def repetition(trace: Trace, *, ngram: int = 3, penalty: float = 1.0) -> Reward:
    """Return minus `penalty` times the share of n-grams of words that came before (Yeo et al., arXiv 2502.03373).

    Args:
        ngram: words of an n-gram.
        penalty: what a text that only repeats itself loses.

    Raises:
        UserError: `ngram` below 1 or a negative penalty.
    """
    if ngram < 1 or penalty < 0:
        raise UserError(f"repetition: ngram must be 1 or more and penalty 0 or more, not {ngram} and {penalty}")
    words = trace.completion.lower().split()
    grams = [tuple(words[at : at + ngram]) for at in range(len(words) - ngram + 1)]
    share = 1.0 - len(set(grams)) / len(grams) if grams else 0.0
    return Reward(-penalty * share, f"{share:.0%} of its {ngram}-grams came before" if share else "")
