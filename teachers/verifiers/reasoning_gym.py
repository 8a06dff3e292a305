"""`reasoning-gym`: what does the task's own scorer give the answer? (PyPI `reasoning-gym`, arXiv 2505.24760.)

The scorers differ: some give parts for answers that are nearly right, so the score is passed on as it is. The answer is
what a person would take for it: the last `<answer>...</answer>`, else the last `\\boxed{...}`, else the better of the
whole text and its last line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from distill.errors import UserError
from distill.records import Trace, Verdict

NAME = "reasoning-gym"
RULES = 1
LABEL = re.compile(r"[*_ ]{0,4}(?:the )?(?:final )?answer(?: is)?[ ]?:?[*_ ]{0,4}", re.IGNORECASE)


def gym() -> Any:
    """Return the package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(f"reasoning-gym is not installed: pip install reasoning-gym ({error})") from error
    return reasoning_gym


def reasoning_gym(trace: Trace) -> Verdict:
    """Score the trace's answer against the problem that `meta["reasoning_gym"]` holds."""
    found = trace.meta.get("reasoning_gym")
    if not (isinstance(found, Mapping) and isinstance(found.get("entry"), Mapping) and "task" in found):
        return Verdict(verifier=NAME, version=_version(), score=None, reason="no reasoning-gym entry")
    texts = list(dict.fromkeys(text for text in answers_of(trace.answer) if text))
    if not texts:
        return Verdict(verifier=NAME, version=_version(), score=0.0, reason="no answer found")
    scored = [(score(found["task"], found["entry"], text), text) for text in texts]
    best, predicted = max(scored, key=lambda pair: pair[0])
    reason = "equal" if best == 1.0 else f"scored {best:.3g}"
    return Verdict(verifier=NAME, version=_version(), score=best, reason=reason, predicted=predicted[:1000])


def score(task: str, entry: Mapping[str, Any], answer: str) -> float:
    """Return what the task's scorer gives an answer, in [0, 1]."""
    return float(_scorer(task)(answer, dict(entry)))


def as_json(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return an entry as it is after it was written as JSON and read again; None where it cannot be."""
    try:
        return json.loads(json.dumps(entry, allow_nan=False))
    except (TypeError, ValueError):
        return None


def answers_of(text: str) -> Iterator[str]:
    """Yield the texts that may be meant as the answer; where it is marked, that one alone."""
    from teachers.prompts import last_boxed

    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    boxed = last_boxed(text)
    if start >= 0:
        yield text[start + len("<answer>") : end].strip()
    elif boxed:
        yield boxed
    else:
        whole = text.strip()
        yield whole
        last = whole.rpartition("\n")[2]
        marked = LABEL.match(last)
        yield (last[marked.end() :] if marked else last).strip(" *_`")


@lru_cache(maxsize=16)
def _scorer(task: str) -> Any:
    return gym().factory.get_score_answer_fn(task)


@lru_cache(maxsize=1)
def _version() -> str:
    return f"rules {RULES}, reasoning-gym {version('reasoning-gym')}"
