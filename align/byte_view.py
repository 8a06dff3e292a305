"""Any tokenizer as bytes: what each token id stands for in a text, read from the vocabulary itself.

Never from decoding a token alone: half of a character decodes to a replacement mark, and a sentencepiece token loses
its space. How a vocabulary spells bytes is in `align.spelling`.

Special tokens stand for no text: what a user types as `<|im_end|>` is ten bytes and never that token. Added tokens that
are not special (`<tool_call>` in Qwen2.5) stand for their spelling, and so do the marks of reasoning, however a
tokenizer flags them, because a completion's text contains them.

`tokenise` goes the other way, and checks: not every tokenizer keeps every text (normal forms, collapsed spaces, bytes
without a token), and one that changes a text cannot be compared over it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer

from align.spelling import openings, reader_of, stages_of
from distill.errors import UserError

REASONING_MARKS = ("<think>", "</think>")
NORMAL_FORMS: tuple[Literal["NFC", "NFKC", "NFD", "NFKD"], ...] = ("NFC", "NFKC", "NFD", "NFKD")

# backend -> what was made of it, with what tells that it has changed since
_views: WeakKeyDictionary[Tokenizer, tuple[Any, ByteView]] = WeakKeyDictionary()
_encoders: WeakKeyDictionary[Tokenizer, dict[bool, tuple[int, Tokenizer]]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class ByteView:
    """A tokenizer's ids as bytes.

    Attributes:
        tokens: by id up to the highest, the bytes a token stands for; None for special tokens and ids that nothing has.
        special: id -> spelling of the special tokens, the marks of reasoning left out.
        kind: "byte-level" or "sentencepiece".
        leading_space: whether a text encoded from its beginning gets a space before it (sentencepiece's dummy prefix).
        added: ids of added tokens that stand for text: found in it before all others, whatever is around them.
    """

    tokens: tuple[bytes | None, ...]
    special: dict[int, str]
    kind: str
    leading_space: bool
    added: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, ids: Iterable[int]) -> list[bytes]:
        """Return the bytes of each token of a text.

        Raises:
            ValueError: a special token or an id outside the vocabulary, which stand for no text.
        """
        found = []
        for token in ids:
            text = self.tokens[token] if 0 <= token < len(self.tokens) else None
            if text is None:
                raise ValueError(f"token {token} ({self.special.get(token, 'unknown')}) stands for no text")
            found.append(text)
        return found

    def missing_bytes(self) -> tuple[int, ...]:
        """Return which of the 256 bytes no token stands for alone: texts with them may not be kept."""
        missing = {bytes([byte]) for byte in range(256)}.difference(self.tokens)
        return tuple(sorted(byte for token in missing for byte in token))


class Tokens(NamedTuple):
    """T tokens of a text: their ids, and the bytes of the text that each covers (joined, they are the text)."""

    ids: list[int]
    pieces: list[bytes]


def byte_view(tokenizer: Any) -> ByteView:
    """Return what each id of a tokenizer stands for; a tokenizer that has not changed is read once.

    Args:
        tokenizer: a transformers tokenizer with a tokenizer.json behind it, or a `tokenizers.Tokenizer`.

    Raises:
        UserError: a tokenizer written in Python, or one whose alphabet is not known.
    """
    backend = _backend(tokenizer)
    added = backend.get_added_tokens_decoder()
    stamp = (backend.get_vocab_size(), [(index, token.content, token.special) for index, token in added.items()])
    known = _views.get(backend)
    if known is None or known[0] != stamp:
        known = _views[backend] = stamp, _read(backend, added, type(tokenizer).__name__)
    return known[1]


def tokenise(tokenizer: Any, view: ByteView, text: str, *, continued: bool = False) -> Tokens | None:
    """Encode a text and check that its tokens stand for exactly this text; return None where they do not.

    No special token comes out: none is added, and the spelling of one in the text stays text. May be called by many
    threads at once.

    Args:
        view: the tokenizer's `byte_view`.
        continued: the text continues another (a completion behind its prompt), so no space is put before it. From its
            beginning, a space that sentencepiece puts there is a token, or part of one, that covers no byte of it.
    """
    try:
        wanted = text.encode()
    except UnicodeEncodeError:
        return None
    ids = _encoder(tokenizer, continued).encode(text, add_special_tokens=False).ids
    pieces = [view.tokens[token] for token in ids]
    if None in pieces:
        return None
    found: list[bytes] = pieces  # type: ignore[assignment]
    joined = b"".join(found)
    if joined != wanted:
        if continued or not view.leading_space or joined != b" " + wanted:
            return None
        found[0] = found[0][1:]
    return Tokens(ids, found)


def encode(tokenizer: Any, view: ByteView, text: str, *, continued: bool = False) -> list[int] | None:
    """Return the ids of a text, or None where the tokenizer changes it: the ids of `tokenise`."""
    tokens = tokenise(tokenizer, view, text, continued=continued)
    return None if tokens is None else tokens.ids


def alteration(tokenizer: Any, view: ByteView, text: str, *, continued: bool = False) -> str | None:
    """Return in one line what a tokenizer changes about a text, at the first place; None where `tokenise` keeps it.

    The line continues a sentence that names the tokenizer: "reads 'x' at character 3 as 'y'".
    """
    if tokenise(tokenizer, view, text, continued=continued) is not None:
        return None
    try:
        wanted = text.encode()
    except UnicodeEncodeError as error:
        return f"cannot write U+{ord(text[error.start]):04X} at character {error.start}: it is half a character"
    encoding = _encoder(tokenizer, continued).encode(text, add_special_tokens=False)
    pieces = [view.tokens[token] for token in encoding.ids]
    if None in pieces:
        begin, end = encoding.offsets[pieces.index(None)]
        return f"has no token for {text[begin:end]!r} at character {begin}"
    found = b"".join(piece for piece in pieces if piece is not None)
    if view.leading_space and not continued:
        found = found.removeprefix(b" ")
    equal = next((at for at, both in enumerate(zip(found, wanted, strict=False)) if both[0] != both[1]), len(found))
    character = len(wanted[:equal].decode(errors="ignore"))
    given, read = text[character : character + 12], found[len(text[:character].encode()) :].decode(errors="replace")
    for form in NORMAL_FORMS:
        if unicodedata.normalize(form, text).encode() == found:
            return f"writes text in normal form {form}: {given!r} at character {character} becomes {read[:12]!r}"
    lost = bytes(set(wanted) - set(found))
    if wanted.translate(None, lost) == found and bytes([wanted[equal]]) not in view.tokens:
        return f"has no token for byte 0x{wanted[equal]:02X}, in {given[:1]!r} at character {character}"
    return f"reads {given!r} at character {character} as {read[:12]!r}"


def _backend(tokenizer: Any) -> Tokenizer:
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{type(tokenizer).__name__} has no tokenizer.json behind it, so its tokens cannot be read as bytes: "
            "load the fast version"
        )
    return backend


def _read(backend: Tokenizer, added: dict[int, AddedToken], name: str) -> ByteView:
    rules = stages_of(backend)
    kind, read = reader_of(rules, name)
    vocabulary = backend.get_vocab(with_added_tokens=False)
    tokens: list[bytes | None] = [None] * (max([*vocabulary.values(), *added], default=-1) + 1)
    for spelling, index in vocabulary.items():
        tokens[index] = read(spelling)
    special, beside = {}, []
    for index, token in added.items():
        if token.special and token.content not in REASONING_MARKS:
            tokens[index], special[index] = None, token.content
        elif token.content not in vocabulary:  # Gemma adds `▁▁`, which its vocabulary also has: two spaces
            tokens[index] = token.content.encode()
            beside.append(index)
    return ByteView(tuple(tokens), special, kind, bool(openings(rules)), tuple(beside))


def _encoder(tokenizer: Any, continued: bool) -> Tokenizer:
    """Return a private encoder that shares a tokenizer's model: it keeps special tokens in texts as text.

    The tokenizer's own switch for that (`encode_special_tokens`) is a setting of the shared object, like truncation
    and padding: other threads would see it change.
    """
    backend = _backend(tokenizer)
    size = backend.get_vocab_size()
    made = _encoders.setdefault(backend, {})
    if continued not in made or made[continued][0] != size:
        rules = stages_of(backend)
        if continued:
            for stage, without in openings(rules):
                stage.update(without)
        encoder = Tokenizer.from_str(json.dumps(rules))
        encoder.model = backend.model
        added = backend.get_added_tokens_decoder()
        encoder.add_tokens([_as_text(added[index]) for index in sorted(added)])
        assert {index: token.content for index, token in encoder.get_added_tokens_decoder().items()} == {
            index: token.content for index, token in added.items()
        }, "tokens that are added in the order of their ids get these ids again"
        encoder.encode_special_tokens = True
        made[continued] = size, encoder
    return made[continued][1]


def _as_text(token: AddedToken) -> AddedToken:
    """Return an added token that is found in texts if it stands for text."""
    if token.content in REASONING_MARKS:
        token.special = False
    return token
