"""`self-consistency`: the answer most samples of a prompt agree on is taken for right, where there is no gold.

Wang et al. 2022 (arXiv 2203.11171), with votes for *equivalence classes*: `1/2`, `0.5` and `\\frac{1}{2}` are one
answer. Two mathematical answers are equivalent when math-verify says so with either one as the gold (it is not
symmetric), and texts when they are equal up to case, white space and markup. Neither relation is transitive, so the
classes are the connected components: what equals a member belongs to the class. Components do not depend on the order
of the samples. Where a question has options, a letter is the answer, as `choice` reads it.

Agreement is not truth: a teacher may be wrong the same way every time. The share is in the reason, to be weighed.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from itertools import combinations
from typing import Any

# Here and not inside a function: they take seconds, and no verdict's time limit should pay for it.
import sympy
from math_verify import verify
from sympy.functions.combinatorial.factorials import CombinatorialFunction

from distill.errors import UserError
from distill.records import Trace, Verdict
from teachers.prompts import last_boxed
from teachers.verifiers.choice import chosen
from teachers.verifiers.math_answer import _answer as parse_answer
from teachers.verifiers.universal_self_consistency import silence

NAME, RULE = "self-consistency", 1
FEWEST = 2  # one answer that agrees with itself shows nothing

ANNOUNCED = re.compile(r"\banswer(?:\s+is\b|\s*[:=])[ \t:*_]*(?=\S)", re.IGNORECASE)
MARKUP = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|boxed)\s*\{([^{}]*)\}")
WORDS = re.compile(r"(?=.*[^\W\d_]{3})[^\W\d_]+(?:[\s,'-]+[^\W\d_]+)*")
MOST_MARKUP = 4  # one inside the other
MOST_POWER, MOST_SYMBOLIC_POWER = 10_000.0, 32.0  # exponents above take long to raise numbers, or sums, to
ENDLESS = (
    sympy.Sum,
    sympy.Product,
    sympy.Integral,
    sympy.Limit,
    sympy.Derivative,
)  # somebody would have to work it out
OPENING, CLOSING = ' \t*_`"$', ' \t*_`"$.,;:'  # no sign of a number or an expression: .5 is not 5, and 5! neither


@dataclass(frozen=True, slots=True)
class Answer:
    """A final answer: as text in its plainest form, and its readings as mathematics, none where it is a text only."""

    text: str
    kinds: tuple[str, ...]  # of the readings; they tell 12 from 12%, which math-verify writes alike
    readings: tuple[Any, ...] = field(compare=False)  # some cannot be hashed
    shown: str = field(compare=False)


def self_consistency(traces: tuple[Trace, ...], *, min_agreement: float = 0.0) -> tuple[Verdict, ...]:
    """Judge all samples of one prompt by the majority of their final answers; the verdicts stand in the given order.

    The winning class scores 1 and every other sample 0. A sample that failed, was cut off or has no answer does not
    vote. There is no score for anybody where the first place is tied, fewer than two samples vote, or the winning
    class's share is below `min_agreement`. The share is of all samples that did not fail: one cut off is a sample on
    which nobody agreed.

    Raises:
        UserError: `min_agreement` is no share.
    """
    if isinstance(min_agreement, bool) or not isinstance(min_agreement, int | float) or not 0 <= min_agreement <= 1:
        raise UserError(f"min_agreement is a share between 0 and 1, not {min_agreement!r}")
    silent = [silence(trace) for trace in traces]
    answers = [None if why else own_answer(trace) for trace, why in zip(traces, silent, strict=True)]
    classes = equivalence_classes(answer for answer in answers if answer is not None)
    votes: dict[int, int] = {}
    for answer in answers:
        if answer is not None:
            votes[classes[answer]] = votes.get(classes[answer], 0) + 1
    samples = sum(trace.error is None for trace in traces)
    undecided, winner = _outcome(votes, samples, min_agreement)

    def verdict(why: str | None, answer: Answer | None) -> Verdict:
        predicted = answer.shown if answer else None
        if undecided is not None:
            return _verdict(None, f"{why}; {undecided}" if why else undecided, predicted, min_agreement)
        if why is not None or answer is None:
            return _verdict(0.0, why or "no answer", predicted, min_agreement)
        own = votes[classes[answer]]
        reason = f"{own} of {samples} agree ({own / samples:.3f})"
        if classes[answer] == winner:
            return _verdict(1.0, reason, predicted, min_agreement)
        return _verdict(0.0, f"{reason}, the majority has {votes[winner]}", predicted, min_agreement)

    return tuple(verdict(why, answer) for why, answer in zip(silent, answers, strict=True))


self_consistency.unit = "prompt"  # type: ignore[attr-defined]


def _outcome(votes: dict[int, int], samples: int, min_agreement: float) -> tuple[str | None, int]:
    """Return why nobody wins, or None, and the winning class."""
    most = max(votes.values(), default=0)
    winners = [each for each, count in votes.items() if count == most]
    share = f"{most} of {samples} agree ({most / max(samples, 1):.3f})"
    if sum(votes.values()) < FEWEST:
        return f"{sum(votes.values())} of {samples} samples have an answer: no majority without {FEWEST}", -1
    if len(winners) > 1:
        return f"tie: {len(winners)} answers lead, {share} on each", -1
    if most / samples < min_agreement:
        return f"{share}, less than {min_agreement:g}", -1
    return None, winners[0]


def _verdict(score: float | None, reason: str, predicted: str | None, min_agreement: float) -> Verdict:
    asked = f", min_agreement {min_agreement:g}" if min_agreement else ""
    return Verdict(
        verifier=NAME,
        version=f"rule {RULE}, math-verify {_math_verify()}{asked}",
        score=score,
        reason=reason,
        predicted=predicted,
    )


@lru_cache(maxsize=1)
def _math_verify() -> str:
    return version("math-verify")


def own_answer(trace: Trace) -> Answer | None:
    """Read the final answer of a sample: the letter of an option where the question has options."""
    options = trace.meta.get("choices")
    if not isinstance(options, Mapping):
        return final_answer(trace.answer)
    letter = chosen(trace.answer, {str(key): str(text) for key, text in options.items()})
    return Answer(letter, (), (), letter) if letter else None


def final_answer(text: str) -> Answer | None:
    """Read the final answer out of what follows the reasoning; None where there is nothing to read."""
    readings = tuple(parse_answer(text))
    stated = plain_text(_statement(text))
    if WORDS.fullmatch(stated) or not readings:  # letters of a word are no factors of a product
        return Answer(stated, (), (), stated) if stated else None
    plain = plain_text(next((reading for reading in reversed(readings) if isinstance(reading, str)), stated))
    if all(isinstance(reading, str) for reading in readings) or not all(map(comparable, readings)):
        return Answer(plain, (), (), plain) if plain else None
    return Answer(plain, tuple(type(reading).__name__ for reading in readings), readings, str(readings[-1]))


def _statement(text: str) -> str:
    """Return the last box of a text, or what it announces as its answer up to the line's end, or else all of it.

    Not its last line: models like to end with the same polite phrase, and that is no answer to agree on.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    announced = list(ANNOUNCED.finditer(text))
    return text[announced[-1].end() :].split("\n", 1)[0] if announced else text


