"""Ids as bytes, texts as ids: over small tokenizers of every kind, and real ones where `shared/data` has them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_shelf import PIECES, REAL, SMALL, byte_level, real_tokenizer, sentencepiece, small_tokenizer, texts, wrap
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from align.byte_view import alteration, byte_view, encode, tokenise
from distill.errors import UserError
from teachers.nano.tokenizer import THINK, build_tokenizer

# When a tokenizer must keep a text, by what its stages do; the others lose characters that they have no piece for.
KEEPS: dict[str, Callable[[str], bool]] = {
    "byte-level": lambda text: True,
    "byte-level, digit by digit": lambda text: True,
    "byte-level, three digits": lambda text: True,
    "byte-level, space before": lambda text: True,
    "byte-level, NFC": lambda text: unicodedata.is_normalized("NFC", text),
    "byte-level, bytes missing": lambda text: not {0x00, 0x04, 0x7F, 0xF0} & set(text.encode()),
    "sentencepiece, Llama 2": lambda text: "▁" not in text,
    "sentencepiece, always": lambda text: "▁" not in text,
    "sentencepiece, first, words apart": lambda text: "▁" not in text,
    "sentencepiece, Gemma": lambda text: "▁" not in text,
}


def special_ids(tokenizer: Any) -> set[int]:
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def check(tokenizer: Any, text: str, continued: bool) -> bool:
    """Assert what holds for any text, and return whether the tokenizer keeps it."""
    view = byte_view(tokenizer)
    tokens = tokenise(tokenizer, view, text, continued=continued)
    why = alteration(tokenizer, view, text, continued=continued)
    assert encode(tokenizer, view, text, continued=continued) == (None if tokens is None else tokens.ids)
    assert (tokens is None) == (why is not None)
    if tokens is None:
        assert "\n" not in why
        return False
    assert b"".join(tokens.pieces) == text.encode()
    assert len(tokens.ids) == len(tokens.pieces)
    assert not special_ids(tokenizer) & set(tokens.ids)
    assert view.of(tokens.ids)[1:] == tokens.pieces[1:]
    return True


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("name", SMALL)
@given(text=texts())
@settings(max_examples=40)
def test_a_text_is_kept_byte_for_byte_or_refused_with_a_reason(name: str, continued: bool, text: str) -> None:
    kept = check(small_tokenizer(name), text, continued)
    if name in KEEPS:
        assert kept == KEEPS[name](text)


@pytest.mark.parametrize("name", KEEPS)
@given(text=texts(without="<▁"))
@settings(max_examples=30)
def test_the_ids_are_those_of_the_tokenizer_itself(name: str, text: str) -> None:
    tokenizer = small_tokenizer(name)
    ids = encode(tokenizer, byte_view(tokenizer), text)
    assert ids is None or ids == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", [name for name in KEEPS if name.startswith("byte-level")])
@given(data=st.data())
@settings(max_examples=30)
def test_any_ids_are_read_as_the_decoder_reads_them(name: str, data: st.DataObject) -> None:
    tokenizer = small_tokenizer(name)
    view = byte_view(tokenizer)
    known = [index for index, token in enumerate(view.tokens) if token is not None]
    ids = data.draw(st.lists(st.sampled_from(known), max_size=12))
    assert b"".join(view.of(ids)).decode(errors="replace") == tokenizer.backend_tokenizer.decode(ids)


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith(("sentencepiece", "unigram"))])
def test_pieces_are_read_as_the_decoder_reads_them(name: str) -> None:
    tokenizer = small_tokenizer(name)
    view, backend = byte_view(tokenizer), tokenizer.backend_tokenizer
    (anchor,) = backend.encode("a", add_special_tokens=False).ids[-1:]  # behind a word, no space is taken off
    for index, token in enumerate(view.tokens):
        if token is not None and token.isascii():
            assert backend.decode([anchor, index]) == "a" + token.decode(), index


@given(text=texts(without="<▁"))
@settings(max_examples=60)
def test_a_continuation_is_what_follows_a_newline(text: str) -> None:
    tokenizer = small_tokenizer("sentencepiece, Llama 2")
    newline, both = (tokenizer.encode(t, add_special_tokens=False) for t in ("\n", "\n" + text))
    if both[: len(newline)] == newline:
        assert encode(tokenizer, byte_view(tokenizer), text, continued=True) == both[len(newline) :]


@pytest.mark.parametrize("scheme", ["prepend", "always", "first"])
def test_the_space_before_a_beginning_covers_no_byte_and_a_continuation_has_none(scheme: str) -> None:
    tokenizer = wrap(sentencepiece(scheme=scheme))
    view = byte_view(tokenizer)
    assert view.leading_space
    whole = tokenise(tokenizer, view, "sold it")
    assert view.of(whole.ids)[0][:1] == b" "
    assert b"".join(whole.pieces) == b"sold it"
    continued = tokenise(tokenizer, view, "sold it", continued=True)
    assert view.of(continued.ids) == continued.pieces
    assert not byte_view(small_tokenizer("sentencepiece, Gemma")).leading_space


def test_special_tokens_stand_for_no_text_and_their_spelling_is_text() -> None:
    tokenizer = small_tokenizer("byte-level")
    view = byte_view(tokenizer)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [stop]
    assert (view.tokens[stop], view.special[stop]) == (None, "<|im_end|>")
    assert stop not in encode(tokenizer, view, "say <|im_end|>, please")
    with pytest.raises(ValueError, match=r"<\|im_end\|>.*no text"):
        view.of([stop])
    for beyond in (-1, len(view)):
        with pytest.raises(ValueError, match="no text"):
            view.of([beyond])


@pytest.mark.parametrize("special", [False, True])
def test_marks_of_reasoning_are_text_however_they_are_flagged(special: bool) -> None:
    backend = byte_level()
    backend.add_tokens([AddedToken("<think>", special=special, normalized=False)])
    tokenizer = wrap(backend)
    view = byte_view(tokenizer)
    mark = tokenizer.convert_tokens_to_ids("<think>")
    assert view.tokens[mark] == b"<think>"
    assert mark not in view.special
    assert encode(tokenizer, view, "<think>\n")[0] == mark


def test_added_tokens_that_are_not_special_are_their_spelling() -> None:
    tokenizer = build_tokenizer()
    view = byte_view(tokenizer)
    for mark in THINK:
        (index,) = tokenizer.encode(mark, add_special_tokens=False)
        assert view.tokens[index] == mark.encode()
    assert sum(token is None for token in view.tokens) == len(view.special)
    assert view.missing_bytes() == ()


def test_an_added_token_that_the_vocabulary_also_has_is_read_as_there() -> None:
    """Gemma adds its runs of `▁`: the model writes two spaces with the same id that a typed `▁▁` would get."""
    backend = sentencepiece(scheme="never")
    (both,) = backend.encode("  ", add_special_tokens=False).ids
    backend.add_tokens([AddedToken("▁▁", normalized=False)])
    tokenizer = wrap(backend)
    view = byte_view(tokenizer)
    assert view.tokens[both] == b"  "
    assert encode(tokenizer, view, "  ") == [both] == tokenizer.encode("▁▁", add_special_tokens=False)
    assert encode(tokenizer, view, "▁▁") is None


def test_an_added_token_that_takes_the_spaces_around_it_changes_the_text() -> None:
    backend = byte_level()
    backend.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True), AddedToken("[tool]", normalized=True)])
    tokenizer = wrap(backend)
    view = byte_view(tokenizer)
    assert view.of(encode(tokenizer, view, "a<mask>b[tool]")) == [b"a", b"<mask>", b"b", b"[tool]"]
    assert encode(tokenizer, view, "a <mask>b") is None
    assert alteration(tokenizer, view, "a <mask>b") == "reads ' <mask>b' at character 1 as '<mask>b'"


def test_an_added_token_that_is_normalised_meets_normalised_text() -> None:
    backend = byte_level(normalizer=normalizers.Lowercase())
    backend.add_tokens([AddedToken("<Tool>", normalized=True)])
    tokenizer = wrap(backend)
    view = byte_view(tokenizer)
    assert encode(tokenizer, view, "<tool>") is None
    assert encode(tokenizer, view, "<Tool>") == [tokenizer.convert_tokens_to_ids("<Tool>")]


def test_ids_that_nothing_has_are_none_and_the_view_reaches_to_the_highest() -> None:
    backend = byte_level()
    tokens = backend.get_vocab()
    lossy = small_tokenizer("byte-level, bytes missing")
    view = byte_view(lossy)
    assert len(view) == max(tokens.values()) + 1 > len(lossy)
    free = set(range(len(view))) - set(lossy.get_vocab().values())
    assert free
    assert all(view.tokens[index] is None and index not in view.special for index in free)
    assert view.missing_bytes() == (0x00, 0x04, 0x7F, 0xF0)


def test_entries_outside_the_byte_alphabet_are_read_as_they_are_spelled() -> None:
    """DeepSeek's vocabulary lists its special tokens, which are not written in the alphabet; so may others be."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**alphabet, "<｜end▁of｜>": 256, "｜": 257, "\x01": 258}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<｜end▁of｜>"])
    view = byte_view(backend)
    assert view.tokens[256:] == (None, "｜".encode(), b"\x01")
    assert [backend.decode([index]) for index in (257, 258)] == ["｜", "\x01"]


