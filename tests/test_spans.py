"""Spans: what they are by definition, over any two splits of any bytes, and between tokenizers."""

from __future__ import annotations

import json
from itertools import accumulate, pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_shelf import DATA, SMALL, byte_level, real_tokenizer, small_tokenizer, texts, wrap

from align.byte_view import byte_view, tokenise
from align.spans import Spans, common_spans, spans_of
from distill.errors import UserError

SHIFTED = bytes((byte + 91) % 256 for byte in range(256))


@st.composite
def splits(draw: st.DrawFn, *, empty: bool = True) -> tuple[list[bytes], list[bytes]]:
    """Two splits of one text's bytes, through characters too, with tokens that have no bytes."""
    text = draw(texts().map(str.encode) | st.binary(max_size=12))
    cut = st.lists(st.integers(0, len(text)), max_size=12, unique=not empty)
    sides = []
    for _ in range(2):
        at = sorted([0, *draw(cut), len(text)])
        pieces = [text[begin:end] for begin, end in pairwise(at)]
        sides.append([piece for piece in pieces if piece or empty])
    return sides[0], sides[1]


def by_definition(student: list[bytes], teacher: list[bytes]) -> list[list[int]]:
    """Take the shortest tokens that are the same bytes on both sides, again and again, by trying all."""
    spans, a, b = [], 0, 0
    while b"".join(student[a:]):
        ends = product(range(a + 1, len(student) + 1), range(b + 1, len(teacher) + 1))
        same = [(i, j) for i, j in ends if b"".join(student[a:i]) == b"".join(teacher[b:j]) != b""]
        i, j = min(same, key=sum)
        spans.append([a, i, b, j])
        a, b = i, j
    if spans:
        spans[-1][1], spans[-1][3] = len(student), len(teacher)
    return spans


def rows(spans: Spans) -> list[list[int]]:
    assert spans.student.dtype == spans.teacher.dtype == np.int64
    assert spans.student.shape == spans.teacher.shape == (len(spans), 2)
    return np.concatenate([spans.student, spans.teacher], 1).tolist()


@given(sides=splits())
def test_spans_are_the_shortest_common_pieces(sides: tuple[list[bytes], list[bytes]]) -> None:
    assert rows(spans_of(*sides)) == by_definition(*sides)


@given(sides=splits())
def test_spans_partition_both_sides_and_cannot_be_split(sides: tuple[list[bytes], list[bytes]]) -> None:
    student, teacher = sides
    found = rows(spans_of(student, teacher))
    for side, begin, end in ((student, 0, 1), (teacher, 2, 3)):
        edges = [0, *(span[end] for span in found)]
        assert edges[:-1] == [span[begin] for span in found]
        assert all(span[begin] < span[end] for span in found)
        assert edges[-1] == (len(side) if b"".join(side) else 0)
    for a, b, c, d in found:
        own, other = student[a:b], teacher[c:d]
        assert b"".join(own) == b"".join(other) != b""
        inner = set(accumulate(map(len, own))) & set(accumulate(map(len, other)))
        assert inner - {0} == {len(b"".join(own))}


@given(sides=splits())
def test_the_sides_may_be_swapped(sides: tuple[list[bytes], list[bytes]]) -> None:
    spans, swapped = spans_of(*sides), spans_of(*sides[::-1])
    assert rows(Spans(swapped.teacher, swapped.student)) == rows(spans)


@given(sides=splits())
def test_only_where_tokens_end_counts_not_what_they_say(sides: tuple[list[bytes], list[bytes]]) -> None:
    renamed = [[token.translate(SHIFTED) for token in side] for side in sides]
    assert rows(spans_of(*renamed)) == rows(spans_of(*sides))


@given(one=splits(empty=False), two=splits(empty=False))
def test_one_text_behind_another_has_the_spans_of_both(
    one: tuple[list[bytes], list[bytes]], two: tuple[list[bytes], list[bytes]]
) -> None:
    shift = np.array([len(one[0]), len(one[0]), len(one[1]), len(one[1])])
    behind = (np.array(rows(spans_of(*two)), dtype=np.int64).reshape(-1, 4) + shift).tolist()
    assert rows(spans_of(one[0] + two[0], one[1] + two[1])) == rows(spans_of(*one)) + behind


@given(sides=splits(empty=False))
def test_a_split_and_itself_meet_at_every_token(sides: tuple[list[bytes], list[bytes]]) -> None:
    for side in sides:
        assert rows(spans_of(side, side)) == [[at, at + 1, at, at + 1] for at in range(len(side))]


