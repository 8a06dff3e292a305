"""The process a verifier runs in: `python -m teachers.verifiers.worker NAME MEMORY_BYTES OPTIONS_JSON`.

One JSON line comes in for each job, with its traces; two go out: that the job was read, and its verdicts.
The process may be killed at any moment by its pool; that is the point of it. Its memory is limited, so that `9**9**9`
ends as an error here and not as a dead machine.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from distill.errors import UserError
from distill.records import Trace, Verdict
from distill.tables import bind, lookup
from teachers.verifiers import JUDGES, VERIFIERS


def open_verifier(name: str, options: Mapping[str, Any]) -> Callable[[Sequence[Trace]], list[Verdict]]:
    """Return the function that judges one job: the samples of one prompt together, or each trace by itself.

    Raises:
        UserError: an unknown name, one that asks a model, or an option that the verifier does not take.
    """
    if name in JUDGES:
        raise UserError(f"the verifier {name!r} asks a model and cannot run in a worker process")
    function = lookup(VERIFIERS, name, "verifier")
    verifier = bind(function, options, f"verifier {name!r}")
    if getattr(function, "unit", "trace") == "prompt":
        return lambda traces: judge_group(verifier, name, traces)
    return lambda traces: [judge(verifier, name, trace) for trace in traces]


def judge(verifier: Callable[[Trace], Verdict], name: str, trace: Trace) -> Verdict:
    """Run a verifier on any text: whatever it raises, or returns amiss, becomes a verdict without a score."""
    try:
        return _checked(verifier(trace))
    except (Exception, RecursionError, MemoryError) as error:  # user functions and parsers may raise anything
        return _failed(name, error)


def judge_group(
    verifier: Callable[[tuple[Trace, ...]], tuple[Verdict, ...]], name: str, traces: Sequence[Trace]
) -> list[Verdict]:
    """Run a verifier of whole prompts; where it fails, no trace of the prompt has a score."""
    try:
        verdicts = [_checked(verdict) for verdict in verifier(tuple(traces))]
        if len(verdicts) != len(traces):
            raise ValueError(f"returned {len(verdicts)} verdicts for {len(traces)} traces")
    except (Exception, RecursionError, MemoryError) as error:
        return [_failed(name, error)] * len(traces)
    return verdicts


def _checked(verdict: Verdict) -> Verdict:
    if not isinstance(verdict, Verdict):
        raise TypeError(f"returned {type(verdict).__name__}, not a Verdict")
    if verdict.score is not None and not 0 <= verdict.score <= 1:
        raise ValueError(f"score {verdict.score} outside [0, 1]")
    json.dumps(asdict(verdict))  # what cannot be handed over is refused here and not in the middle of a line
    return verdict


def _failed(name: str, error: BaseException) -> Verdict:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return Verdict(verifier=name, version="", score=None, reason=reason)


def main() -> None:
    """Serve verdicts until the input ends."""
    name, memory, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    # What a library prints must not land between the verdicts.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path.insert(0, os.getcwd())  # where a user's own `pkg.mod:function` lives
    try:
        verifier = open_verifier(name, options)
    except UserError as error:
        print(json.dumps({"refused": str(error)}), file=replies, flush=True)
        return
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin.buffer:
        traces = [Trace.from_json(row) for row in json.loads(line)["traces"]]
        print(json.dumps({"read": len(traces)}), file=replies, flush=True)
        verdicts = verifier(traces)
        print(json.dumps({"verdicts": [asdict(verdict) for verdict in verdicts]}), file=replies, flush=True)


if __name__ == "__main__":
    main()