def test_byte_pieces_are_single_bytes_only_where_the_decoder_reads_them_so() -> None:
    assert byte_view(small_tokenizer("sentencepiece, always")).missing_bytes() == ()
    spelled = build_tokenizer()
    spelled.add_tokens(["<0x41>"])
    assert byte_view(spelled).tokens[-1] == b"<0x41>"
    plain = Tokenizer(models.Unigram([("<unk>", 0.0), ("<0x41>", -1.0), ("▁a", -2.0)], unk_id=0))
    plain.decoder = decoders.Metaspace()
    assert byte_view(plain).tokens == (b"<unk>", b"<0x41>", b" a")


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("byte-level, NFC", "see e\u0301!", "writes text in normal form NFC: 'e\u0301!' at character 4 becomes 'é!'"),
        ("byte-level, bytes missing", "a\x04b", "has no token for byte 0x04, in '\\x04' at character 1"),
        ("byte-level, bytes missing", "数👍", "has no token for byte 0xF0, in '👍' at character 1"),
        ("sentencepiece, no byte pieces", "48 数", "has no token for '数' at character 3"),
        ("sentencepiece, Llama 2", "a▁b", "reads '▁b' at character 1 as ' b'"),
        ("unigram, NFKC and single spaces", "the  clips", "reads ' clips' at character 4 as 'clips'"),
        ("unigram, NFKC and single spaces", "ﬁ", "writes text in normal form NFKC: 'ﬁ' at character 0 becomes 'fi'"),
        ("byte-level", "a\ud83d", "cannot write U+D83D at character 1: it is half a character"),
    ],
)
def test_the_first_change_is_told_in_one_line(name: str, text: str, line: str) -> None:
    tokenizer = small_tokenizer(name)
    assert alteration(tokenizer, byte_view(tokenizer), text) == line
    assert tokenise(tokenizer, byte_view(tokenizer), text) is None


