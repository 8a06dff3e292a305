"""The embedded problems: chains of everyday arithmetic whose every quantity is a whole number from 0 to 49.

    Ana has 15 books. Mon doubles. Tue sells 8. Wed loses 7. Total?
    <think>Start 15. Mon, 15*2=30. Tue, 30-8=22. Wed, 22-7=15.</think>\\boxed{15}

Made so that a model of 0.1 M parameters can learn them on two CPU cores, and yet cannot answer without the chain: each
step is one remembered fact, and the weekday names which sentence the step reads. The level is the number of steps.
Problems are made, not stored: a stream is a function of (levels, split, seed). A problem's split is a function of its
question alone, so train and held-out problems cannot overlap, whatever their seeds. No torch here.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from distill.errors import UserError
from distill.records import Prompt
from distill.tables import suggest

LARGEST = 49  # every quantity lies in 0..LARGEST, so that each can be one token
NAMES: tuple[str, ...] = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
NAMES += ("Ivo", "Jo", "Kim", "Leo", "Mia", "Nils", "Olga", "Pia")
ITEMS: tuple[str, ...] = ("apples", "beads", "books", "buttons", "cards", "coins", "cups", "keys")
ITEMS += ("marbles", "nuts", "pens", "plums", "shells", "stamps", "stones", "toys")
DAYS = ("Mon", "Tue", "Wed", "Thu")  # as many as the highest level
LEVELS = tuple(range(1, len(DAYS) + 1))
DEFAULT_LEVELS = (3, 4)
SPLITS = ("train", "heldout")
AMOUNTS = range(1, 10)
ADDING = ("buys", "finds", "gets", "wins")
TAKING = ("sells", "loses", "lends", "drops")
SCALING = {"doubles": ("*", 2), "triples": ("*", 3), "halves": ("/", 2)}  # verb -> sign, number
VERBS = (*ADDING, *TAKING, *SCALING)
HELDOUT_SHARE = 1 / 8
GIVE_UP = 100_000  # draws in a row that bring nothing new: the levels asked for are used up


@dataclass(frozen=True, slots=True)
class Step:
    """One sentence: a verb, and its amount unless the verb itself holds the number (`doubles`)."""

    verb: str
    amount: int | None = None

    @property
    def operation(self) -> tuple[str, int]:
        """The sign, one of `+-*/`, and the number to its right."""
        if self.verb in SCALING:
            return SCALING[self.verb]
        assert self.amount is not None
        return ("+" if self.verb in ADDING else "-"), self.amount

    def apply(self, value: int) -> int | None:
        """Return the quantity after the step, or None where it is not a whole number in 0..49."""
        sign, number = self.operation
        if sign == "/":
            return value // number if value % number == 0 else None
        result = {"+": value + number, "-": value - number, "*": value * number}[sign]
        return result if 0 <= result <= LARGEST else None


@dataclass(frozen=True, slots=True)
class Problem:
    """One chained word problem; `steps` must keep every quantity a whole number in 0..49."""

    name: str
    item: str
    start: int
    steps: tuple[Step, ...]

    @property
    def values(self) -> tuple[int, ...]:
        """The running total: the start, then the quantity after each step."""
        values = [self.start]
        for step in self.steps:
            value = step.apply(values[-1])
            assert value is not None, f"{step} does not apply to {values[-1]}"
            values.append(value)
        return tuple(values)

    @property
    def question(self) -> str:
        """The text a model is asked."""
        told = [
            f" {day} {step.verb}{'' if step.amount is None else f' {step.amount}'}."
            for day, step in zip(DAYS, self.steps, strict=False)
        ]
        return f"{self.name} has {self.start} {self.item}.{''.join(told)} Total?"

    @property
    def solution(self) -> str:
        """The worked trace: the chain inside `<think>`, then the boxed answer."""
        values = self.values
        worked = "".join(
            f" {day}, {before}{step.operation[0]}{step.operation[1]}={after}."
            for day, step, before, after in zip(DAYS, self.steps, values, values[1:], strict=False)
        )
        return f"<think>Start {self.start}.{worked}</think>\\boxed{{{values[-1]}}}"

    @property
    def gold(self) -> str:
        """The answer, in digits."""
        return str(self.values[-1])

    @property
    def level(self) -> int:
        """The number of steps."""
        return len(self.steps)


def draw(rng: random.Random, level: int) -> Problem:
    """Return a random problem of `level` steps: each draws a verb that fits, then an amount that fits the verb."""
    name, item, start = rng.choice(NAMES), rng.choice(ITEMS), rng.randrange(2, LARGEST + 1)
    value, steps = start, []
    for _ in range(level):
        step, value = rng.choice(rng.choice(_fitting(value)))
        steps.append(step)
    return Problem(name, item, start, tuple(steps))


@cache
def _fitting(value: int) -> list[list[tuple[Step, int]]]:
    """Return, verb by verb, the steps that keep the quantity in bounds, each with the quantity after it."""
    by_verb = ([Step(verb)] if verb in SCALING else [Step(verb, amount) for amount in AMOUNTS] for verb in VERBS)
    fitting = ([(step, after) for step in steps if (after := step.apply(value)) is not None] for steps in by_verb)
    return [steps for steps in fitting if steps]


def split_of(question: str) -> str:
    """Return "train" or "heldout" (one question in eight), decided by a hash of the question alone."""
    share = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64
    return "heldout" if share < HELDOUT_SHARE else "train"


def parse_levels(text: str) -> tuple[int, ...]:
    """Read the LEVEL of `nano[:LEVEL]`: "" -> (3, 4), "3" -> (3,), "1-2" -> (1, 2).

    Raises:
        UserError: neither a level nor a rising range of levels within 1..4.
    """
    if not text:
        return DEFAULT_LEVELS
    names = {str(level): level for level in LEVELS}
    first, dash, last = text.partition("-")
    low, high = names.get(first), names.get(last if dash else first)
    if low and high and low <= high:
        return tuple(range(low, high + 1))
    raise UserError(
        f"nano level {text!r}: allowed are {LEVELS[0]} to {LEVELS[-1]} or a range of them, such as nano:1-2"
    )


def name_levels(levels: Sequence[int]) -> str:
    """Return the text of sorted levels: what `parse_levels` reads back where they are a range, else "1,3"."""
    if len(levels) > 1 and list(levels) == list(range(levels[0], levels[-1] + 1)):
        return f"{levels[0]}-{levels[-1]}"
    return ",".join(map(str, levels))


def stream(levels: Sequence[int] = DEFAULT_LEVELS, split: str = "train", seed: int = 0) -> Iterator[Problem]:
    """Yield distinct problems of one split, each level equally likely, the same for the same arguments.

    Raises:
        UserError: a level or split that does not exist (at the call); no problem is left (while iterating).
    """
    chosen = sorted(set(levels))
    if not chosen or not set(chosen) <= set(LEVELS):
        raise UserError(f"nano levels {tuple(levels)}: allowed are {LEVELS[0]} to {LEVELS[-1]}, at least one")
    if split not in SPLITS:
        raise UserError(f"unknown nano split {split!r}: allowed are {', '.join(SPLITS)}{suggest(split, SPLITS)}")
    return _stream(chosen, split, seed)


def _stream(levels: list[int], split: str, seed: int) -> Iterator[Problem]:
    rng = random.Random(f"nano:{name_levels(levels)}:{split}:{seed}")
    seen: set[str] = set()
    misses = 0
    while misses < GIVE_UP:
        problem = draw(rng, rng.choice(levels))
        question = problem.question
        if question in seen or split_of(question) != split:
            misses += 1
            continue
        seen.add(question)
        misses = 0
        yield problem
    raise UserError(f"nano:{name_levels(levels)} has no more {split} problems after {len(seen)}: ask for fewer")


def solved(
    levels: Sequence[int] = DEFAULT_LEVELS, split: str = "train", seed: int = 0, limit: int | None = None
) -> Iterator[tuple[Prompt, str]]:
    """Yield (prompt, worked trace) of the stream, the first `limit` of them or without end.

    Raises:
        UserError: as `stream`.
    """
    source = f"nano:{name_levels(sorted(set(levels)))}:{split}"
    return (
        (
            Prompt(
                messages=({"role": "user", "content": problem.question},),
                gold=problem.gold,
                source=f"{source}#{index}",
                meta={"level": problem.level},
            ),
            problem.solution,
        )
        for index, problem in enumerate(itertools.islice(stream(levels, split, seed), limit))
    )


def problems(
    levels: Sequence[int] = DEFAULT_LEVELS, split: str = "train", seed: int = 0, limit: int | None = None
) -> Iterator[Prompt]:
    """Yield the prompts of the stream, the first `limit` of them or without end.

    Args:
        levels: numbers of steps, each in 1..4.
        split: "train" or "heldout"; no question is ever in both.
        seed: another seed is another order, and other problems, of the same split.
        limit: how many; None never stops. A smaller limit is a prefix of a larger one.

    Raises:
        UserError: as `stream`.
    """
    return (prompt for prompt, _ in solved(levels, split, seed, limit))
