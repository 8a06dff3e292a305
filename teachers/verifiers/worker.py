"""The process a verifier runs in: `python -m teachers.verifiers.worker NAME MEMORY_BYTES`.

One JSON trace per line comes in, one JSON verdict per line goes out. The process may be killed at any moment by its
pool; that is the point of it. Its memory is limited, so that `9**9**9` ends as an error here and not as a dead machine.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict

from distill.errors import UserError
from distill.records import Trace, Verdict
from distill.tables import lookup
from teachers.verifiers import VERIFIERS


def judge(verifier: Callable[[Trace], Verdict], name: str, trace: Trace) -> Verdict:
    """Run a verifier on any text: whatever it raises, or returns amiss, becomes a verdict without a score."""
    try:
        verdict = verifier(trace)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"returned {type(verdict).__name__}, not a Verdict")
        if verdict.score is not None and not 0 <= verdict.score <= 1:
            raise ValueError(f"score {verdict.score} outside [0, 1]")
        json.dumps(asdict(verdict))  # what cannot be handed over is refused here and not in the middle of a line
    except (Exception, RecursionError, MemoryError) as error:  # user functions and parsers may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Verdict(verifier=name, version="", score=None, reason=reason)
    return verdict


def main() -> None:
    """Serve verdicts until the input ends."""
    name, memory = sys.argv[1], int(sys.argv[2])
    # What a library prints must not land between the verdicts.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path.insert(0, os.getcwd())  # where a user's own `pkg.mod:function` lives
    try:
        verifier = lookup(VERIFIERS, name, "verifier")
    except UserError as error:
        print(json.dumps({"refused": str(error)}), file=replies, flush=True)
        return
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin.buffer:
        verdict = judge(verifier, name, Trace.from_json(json.loads(line)))
        print(json.dumps(asdict(verdict)), file=replies, flush=True)


if __name__ == "__main__":
    main()
