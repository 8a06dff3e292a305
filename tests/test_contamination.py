"""Evaluation questions are found wherever they stand, and nothing is found where no words are shared."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from teachers.filters import EvaluationIndex, Hit
from teachers.filters.contamination import DROP_WORDS, FLAG_WORDS
from teachers.filters.shingles import grams, marks, words

# Questions of GSM8K's test split (MIT licence, Cobbe et al. 2021, github.com/openai/grade-school-math).
JANET = (
    "Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her friends "
    "every day with four. She sells the remainder at the farmers' market daily for $2 per fresh duck egg. How much in "
    "dollars does she make every day at the farmers' market?"
)
ROBE = "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it take?"
SHORT = "Compute $2 + 3 \\cdot 4$."


def index_of(*questions: str) -> EvaluationIndex:
    """Return an index of one file."""
    return EvaluationIndex(("test.jsonl", f"test.jsonl:{line}", text) for line, text in enumerate(questions, 1))


def kinds(index: EvaluationIndex, text: str) -> list[tuple[str, str]]:
    """Return kind and level of each hit."""
    return [(hit.kind, hit.level) for hit in index.hits(text)]


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("Ann's 1,234 plums", ["ann", "s", "1234", "plums"]),
        ("(1,234, 5) and 12,34", ["1234", "5", "and", "12", "34"]),
        ("3.50 x_1  ２ﬁx", ["3.50", "x", "1", "2fix"]),
        ("ＡＢＣ Straße", ["abc", "strasse"]),
        ("求x的值", ["求", "x", "的", "值"]),
        ("…!?--", []),
        ("", []),
    ],
)
def test_words(text: str, folded: list[str]) -> None:
    assert words(text) == folded


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("2 − 3×4", "2 - 3 * 4"),
        ("**bold** two-digit x-y", "bold two digit x - y"),
        ("$\\frac{1}{2} \\cdot 3$ = -a^2", "frac 1 2 cdot 3 = - a ^ 2"),
    ],
)
def test_marks(text: str, folded: str) -> None:
    assert " ".join(marks(text)) == folded


@given(text=st.text(max_size=60))
def test_marks_are_the_words_and_signs_between_them(text: str) -> None:
    assert [mark for mark in marks(text) if mark not in "+-*/=<>^"] == words(text)


@given(tokens=st.lists(st.sampled_from("abc"), max_size=30), size=st.integers(1, 6))
def test_grams_are_equal_where_their_tokens_are(tokens: list[str], size: int) -> None:
    named = grams(tokens, size).tolist()
    runs = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    assert len(named) == len(runs)
    assert len(set(named)) == len(set(runs)) == len(set(zip(named, runs, strict=True)))


def test_grams_are_the_same_on_every_machine() -> None:
    assert grams(["a", "b", "c"], 2).tolist() == [12769712933570031285, 14999570181903818515]


TEXTS = st.text(min_size=1, max_size=200)
ITEMS = TEXTS.filter(lambda text: bool(words(text)))


@given(items=st.lists(ITEMS, min_size=1, max_size=4), before=TEXTS, after=TEXTS)
def test_a_question_inserted_verbatim_is_always_found(items: list[str], before: str, after: str) -> None:
    index = index_of(*items)
    for number, item in enumerate(items, 1):
        met = [hit for hit in index.hits(f"{before}\n{item}\n{after}") if hit.level == "drop"]
        assert f"test.jsonl:{number}" in {hit.item for hit in met}


@given(
    count=st.integers(1, 60),
    before=st.lists(st.sampled_from(["u", "v", "w"]), max_size=60),
    data=st.data(),
)
def test_so_many_words_in_a_row_are_found_and_fewer_are_not(count: int, before: list[str], data: st.DataObject) -> None:
    item = [f"item{i}" for i in range(60)]
    begin = data.draw(st.integers(0, 60 - count))
    text = " ".join([*before, *item[begin : begin + count], "x", "y"])
    wanted = ("13-gram", "drop") if count >= DROP_WORDS else ("8-gram", "flag")
    assert kinds(index_of(" ".join(item)), text) == ([wanted] if count >= FLAG_WORDS else [])


@given(
    item=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=40),
    text=st.lists(st.sampled_from("uvwxyz"), max_size=60),
)
def test_disjoint_vocabularies_never_meet(item: list[str], text: list[str]) -> None:
    assert index_of(" ".join(item)).hits(" ".join(text)) == []


def test_form_does_not_hide_a_question() -> None:
    index = index_of(JANET, ROBE, SHORT)
    for text in (JANET, JANET.upper(), JANET.replace(" ", "\n\n"), "Q: " + JANET.replace(".", " ;") + " Think first."):
        assert kinds(index, text) == [("13-gram", "drop")]
    assert index.hits("Solve.\n\nCompute 2+3·4") == []  # the sign of a product may be written in words
    assert index.hits("compute: **2 +3 \\cdot 4**!") == [
        Hit("test.jsonl", "test.jsonl:3", "whole", "drop", "compute 2 3 cdot 4")
    ]


@pytest.mark.parametrize("text", ["Compute 12 + 3 \\cdot 4", "Compute 2 - 3 \\cdot 4", "Compute 2 + 3 \\cdot 45"])
def test_other_numbers_or_signs_are_another_short_question(text: str) -> None:
    assert index_of(SHORT).hits(text) == []


@pytest.mark.parametrize(
    "template", ["{}", "Solve this step by step: {} Put the answer into a box, please. Thank you!"]
)
def test_one_changed_word_is_found_by_likeness(template: str) -> None:
    item = "A robe takes 2 bolts of blue fiber and half that many white ones. How many in total does it take?"
    changed = item.replace("half", "part")
    assert kinds(index_of(item), template.format(changed)) == [("fuzzy", "drop")]
    assert kinds(index_of(item), template.format(changed.replace("2", "5"))) == [("8-gram", "flag")]
    half = changed[: len(changed) // 2]
    assert ("fuzzy", "drop") not in kinds(index_of(item), template.format(half))


@given(place=st.integers(0, 19), data=st.data())
def test_a_typing_error_in_any_word_is_found(place: int, data: st.DataObject) -> None:
    item = [chr(97 + i) + ("lorem", "ipsum", "dolor", "sit", "amet")[i % 5] for i in range(20)]
    typed = list(item)
    at = data.draw(st.integers(0, len(item[place]) - 1))
    typed[place] = item[place][:at] + "q" + item[place][at + 1 :]
    found = index_of(" ".join(item), "something else altogether").hits("Well then: " + " ".join(typed) + " now?")
    assert [(hit.item, hit.level) for hit in found] == [("test.jsonl:1", "drop")]


def test_every_question_met_is_listed_once_by_the_strongest_rule() -> None:
    index = index_of(JANET, ROBE, JANET, "How many bolts in total does it take?", "Who are you?")
    hits = index.hits(f"{ROBE}\n{JANET}\n{JANET}")
    assert [(hit.item.partition(":")[2], hit.kind) for hit in hits] == [
        ("1", "13-gram"),
        ("2", "13-gram"),
        ("3", "13-gram"),
        ("4", "whole"),
    ]


def test_files_of_every_kind(tmp_path: Path, write_jsonl: Callable) -> None:
    rows = [{"question": JANET, "answer": "18"}, {"question": ROBE, "answer": "3"}]
    paths = [write_jsonl("a.jsonl", rows), tmp_path / "b.json", tmp_path / "c.csv", tmp_path / "d.parquet"]
    paths[1].write_text(json.dumps(rows))
    with paths[2].open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), paths[3])
    hits = EvaluationIndex.read(paths).hits(f"Please: {ROBE}")
    assert [(hit.file, hit.kind) for hit in hits] == [(str(path), "13-gram") for path in paths]
    assert [hit.item for hit in hits] == ["a.jsonl:2", "b.json:2", "c.csv:3", "d.parquet:2"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"answer": "1"}], "1 rows have no question"),
        ([{"question": "What?"}, {"question": "?!"}], "e.jsonl:2 has no word"),
        ([], "is empty"),
    ],
)
def test_a_file_that_would_protect_less_than_it_says_is_refused(
    rows: list, message: str, write_jsonl: Callable
) -> None:
    with pytest.raises(UserError, match=f"--decontaminate.*{message}"):
        EvaluationIndex.read([write_jsonl("e.jsonl", rows)])


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--decontaminate.*does not exist"):
        EvaluationIndex.read([tmp_path / "none.jsonl"])


def test_an_index_of_nothing_meets_nothing() -> None:
    assert EvaluationIndex([]).hits(JANET) == []
