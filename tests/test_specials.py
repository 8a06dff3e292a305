"""Special tokens by role: which end a completion, and which of two tokenizers mean the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizer_shelf import byte_level, real_tokenizer, small_tokenizer, wrap
from tokenizers import AddedToken

from align.byte_view import byte_view
from align.specials import ROLES, roles, special_pairs, stop_ids
from distill.errors import UserError

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def tokenizer(*further: AddedToken, **named: Any) -> Any:
    """A byte-level tokenizer with <unk>, <s>, </s>, <|im_start|>, <|im_end|> and further tokens, its roles as named."""
    backend = byte_level()
    backend.add_tokens([AddedToken("<|pad|>", special=True), AddedToken("<|tool|>", special=True), *further])
    return wrap(backend, **{"unk_token": None, "bos_token": None, "eos_token": None, **named})


def spelled(pairs: dict[int, int], student: Any, teacher: Any) -> dict[str, str]:
    return {student.convert_ids_to_tokens(a): teacher.convert_ids_to_tokens(b) for a, b in pairs.items()}


def ids(one: Any, *tokens: str) -> tuple[int, ...]:
    return tuple(one.convert_tokens_to_ids(list(tokens)))


def test_stop_tokens_come_from_the_tokenizer_the_config_and_the_template() -> None:
    one = tokenizer(eos_token="</s>", chat_template=CHATML)
    assert stop_ids(one) == ids(one, "</s>", "<|im_end|>")
    config = SimpleNamespace(eos_token_id=list(ids(one, "<s>")))
    for named in (config, SimpleNamespace(generation_config=config)):
        assert stop_ids(one, named) == ids(one, "</s>", "<s>", "<|im_end|>")
    last = tokenizer(eos_token="<|im_end|>")
    assert stop_ids(last, SimpleNamespace(eos_token_id=ids(last, "</s>")[0])) == ids(last, "<|im_end|>", "</s>")


def test_no_stop_token_and_one_the_tokenizer_lacks_are_refused() -> None:
    one = tokenizer()
    with pytest.raises(UserError, match="nothing ends a completion"):
        stop_ids(one)
    with pytest.raises(UserError, match=f"token {len(one)}: the tokenizer has only {len(one)}"):
        stop_ids(one, SimpleNamespace(eos_token_id=[0, len(one)]))


def test_an_id_plays_one_role() -> None:
    one = tokenizer(eos_token="</s>", pad_token="</s>", bos_token="<s>", unk_token="<s>")
    assert roles(one) == dict.fromkeys(ROLES, ()) | {"stop": ids(one, "</s>"), "bos": ids(one, "<s>")}


@pytest.mark.parametrize("special", [False, True])
def test_marks_of_reasoning_are_a_role_where_they_are_one_token(special: bool) -> None:
    marks = [AddedToken(mark, special=special) for mark in ("<think>", "</think>")]
    one, other = tokenizer(*marks, eos_token="</s>"), tokenizer(eos_token="</s>")
    found = roles(one)
    assert (found["think_open"], found["think_close"]) == tuple((index,) for index in ids(one, "<think>", "</think>"))
    assert roles(other)["think_open"] == ()
    # Their bytes pair them, with one token or with several.
    assert not set(ids(one, "<think>", "</think>")) & set(special_pairs(one, one))
    assert byte_view(one).tokens[found["think_open"][0]] == b"<think>"
    assert special_pairs(one, other) == {index: index for index in byte_view(other).special}


def test_tokens_are_paired_by_what_they_do() -> None:
    student = tokenizer(bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|pad|>")
    teacher = tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<|pad|>", unk_token="<unk>")
    assert spelled(special_pairs(student, teacher), student, teacher) == {
        "<|im_end|>": "</s>",
        "<|im_start|>": "<s>",
        "<|pad|>": "<unk>",  # and not the teacher's padding, though it is spelled so
        "<|tool|>": "<|tool|>",  # no role, but both special and spelled alike
    }


def test_a_spelling_pairs_nothing_where_only_one_side_is_special() -> None:
    student = tokenizer(AddedToken("<|call|>", special=True), eos_token="</s>")
    teacher = tokenizer(AddedToken("<|call|>", special=False), eos_token="</s>")
    assert "<|call|>" not in spelled(special_pairs(student, teacher), student, teacher)


def test_several_stops_are_paired_one_to_one_by_spelling_then_by_order() -> None:
    student, teacher = tokenizer(eos_token="</s>"), tokenizer(eos_token="<|im_end|>")
    several = SimpleNamespace(eos_token_id=list(ids(student, "<s>", "<|im_end|>", "<unk>")))
    two = SimpleNamespace(eos_token_id=list(ids(teacher, "<|tool|>")))
    pairs = spelled(special_pairs(student, teacher, student_config=several, teacher_config=two), student, teacher)
    assert pairs["<|im_end|>"] == "<|im_end|>"
    assert pairs["</s>"] == "<|tool|>"
    assert not {"<s>", "<unk>"} & set(pairs)
    assert "<|tool|>" not in pairs


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece, Llama 2", "unigram"])
def test_a_tokenizer_pairs_its_special_tokens_with_themselves(name: str) -> None:
    one = small_tokenizer(name)
    pairs = special_pairs(one, one)
    assert pairs == {index: index for index in byte_view(one).special}
    other = small_tokenizer("byte-level, digit by digit")
    there, back = special_pairs(one, other), special_pairs(other, one)
    assert back == {b: a for a, b in there.items()}
    assert len(set(there.values())) == len(there)


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ("smollm2", "qwen2.5", {"<|im_end|>": "<|im_end|>"}),
        ("smollm2", "llama-2", {"<|im_end|>": "</s>", "<|im_start|>": "<s>", "<|endoftext|>": "<unk>"}),
        ("gpt2", "llama-3.2", {"<|endoftext|>": "<|eot_id|>"}),
        ("llama-2", "llama-3.2", {"</s>": "<|eot_id|>", "<s>": "<|begin_of_text|>"}),
    ],
)
def test_pairs_of_real_tokenizers(student: str, teacher: str, pairs: dict[str, str]) -> None:
    own, other = (real_tokenizer(f"tokenizers/{name}") for name in (student, teacher))
    assert spelled(special_pairs(own, other), own, other) == pairs
