"""Verifiers: functions of a trace that say how right it is.

A verifier is `f(trace, *, ...) -> Verdict` with a score in [0, 1], or None when no opinion could be formed; it must
survive any text. Its keyword-only arguments are its options. A function with the attribute `unit = "prompt"` judges all
samples of one prompt together: `f(traces, *, ...) -> verdicts`, tuples of one length. A verifier runs in a worker
process with a wall-clock limit (pool.py), never in the caller; one that asks a model is run by teachers/judging.py.
"""

from __future__ import annotations

VERIFIERS = {
    "math": "teachers.verifiers.math_answer:math",
    "choice": "teachers.verifiers.choice:choice",
    "code_tests": "teachers.verifiers.code_tests:code_tests",
    "reasoning-gym": "teachers.verifiers.reasoning_gym:reasoning_gym",
    "self-consistency": "teachers.verifiers.self_consistency:self_consistency",
    "judge": "teachers.verifiers.judge:judge",
    "universal-self-consistency": "teachers.verifiers.universal_self_consistency:universal_self_consistency",
}
JUDGES = {"judge", "universal-self-consistency"}  # need a model
PROMPT_UNIT = {"self-consistency"}  # judge all samples of a prompt together
