"""Texts as sequences of words, and sequences of words as numbers: what overlap is measured on.

Case, punctuation, white space and the many ways to write one character are folded; numbers and, where asked, the signs
of a formula stay.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from zlib import crc32

import numpy as np

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # written without spaces: each is a word
_WORD = rf"\d{{1,3}}(?:,\d{{3}})+(?!\w)(?:\.\d+)?|\d+\.\d+|[{_IDEOGRAPHS}]|[^\W_{_IDEOGRAPHS}]+"
# A hyphen inside a compound is punctuation, and so are the doubled stars of Markdown.
_SIGN = r"[+/=<>^]|(?<!\*)\*(?!\*)|(?<![^\W\d_]{2})-|-(?![^\W\d_]{2})"
WORDS = re.compile(_WORD)
MARKS = re.compile(f"{_WORD}|{_SIGN}")
_ONE_SIGN = str.maketrans({"−": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/"})

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def words(text: str) -> list[str]:
    """Return the words and numbers of a text: case folded, `1,234` as `1234`, each ideograph for itself."""
    return _without_commas(WORDS.findall(_folded(text)))


def marks(text: str) -> list[str]:
    """Return words, numbers and the signs `+ - * / = < > ^`, in order."""
    return _without_commas(MARKS.findall(_folded(text).translate(_ONE_SIGN)))


def is_sign(mark: str) -> bool:
    """Return whether one of `marks` is no word and no number."""
    return len(mark) == 1 and mark in "+-*/=<>^"


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _without_commas(tokens: list[str]) -> list[str]:
    return [token.replace(",", "") if "," in token else token for token in tokens]


def grams(tokens: Sequence[str], size: int) -> np.ndarray:
    """Return a 64-bit number for each `size` tokens in a row, (len(tokens) - size + 1,) or none; equal where they are.

    The numbers are the same on every machine; two different grams share one with a chance of 2^-32 or less.
    """
    if len(tokens) < size:
        return np.zeros(0, dtype=np.uint64)
    numbers = {token: crc32(token.encode("utf-8", "surrogatepass")) for token in set(tokens)}
    singles = mixed(np.fromiter(map(numbers.__getitem__, tokens), dtype=np.uint64, count=len(tokens)))
    count = len(tokens) - size + 1
    named = singles[:count].copy()
    for offset in range(1, size):
        named *= _GOLDEN
        named += singles[offset : offset + count]
    return mixed(named)


def mixed(values: np.ndarray) -> np.ndarray:
    """Return 64-bit numbers scattered over the whole range (the finaliser of SplitMix64)."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
