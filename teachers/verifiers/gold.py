"""What a verifier needs of a prompt, and whether the gold would pass it: asked before any teacher time is spent.

A gold that cannot be read, or tests that their own solution fails, can never be verified: such prompts are set aside.
A user's own verifier is not checked so: only its author knows what an answer looks like to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from distill.errors import UserError
from distill.records import Prompt, Trace
from distill.tables import lookup
from teachers.verifiers import VERIFIERS

if TYPE_CHECKING:
    from teachers.verifiers.pool import VerifierPool

GOLD = ("gold", "no gold answer: needs answer, gold or solution")
TESTS = ("tests", "no tests: needs test and entry_point, test_list, or verification_info")
ENTRY = ("reasoning_gym", "no reasoning-gym entry: needs prompts from reasoning-gym:TASK")
# In the order in which `auto` looks for them: a row of multiple choice has a gold too.
NEEDS: dict[str, tuple[str, str]] = {
    "code_tests": TESTS,
    "reasoning-gym": ENTRY,
    "choice": GOLD,
    "math": GOLD,
}


def needs(verifier: str | None) -> str | None:
    """Return what a prompt must have for a verifier: `gold`, or a key of `meta`; None where nothing is needed."""
    return NEEDS[verifier][0] if verifier in NEEDS else None


def missing(prompt: Prompt, verifier: str | None) -> str | None:
    """Return why a verifier cannot judge answers to the prompt, or None where it can."""
    need = needs(verifier)
    if verifier is None or need is None:
        return None
    return None if (prompt.gold is not None if need == "gold" else need in prompt.meta) else NEEDS[verifier][1]


def gold_as_answer(prompt: Prompt, verifier: str) -> str | None:
    """Return the prompt's gold as a model would write it; None where there is none, or nobody knows how it looks."""
    if verifier == "code_tests":
        tests = prompt.meta.get("tests")
        solution = tests.get("solution") if isinstance(tests, dict) else None
        return f"````python\n{solution}\n````" if solution else None
    if prompt.gold is None:
        return None
    if verifier == "reasoning-gym":
        return f"<answer>{prompt.gold}</answer>"
    return f"\\boxed{{{prompt.gold}}}" if verifier in ("math", "choice") else None


def check_golds(prompts: list[Prompt], pool: VerifierPool) -> tuple[list[Prompt], list[tuple[Prompt, str]]]:
    """Judge every gold as if a model had answered it: what does not score 1 can never be verified.

    Returns:
        The prompts whose gold passes or cannot be checked, in order, and the others with the reason.
    """
    faults: dict[str, str] = {}
    answers = ((prompt, gold_as_answer(prompt, pool.name)) for prompt in prompts)
    as_traces = ((prompt.uid, _answered(prompt, text)) for prompt, text in answers if text is not None)
    for uid, _, verdict in pool.judge_all(as_traces):
        if verdict.score != 1.0:
            faults[uid] = verdict.reason
    good = [prompt for prompt in prompts if prompt.uid not in faults]
    return good, [(prompt, faults[prompt.uid]) for prompt in prompts if prompt.uid in faults]


def _answered(prompt: Prompt, text: str) -> Trace:
    return Trace(
        uid=prompt.uid,
        prompt_uid=prompt.uid,
        messages=prompt.messages,
        completion=text,
        reasoning="",
        answer=text,
        finish_reason="stop",
        num_prompt_tokens=0,
        num_completion_tokens=0,
        sample_index=0,
        seed=0,
        teacher="gold",
        backend="gold",
        gold=prompt.gold,
        source=prompt.source,
        meta=dict(prompt.meta),
    )


def verifier_name(setting: str, prompts: Iterable[Prompt]) -> str | None:
    """Resolve `none`, and `auto`: by what the prompts have, None where they have nothing to compare with.

    Raises:
        UserError: an unknown name, or `auto` and prompts of several kinds.
    """
    if setting == "none":
        return None
    if setting == "auto":
        found = Counter(kind for prompt in prompts if (kind := _kind(prompt)) is not None)
        if len(found) > 1:
            listed = ", ".join(f"{count} {kind}" for kind, count in found.most_common())
            raise UserError(f"the prompts are for several verifiers ({listed}): name one by --verifier, or split them")
        return next(iter(found), None)
    if setting not in VERIFIERS and ":" not in setting:
        lookup(VERIFIERS, setting, "verifier")
    return setting


def _kind(prompt: Prompt) -> str | None:
    for verifier in NEEDS:
        if missing(prompt, verifier) is None and (verifier != "choice" or "choices" in prompt.meta):
            return verifier
    return None