def test_tokens_without_bytes_belong_to_the_span_behind_them_and_at_the_end_to_the_last() -> None:
    assert rows(spans_of([b"", b"a", b"", b"b", b""], [b"a", b"b"])) == [[0, 2, 0, 1], [2, 5, 1, 2]]
    assert rows(spans_of([b"ab"], [b"", b"a", b"", b"b", b"", b""])) == [[0, 1, 0, 6]]
    for student, teacher in (([], []), ([b""], []), ([b""], [b"", b""])):
        assert rows(spans_of(student, teacher)) == []


@pytest.mark.parametrize(("student", "teacher"), [([b"ab"], [b"a"]), ([b"ab"], [b"a", b"c"]), ([], [b"a"])])
def test_other_bytes_are_refused(student: list[bytes], teacher: list[bytes]) -> None:
    with pytest.raises(ValueError, match="same bytes"):
        spans_of(student, teacher)


@pytest.mark.parametrize("student", SMALL)
@pytest.mark.parametrize("teacher", ["byte-level, digit by digit", "sentencepiece, Llama 2"])
@given(text=texts())
@settings(max_examples=15)
def test_tokenizers_meet_over_any_text_that_both_keep(student: str, teacher: str, text: str) -> None:
    check(small_tokenizer(student), small_tokenizer(teacher), text)


def check(student: Any, teacher: Any, text: str) -> None:
    sides = [tokenise(tokenizer, byte_view(tokenizer), text) for tokenizer in (student, teacher)]
    if None in sides:
        with pytest.raises(UserError, match="changes this text: it"):
            common_spans(student, teacher, text)
        return
    spans = common_spans(student, teacher, text)
    assert [[*own, *other] for own, other in spans] == rows(spans_of(*(side.pieces for side in sides)))
    assert b"".join(b"".join(sides[0].pieces[a:b]) for (a, b), _ in spans) == text.encode()


def test_a_number_is_one_span_and_the_texts_around_it_stay_apart() -> None:
    student, teacher = small_tokenizer("byte-level, three digits"), small_tokenizer("byte-level, digit by digit")
    text = "sold 2001 clips"
    own = [piece.decode() for piece in tokenise(student, byte_view(student), text).pieces]
    spans = [("".join(own[a:b]), b - a, d - c) for (a, b), (c, d) in common_spans(student, teacher, text)]
    assert spans[0] == ("sold", own.index(" "), own.index(" "))
    assert spans[-1] == (" clips", 1, 1)
    assert [text for text, _, _ in spans[1:-1]] == [" ", *own[own.index(" ") + 1 : -1]]


def test_the_spelling_of_a_special_token_is_text() -> None:
    student, teacher = small_tokenizer("byte-level"), small_tokenizer("sentencepiece, always")
    spans = common_spans(student, teacher, "<|im_end|>")
    assert spans[-1][0][1] > 1
    assert spans[-1][1][1] > 1


def test_a_mark_of_reasoning_may_be_one_token_here_and_several_there() -> None:
    backend = byte_level()
    backend.add_tokens(["<think>", "</think>"])
    one, several = wrap(backend), small_tokenizer("byte-level")
    text = "<think>\nsold 7\n</think>\n\n7"
    pieces = tokenise(one, byte_view(one), text).pieces
    spans = common_spans(several, one, text)
    assert len(spans) == len(pieces)
    for mark in (b"<think>", b"</think>"):
        at = pieces.index(mark)
        (a, b), other = spans[at]
        assert other == (at, at + 1)
        assert b - a > 1


def test_the_package_exports_them() -> None:
    import align

    assert align.common_spans is common_spans


@pytest.mark.parametrize("teacher", ["qwen2.5", "llama-3.2", "llama-2"])
@pytest.mark.parametrize("student", ["smollm2", "gpt2"])
@given(text=texts())
@settings(max_examples=25)
def test_real_tokenizers_meet_over_any_text_that_both_keep(student: str, teacher: str, text: str) -> None:
    check(real_tokenizer(f"tokenizers/{student}"), real_tokenizer(f"tokenizers/{teacher}"), text)


@pytest.mark.parametrize(("student", "share"), [("smollm2", 0.941), ("gpt2", 0.725)])
def test_how_many_student_tokens_meet_one_teacher_token_on_gsm8k(student: str, share: float) -> None:
    """The shares were measured with another program, over more answers."""
    own, other, one, tokens = real_tokenizer(f"tokenizers/{student}"), real_tokenizer("tokenizers/qwen2.5"), 0, 0
    lines = (DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    for line in lines:
        spans = common_spans(own, other, json.loads(line)["answer"])
        one += sum(b - a == d - c == 1 for (a, b), (c, d) in spans)
        tokens += spans[-1][0][1]
    assert one / tokens == pytest.approx(share, abs=0.015)
