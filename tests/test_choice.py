"""Multiple choice: the letter that a person would read, last statement first, and no letter out of plain words."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_verifiers import trace

from teachers.verifiers.choice import choice, chosen, gold_letter

CHOICES = {"A": "Paris", "B": "London", "C": "Rome", "D": "I think so"}
LETTERS = st.sampled_from("ABCDEFGHI")
STATEMENTS = [
    "\\boxed{X}",
    "\\boxed{\\text{X}}",
    "$\\boxed{\\textbf{(X)}}$",
    "\\boxed{\\mathrm{X}}.",
    "The answer is (X).",
    "the answer is X",
    "The answer is X because the others are wrong.",
    "So the correct answer is **X**.",
    "**Answer: X**",
    "**Answer:** X",
    "Final answer: X.",
    "The correct option is X",
    "The best choice would be X, clearly.",
    "Option X is correct.",
    "Choice **X** is the best.",
    "The answer is option X.",
    "The answer is\n\nX",
    "**X**",
    "(X)",
    "X.",
    "X",
    "# X",
]
EXAMPLES = [
    ("C) Rome", "C"),
    ("So we have\nC) Rome", "C"),
    ("C. Rome\n\nBecause it is the capital of Italy.", "C"),
    ("The correct answer is **C. Rome**", "C"),
    ("It must be **C**, I think", "C"),
    ("\\boxed{(C) Rome}", "C"),
    ("\\boxed{c}", "C"),
    ("\\boxed{Rome}", "C"),
    ("The answer is rome.", "C"),
    ("It is\n**Rome**", "C"),
    ("Rome", "C"),
    ("The answer is B. Wait, no: the answer is C.", "C"),
    ("\\boxed{B}. No: the answer is C", "C"),
    ("The answer is B, or rather\n\\boxed{C}", "C"),
    ("\\boxed{B} \\boxed{C", "B"),
    ("Option A is wrong. Option C is correct. Option B is wrong.", "C"),
    ("The answer is C.\nA. is wrong because it is in France", "C"),
    ("I think the answer is C because A is not in Italy", "C"),
    ("", None),
    ("no idea", None),
    ("Vitamin C", None),
    ("I am not sure", None),
    ("I think so, too", None),
    ("A good question.", None),
    ("The answer is a matter of taste", None),
    ("The answer is A good idea", None),
    ("The answer is I don't know", None),
    ("The answer is C-reactive protein", None),
    ("The answer is A or B", None),
    ("The answer is A, B.", None),
    ("The answer is either B or C.", None),
    ("Answer: B/C", None),
    ("\\boxed{A, C}", None),
    ("\\boxed{AC}", None),
    ("\\boxed{A} and \\boxed{B}", None),
    ("A) Paris\nB) London\nC) Rome\nD) I think so", None),
]


@pytest.mark.parametrize(("text", "letter"), EXAMPLES)
def test_what_a_person_reads(text: str, letter: str | None) -> None:
    assert chosen(text, CHOICES) == letter


@given(letter=LETTERS, statement=st.sampled_from(STATEMENTS), before=st.text(st.characters(codec="utf-8"), max_size=40))
def test_a_statement_after_any_text_names_its_letter(letter: str, statement: str, before: str) -> None:
    assert chosen(f"{before}\n\n{statement.replace('X', letter)}", {}) == letter


@given(
    first=LETTERS,
    second=LETTERS,
    early=st.sampled_from(STATEMENTS[:17]),
    late=st.sampled_from(STATEMENTS[:17]),
    filler=st.sampled_from(["Wait, that was wrong.", "Let me think again about all of it.", "a"]),
)
def test_the_last_statement_wins(first: str, second: str, early: str, late: str, filler: str) -> None:
    text = f"{early.replace('X', first)}\n{filler} Then again\n{late.replace('X', second)}"
    assert chosen(text, {}) == second


@given(
    st.lists(st.sampled_from(["A", "I", "a", "i", "is", "the", "answer", "I'm", "think", "of", "good"]), max_size=12)
)
def test_words_alone_name_nothing(words: list[str]) -> None:
    """`answer is A` at the end is the one thing that these words can say."""
    text = " ".join(words)
    letter = chosen(text + " matters", {})
    assert letter is None


@given(text=st.text(st.characters(codec=None, categories=None)), letter=st.sampled_from("ABCD"))
def test_any_text_has_a_verdict(text: str, letter: str) -> None:
    one = replace(trace(letter, text), meta={"choices": CHOICES})
    verdict = choice(one)
    assert verdict.score in (0.0, 1.0)
    assert choice(one) == verdict
    assert (verdict.score == 1.0) == (verdict.predicted == letter)


@pytest.mark.parametrize(
    ("gold", "letter"),
    [
        *[("C", "C"), ("c", "C"), ("(C)", "C"), ("C.", "C"), ("Rome", "C"), ("\\text{Rome}", "C"), ("E", None)],
        *[("x", None), ("", None), ("Rom", None), ("AB", None), ("2", None)],
    ],
)
def test_golds(gold: str, letter: str | None) -> None:
    assert gold_letter(gold, CHOICES) == letter


def test_a_gold_without_options_is_a_letter_or_nothing() -> None:
    assert gold_letter("E", {}) == "E"
    assert gold_letter("Rome", {}) is None
    twice = replace(trace("Rome", "Rome"), meta={"choices": {"A": "Rome", "B": "rome."}})
    assert choice(twice).score is None  # which of the two is meant?


@pytest.mark.parametrize("unit", ["answer is ", "\\boxed{", "(", "*", "answer" + " " * 50, "A\n", "**A** ", "\\text{"])
def test_long_texts_take_linear_time(unit: str) -> None:
    """The pool's limit would hide a quadratic pattern: 400 kB would be some 10^11 steps, and never end here."""
    assert chosen(unit * (400_000 // len(unit)) + "\nno letter here", CHOICES) is None or unit == "**A** "
