"""Who votes for the same answer: the classes that `maj@k` counts, for wrong answers too.

Right answers are one class, since each equals the gold. Wrong answers are classed among themselves, so that 1/2 and
0.5 outvote a right answer together. Only `math` needs that: what the other verifiers read (a letter, a program) is
equal where it is written alike. It is asked only where it can change the outcome.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from distill.evaluate import gave_answer, is_right
from distill.progress import Meter, say
from distill.records import Trace
from teachers.verifiers.pool import VerifierPool


def wrong_classes(samples: Iterable[Trace], verifier: str, limits: Mapping[str, Any]) -> tuple[dict[str, str], int]:
    """Return the class of wrong answers by uid, and of how many questions the answers could not be compared in time.

    Those questions have no classes: there an answer is what the verifier read, letter by letter. That can only help
    the right answer, so it is counted and said.

    Args:
        samples: every sample of every question, judged.
        verifier: that judged them.
        limits: `workers` and `limit_seconds` of the pool.
    """
    groups: dict[str, list[Trace]] = {}
    for trace in samples if verifier == "math" else ():
        groups.setdefault(trace.prompt_uid, []).append(trace)
    open_questions = list(_undecided(groups.values()))
    if not open_questions:
        return {}, 0
    classes: dict[str, str] = {}
    unclassed = 0
    with (
        VerifierPool("teachers.exams.equal_answers:equal_answers", **limits) as pool,
        Meter("equal answers", len(open_questions)) as meter,
    ):
        for _, traces, verdicts in pool.judge_groups(enumerate(open_questions)):
            found = {t.uid: v.predicted for t, v in zip(traces, verdicts, strict=True) if v.predicted is not None}
            unclassed += not found  # the worker was killed, or could not go on: all or none
            classes |= found
            meter.advance()
    if unclassed:
        say(
            f"maj@k: the wrong answers of {unclassed} questions could not be compared in time and count by their text; "
            "run again with more --verifier-seconds"
        )
    return classes, unclassed


def _undecided(groups: Iterable[Sequence[Trace]]) -> Iterator[tuple[Trace, ...]]:
    """Yield the wrong answers of each question where right ones stand against as many wrong ones, written differently.

    With no right answer the majority is wrong whatever the classes; with fewer wrong answers it is right.
    """
    for group in groups:
        right = sum(is_right(trace) for trace in group)
        wrong = tuple(trace for trace in group if gave_answer(trace) and not is_right(trace))
        if 0 < right <= len(wrong) and len({trace.predicted for trace in wrong}) > 1:
            yield tuple(sorted(wrong, key=lambda trace: trace.sample_index))