def plain_text(text: str) -> str:
    """Return a text in its plainest form: `**(B)**.`, `\\text{b}` and `b` are one."""
    text = unicodedata.normalize("NFC", text)
    for _ in range(MOST_MARKUP):
        text = MARKUP.sub(r"\1", text)
    text = " ".join(text.split()).lstrip(OPENING).rstrip(CLOSING).casefold()
    if WORDS.fullmatch(spoken := text.strip(CLOSING + "!?'")):
        return spoken
    inside = re.fullmatch(r"\((\w+)\)", text)
    return inside[1] if inside else text


def comparable(reading: Any) -> bool:
    """Return whether an expression can be compared in reasonable time; `9^{9^9}` and `(10^9)!` can only as texts.

    One sample of this kind would otherwise cost all the others of its prompt their verdict.
    """
    if isinstance(reading, str):
        return True
    try:
        return not any(_endless(node) for node in sympy.preorder_traversal(reading))
    except (RecursionError, OverflowError):
        return False


def _endless(node: Any) -> bool:
    if isinstance(node, ENDLESS):
        return True
    if isinstance(node, sympy.Pow):
        return _magnitude(node.exp) > (MOST_POWER if node.base.is_number else MOST_SYMBOLIC_POWER)
    combinatorial = isinstance(node, CombinatorialFunction)
    return combinatorial and any(_magnitude(argument) > MOST_POWER for argument in node.args)


def _magnitude(node: Any) -> float:
    """Return a rough upper bound of a number's absolute value without computing it; a symbol counts as 1."""
    if isinstance(node, sympy.Number):
        return abs(float(node))
    parts = [_magnitude(part) for part in getattr(node, "args", ())]
    if isinstance(node, sympy.Add):
        return sum(parts)
    if isinstance(node, sympy.Mul):
        return math.prod(parts)
    if isinstance(node, sympy.Pow | sympy.exp):
        base = parts[0] if isinstance(node, sympy.Pow) else math.e
        return float(max(base, 1 / base if base else 1.0) ** parts[-1])
    if isinstance(node, CombinatorialFunction):
        return math.gamma(max(parts, default=0.0) + 2)
    return max(parts, default=4.0 if isinstance(node, sympy.NumberSymbol) else 1.0)


def equivalence_classes(answers: Iterable[Answer]) -> dict[Answer, int]:
    """Return a number for every answer, the same for two answers that are equivalent.

    Answers of one text are one class before any algebra, and what is connected already is not compared again.
    """
    ordered = sorted(set(answers), key=lambda answer: (answer.text, answer.kinds))
    parents = list(range(len(ordered)))

    def root(place: int) -> int:
        while parents[place] != place:
            place = parents[place]
        return place

    for one, other in _pairs(ordered):
        first, second = root(one), root(other)
        if first != second and _equal(ordered[one], ordered[other]):
            parents[max(first, second)] = min(first, second)
    return {answer: root(place) for place, answer in enumerate(ordered)}


def _pairs(ordered: list[Answer]) -> Iterator[tuple[int, int]]:
    neighbours = ((place, place + 1) for place in range(len(ordered) - 1))
    yield from (pair for pair in neighbours if ordered[pair[0]].text == ordered[pair[1]].text)
    yield from combinations((place for place, answer in enumerate(ordered) if answer.readings), 2)


def _equal(one: Answer, other: Answer) -> bool:
    if one.text == other.text:
        return True
    first, second = list(one.readings), list(other.readings)
    return verify(first, second, timeout_seconds=None) or verify(second, first, timeout_seconds=None)
