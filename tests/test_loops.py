"""Loops are found whatever their block, and ordinary text has none: equality with a search of every period."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.records import Trace
from teachers.filters import Siblings
from teachers.filters.loops import LONG, REPETITIONS, SHARE, SHORTEST, longest_run, loop


def trace(text: str, finish_reason: str = "stop") -> Trace:
    """Return a trace with this completion."""
    return Trace(
        uid="u",
        prompt_uid="p",
        messages=({"role": "user", "content": "q"},),
        completion=text,
        reasoning="",
        answer="",
        finish_reason=finish_reason,
        num_prompt_tokens=1,
        num_completion_tokens=1,
        sample_index=0,
        seed=0,
        teacher="t",
        backend="b",
    )


def loops(text: str) -> bool:
    """Return the filter's opinion."""
    return loop(trace(text), Siblings())


def by_every_period(text: str, shortest: int) -> int:
    """Return the length of the longest run by trying each period at each place."""
    best = 0
    for period in range(1, len(text) // REPETITIONS + 1):
        size = 0
        for place in range(period, len(text) + 1):
            if place < len(text) and text[place] == text[place - period]:
                size += 1
                continue
            if size and size + period >= max(shortest, REPETITIONS * period):
                best = max(best, size + period)
            size = 0
    return best


BLOCKS = st.tuples(st.text("ab", min_size=1, max_size=12), st.integers(1, 12)).map(lambda pair: pair[0] * pair[1])


@given(parts=st.lists(BLOCKS, max_size=8), shortest=st.integers(4, 40))
def test_the_longest_run_is_that_of_an_exhaustive_search(parts: list[str], shortest: int) -> None:
    text = "".join(parts)
    length, period = longest_run(text, shortest=shortest)
    assert length == by_every_period(text, shortest)
    if length:
        assert REPETITIONS * period <= length
        assert any(
            text[at : at + length - period] == text[at + period : at + length] for at in range(len(text) - length + 1)
        )


STORY = " ".join(f"Then we look at case {i}, where {i * i} is the square and {i**3} the cube." for i in range(60))
BLOCK_TEXTS = [
    "(",
    "wait ",
    "Hmm, ",
    "Wait, let me check that again. ",
    "So x = 3. But x = 4? Let me recompute: 3 + 4 = 7, no. " * 3 + "Then ",
    " ".join(f"Sentence {i} of a long thought that comes back." for i in range(12)) + "\n",
    "所以答案是三。等等，",
    "\ud800",
    "0",
]


@pytest.mark.parametrize("block", BLOCK_TEXTS)
@pytest.mark.parametrize("end", ["", "</think>The answer is \\boxed{3}."])
def test_a_repeated_block_is_a_loop(block: str, end: str) -> None:
    needed = max(REPETITIONS, -(-LONG // len(block)))
    looping = STORY + block * (needed + 1) + end
    assert loops(looping)
    assert loops(looping[: len(looping) - len(end) - len(block) // 2])  # cut in the middle of a block
    assert not loops(STORY + block * (REPETITIONS - 1) + end)


@given(
    block=st.text(st.characters(codec="utf-8"), min_size=1, max_size=80),
    more=st.integers(0, 30),
    before=st.integers(0, 3000),
)
def test_four_blocks_that_fill_a_fifth_of_a_text_are_a_loop(block: str, more: int, before: int) -> None:
    times = max(REPETITIONS, -(-SHORTEST // len(block))) + more
    text = STORY[:before] + block * times
    assert loops(text) or len(block) * times < min(LONG, SHARE * len(text))


def test_the_engine_s_word_counts() -> None:
    assert loop(trace("short", "loop"), Siblings())
    assert not loop(trace("short", "length"), Siblings())
    assert not loops("")


HARMLESS = {
    "steps": "\n".join(f"Step {i}: we add {i} to the sum and get {i * (i + 1) // 2}." for i in range(200)),
    "sums": "\n".join(f"{i} + {i + 1} = {2 * i + 1}" for i in range(300)),
    "table": "| n | n^2 |\n|---|---|\n" + "\n".join(f"| {n} | {n * n} |" for n in range(300)),
    "digits": "The decimal expansion of 1/7 is 0." + "142857" * 20 + "... and so the answer is 8. " + STORY[:500],
    "zeros": "10^100 = 1" + "0" * 100 + ", a number of 101 digits, which is more than we need. " + STORY[:500],
    "rule": "=" * 79 + "\nResult\n" + "-" * 79 + "\n" + STORY[:400],
    "ones": "1 + " * 50
    + "1 = 51, since there are fifty-one ones in this sum and each of them counts once. "
    + STORY[:300],
    "matrix": "\\begin{pmatrix} "
    + " \\\\ ".join(["0 & 0 & 0 & 0"] * 4)
    + " \\end{pmatrix} is the zero matrix, "
    + STORY[:500],
    "thrice": "We check the three roots one by one, and each of them satisfies the equation as it stands. " * 3,
    "refrain": "".join(f"Is {i} prime? Let me divide it by all the smaller primes. It is not.\n" for i in range(100)),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_lists_tables_and_numbers_are_no_loops(kind: str) -> None:
    assert not loops(HARMLESS[kind])
    assert not loops(STORY + HARMLESS[kind])