def test_encoding_leaves_the_tokenizer_as_it_is_and_does_not_see_its_switches() -> None:
    tokenizer = wrap(byte_level())
    view, text = byte_view(tokenizer), "clips <|im_end|> sold " * 20
    before = tokenizer.encode(text)
    ids = encode(tokenizer, view, text)
    assert tokenizer.encode(text) == before != ids
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=512)
    backend.encode_special_tokens = True
    assert encode(tokenizer, view, text) == ids
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda part: encode(tokenizer, view, part), [text] * 32)) == [ids] * 32


def test_a_view_is_made_once_until_the_tokenizer_changes() -> None:
    tokenizer = wrap(byte_level())
    view = byte_view(tokenizer)
    assert byte_view(tokenizer) is view is byte_view(tokenizer.backend_tokenizer)
    encode(tokenizer, view, "a")
    tokenizer.add_tokens(["<tool_call>"])
    changed = byte_view(tokenizer)
    assert (len(changed), changed.tokens[-1]) == (len(view) + 1, b"<tool_call>")
    assert encode(tokenizer, changed, "<tool_call>") == [len(view)]
    tokenizer.add_special_tokens({"pad_token": "Ġclips"})  # an entry of the vocabulary becomes special
    assert byte_view(tokenizer).special[tokenizer.pad_token_id] == "Ġclips"


def test_alphabets_that_are_not_known_are_refused() -> None:
    backend = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match=r"not known.*WordPiece"):
        byte_view(backend)
    with pytest.raises(UserError, match=r"not known.*none"):
        byte_view(Tokenizer(models.BPE()))
    with pytest.raises(UserError, match=r"no tokenizer\.json.*fast"):
        byte_view(object())
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(object())
    with pytest.raises(UserError, match="a stage of one's own"):
        byte_view(backend)


@pytest.mark.parametrize("name", REAL or ["tokenizers/none"])
def test_real_tokenizers_keep_texts_or_say_why_not(name: str) -> None:
    tokenizer = real_tokenizer(name)
    view = byte_view(tokenizer)
    assert len(view) == len(tokenizer)
    missing, composing = set(view.missing_bytes()), isinstance(tokenizer.backend_tokenizer.normalizer, normalizers.NFC)
    indented = "if x:\n" + "".join(" " * width + "y\n" for width in range(1, 33))
    for text in (*PIECES, "".join(PIECES), indented):
        altered = missing & set(text.encode()) or (composing and not unicodedata.is_normalized("NFC", text))
        if view.kind == "sentencepiece":
            altered = "▁" in text
        for continued in (False, True):
            assert check(tokenizer, text, continued) != bool(altered), text


@pytest.mark.parametrize("name", REAL or ["tokenizers/none"])
def test_real_vocabularies_are_read_as_their_decoders_read_them(name: str) -> None:
    tokenizer = real_tokenizer(name)
    view, backend = byte_view(tokenizer), tokenizer.backend_tokenizer
    known = [index for index, token in enumerate(view.tokens) if token is not None]
    anchor = encode(tokenizer, view, "a", continued=True)
    for index in known[:: max(1, len(known) // 3000)]:
        if view.kind == "byte-level" or view.tokens[index].isascii():
            assert backend.decode([*anchor, index]) == "a" + view.tokens[index].decode(errors="replace")


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        (
            "smollm2",
            (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, 0xF5, 0xF6, *range(0xF7, 0x100)),
        ),
        ("qwen2.5", ()),
        ("llama-2", ()),
        ("deepseek-v3", ()),
    ],
)
def test_bytes_that_real_tokenizers_lack(name: str, missing: tuple[int, ...]) -> None:
    assert byte_view(real_tokenizer(f"tokenizers/{name}")).missing_bytes() == missing
