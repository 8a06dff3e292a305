"""`math`: is the final answer equal to the gold, as mathematics? By math-verify (gold first, answer second).

math-verify's own time limits use signals, which die outside a main thread; they are switched off, and the pool's
wall-clock limit on the whole process holds instead.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.metadata import version
from typing import Any

# Here and not inside a function: it takes seconds, and no verdict's time limit should pay for it.
from math_verify import parse, verify

from distill.records import Trace, Verdict

NAME = "math"
RULES = 1  # ours, which change a verdict where math-verify does not

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns about the limits we replaced


def math(trace: Trace) -> Verdict:
    """Compare the trace's final answer (after its reasoning) with its gold.

    A gold that cannot be read, or no gold, gives no score: it never counts as correct.
    """
    if trace.gold is None:
        return Verdict(verifier=NAME, version=_version(), score=None, reason="no gold")
    gold = _gold(trace.gold)
    if not gold:
        return Verdict(verifier=NAME, version=_version(), score=None, reason="unreadable gold")
    answer = _answer(trace.answer)
    if not answer:
        return Verdict(verifier=NAME, version=_version(), score=0.0, reason="no answer found")
    predicted = str(answer[-1])
    right = verify(gold, answer, timeout_seconds=None)
    reason = "equal" if right else "differs"
    return Verdict(verifier=NAME, version=_version(), score=float(right), reason=reason, predicted=predicted)


@lru_cache(maxsize=1)
def _version() -> str:
    return f"rules {RULES}, math-verify {version('math-verify')}"


@lru_cache(maxsize=4096)
def _gold(text: str) -> list[Any]:
    """Return the gold's readings, none when it is not a whole mathematical expression (`\\frac{`)."""
    text = text.replace("\\$", "")  # an escaped dollar sign is a currency, not a delimiter
    parsed = list(parse(text if "$" in text else f"${text}$", parsing_timeout=None))
    return parsed if any(not isinstance(reading, str) for reading in parsed) else []


def _answer(text: str) -> list[Any]:
    return list(parse(text, parsing_timeout=None))
