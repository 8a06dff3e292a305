"""One vocabulary or two: every id must mean the same token on both sides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align import METHODS, open_alignment, same_vocabulary
from distill.errors import UserError


def tokenizer(tokens: list[str], *, byte_level: bool = False):
    """A tokenizer of whole words whose ids are the places in `tokens`."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    if byte_level:
        backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


WORDS = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=20, unique=True)


@settings(deadline=None, max_examples=50)
@given(WORDS, WORDS)
def test_counts_agree_with_a_count_by_hand(a: list[str], b: list[str]) -> None:
    comparison = same_vocabulary(tokenizer(a), tokenizer(b))
    shared = sum(x == y for x, y in zip(a, b, strict=False))
    assert comparison.same == (a == b)
    assert (comparison.shared, comparison.student_only, comparison.teacher_only) == (
        shared,
        len(a) - shared,
        len(b) - shared,
    )
    assert "\n" not in comparison.why


@settings(deadline=None, max_examples=50)
@given(WORDS)
def test_a_tokenizer_is_the_identity_of_itself(words: list[str]) -> None:
    name, comparison = open_alignment("auto", tokenizer(words), tokenizer(list(words)))
    assert name == "identity"
    assert comparison.same
    assert comparison.shared == len(words)


def test_swapped_ids_are_two_vocabularies() -> None:
    comparison = same_vocabulary(tokenizer(["a", "b", "c"]), tokenizer(["a", "c", "b"]))
    assert not comparison.same
    assert comparison.shared == 1
    assert "token 'b' is 1 for the student and 2 for the teacher" in comparison.why


def test_a_token_more_is_another_vocabulary() -> None:
    comparison = same_vocabulary(tokenizer(["a"]), tokenizer(["a", "b"]))
    assert (comparison.same, comparison.teacher_only) == (False, 1)
    assert "'b' is unknown to the student" in comparison.why


def test_same_spelling_for_other_bytes_is_another_vocabulary() -> None:
    words = ["a", "Ġb"]  # byte-level writes a space as Ġ
    comparison = same_vocabulary(tokenizer(words), tokenizer(words, byte_level=True))
    assert not comparison.same
    assert "'Ġb'" in comparison.why


@pytest.mark.parametrize("name", ["auto", *METHODS])
def test_two_vocabularies_are_refused_with_numbers_and_advice(name: str) -> None:
    with pytest.raises(UserError, match=r"1 of 2 student and 3 teacher tokens.*hard-labels") as caught:
        open_alignment(name, tokenizer(["a", "b"]), tokenizer(["a", "c", "d"]))
    assert "\n" not in str(caught.value)


def test_unknown_method_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'identity'"):
        open_alignment("identty", tokenizer(["a"]), tokenizer(["a"]))
