"""How a tokenizer splits pieces of text given as bytes, for many at once; and longest known beginnings.

The tokenizer's merges are asked directly, without its normaliser and pre-tokeniser: bytes are a *piece* of a text here,
and half a character is legal. So a space is a space for sentencepiece too, and none is put in front.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from align.byte_view import ByteView
from align.spelling import byte_letters

SPACE = "▁"  # sentencepiece's


class Splits:
    """Asks a tokenizer for the tokens of byte strings, each once.

    Args:
        tokenizer: a fast transformers tokenizer, or a `tokenizers.Tokenizer`.
        view: its vocabulary as bytes.
    """

    def __init__(self, tokenizer: Any, view: ByteView) -> None:
        self.view = view
        self._model = getattr(tokenizer, "backend_tokenizer", tokenizer).model
        self._known: dict[bytes, tuple[int, ...]] = {}
        self._letters = byte_letters()
        self._bytes = {token: index for index, token in enumerate(view.tokens) if token and len(token) == 1}

    def first(self, texts: Iterable[bytes]) -> np.ndarray:
        """Return (N,) int64, the token that each begins with; -1 where the vocabulary cannot write its first byte."""
        return np.array([next(iter(self.split(text)), -1) for text in texts], np.int64)

    def at(self, texts: Sequence[bytes], place: int) -> np.ndarray:
        """Return (N,) int64, the token that begins at a byte of each; -1 where none does."""
        return np.array([self._at(text, place) for text in texts], np.int64)

    def first_is_longer(self, texts: Iterable[bytes], size: int) -> np.ndarray:
        """Return (N,) bool, whether each begins with a token of more than `size` bytes; nothing is remembered."""
        begins = [self._split(text)[:1] for text in texts]
        return np.array([len(b"".join(self.view.of(begin))) > size for begin in begins], bool)

    def split(self, text: bytes) -> tuple[int, ...]:
        """Return the tokens of some bytes, up to the first byte that the vocabulary cannot write."""
        found = self._known.get(text)
        if found is None:
            found = self._known[text] = self._split(text)
        return found

    def _at(self, text: bytes, place: int) -> int:
        begin, tokens = 0, self.view.tokens
        for token in self.split(text):
            if begin >= place:
                return token if begin == place else -1
            begin += len(tokens[token] or b"")
        return -1

    def _split(self, text: bytes) -> tuple[int, ...]:
        if self.view.kind == "byte-level":
            piece = "".join([self._letters[byte] for byte in text])
        else:
            piece = _whole_characters(text).replace(" ", SPACE)
        ids, begin, tokens = [], 0, self.view.tokens
        for token in self._model.tokenize(piece):
            own = tokens[token.id]
            if not own or not text.startswith(own, begin):
                break
            ids.append(int(token.id))
            begin += len(own)
        for byte in text[begin:]:  # half a character of sentencepiece's, or a byte that has no token
            token = self._bytes.get(bytes([byte]))
            if token is None:
                break
            ids.append(token)
        return tuple(ids)


def longest_prefixes(texts: Iterable[bytes | None], known: Collection[bytes]) -> list[bytes | None]:
    """Return for each text the longest of the known byte strings that it begins with; None where there is none."""
    lengths = np.zeros(1 + max(map(len, known), default=0), bool)
    lengths[[len(each) for each in known]] = True
    tried = [int(length) for length in np.flatnonzero(lengths)[::-1]]
    found: list[bytes | None] = []
    for text in texts:
        if not text or text in known:
            found.append(text or None)
            continue
        beginnings = (text[:length] for length in tried if length < len(text))
        found.append(next((each for each in beginnings if each in known), None))
    return found


def _whole_characters(text: bytes) -> str:
    """Return the characters that some bytes begin with, up to the first that is not whole."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        return text[: error.start].decode()
