"""Verifiers: functions of a trace that say how right it is.

A verifier is `f(trace, *, ...) -> Verdict` with a score in [0, 1], or None when no opinion could be formed; it must
survive any text. It runs in a worker process with a wall-clock limit (see pool.py), never in the caller.
"""

from __future__ import annotations

VERIFIERS = {
    "math": "teachers.verifiers.math_answer:math",
}
