"""A completion taken apart: nothing is lost when the tags are well-formed, and every other case is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.reasoning import Parts, split_reasoning

WITHOUT_TAGS = st.text(st.characters(codec=None, categories=None), max_size=30).filter(lambda t: "think>" not in t)
ANSWERS = WITHOUT_TAGS.filter(str.strip)


@given(reasoning=WITHOUT_TAGS, answer=ANSWERS, before=st.text(" \n", max_size=2), required=st.booleans())
def test_well_formed_text_is_split_without_loss(reasoning: str, answer: str, before: str, required: bool) -> None:
    text = f"{before}<think>{reasoning}</think>{answer}"
    assert split_reasoning(text, required=required) == Parts(reasoning.strip(), answer.strip(), None)


@given(text=WITHOUT_TAGS)
def test_text_without_tags_is_all_answer(text: str) -> None:
    assert split_reasoning(text, required=False) == Parts("", text.strip(), None)
    assert split_reasoning(text, required=True) == Parts("", text.strip(), "no <think>")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>a", Parts("a", "", "unclosed <think>")),
        ("<think>", Parts("", "", "unclosed <think>")),
        ("<think>a<think>b", Parts("a<think>b", "", "unclosed <think>")),
        ("</think>a<think>b", Parts("b", "", "unclosed <think>")),
        ("<think>a</think>", Parts("a", "", "empty answer")),
        ("<think>a</think> \n", Parts("a", "", "empty answer")),
        ("</think>", Parts("", "", "0 <think> and 1 </think>")),
        ("a</think>b", Parts("a", "b", "0 <think> and 1 </think>")),  # a prefilled tag is part of a completion's text
        ("<think>a<think>b</think>c", Parts("a<think>b", "c", "2 <think> and 1 </think>")),
        ("<think>a</think>b</think>c", Parts("a</think>b", "c", "1 <think> and 2 </think>")),
        ("<think>a</think>b<think>c</think>d", Parts("a</think>b<think>c", "d", "2 <think> and 2 </think>")),
        ("well, <think>a</think>b", Parts("a", "b", "text before <think>")),
    ],
)
@pytest.mark.parametrize("required", [True, False])
def test_malformed_texts_are_named(text: str, parts: Parts, required: bool) -> None:
    found = split_reasoning(text, required=required)
    assert found == parts


@given(pieces=st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "\n"]), max_size=8), required=st.booleans())
def test_no_fault_means_one_closed_reasoning_and_an_answer(pieces: list[str], required: bool) -> None:
    text = "".join(pieces)
    parts = split_reasoning(text, required=required)
    assert parts == split_reasoning(text, required=required)
    if parts.fault is None and "think>" in text:
        assert text.count("</think>") == 1
        assert text.count("<think>") == 1
        assert text.replace("<think>", "", 1).strip().startswith(parts.reasoning)
        assert text.strip().endswith(parts.answer)
        assert parts.answer
