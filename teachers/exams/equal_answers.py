"""Which of a question's answers are one: what a pool's worker runs for `teachers.exams.votes`.

The classes are those of the verifier `self-consistency` (teachers/verifiers/self_consistency.py); nothing is compared
here in another way. Its own process and time limit are why it is a verifier of whole prompts: a computer-algebra
system on model output may hang.
"""

from __future__ import annotations

from distill.records import Trace, Verdict
from teachers.verifiers.self_consistency import Answer, equivalence_classes, own_answer


def equal_answers(traces: tuple[Trace, ...]) -> tuple[Verdict, ...]:
    """Return a verdict without a score for each answer; `predicted` is alike where two answers are equal."""
    answers = [own_answer(trace) or _as_text(trace.predicted or "") for trace in traces]
    classes = equivalence_classes(answers)
    return tuple(
        Verdict(verifier="equal-answers", version="1", score=None, predicted=f"class {classes[answer]}")
        for answer in answers
    )


equal_answers.unit = "prompt"  # type: ignore[attr-defined]


def _as_text(text: str) -> Answer:
    """Return an answer that is a text and no mathematics: what the verifier read where self-consistency reads none."""
    return Answer(text, (), (), text)
