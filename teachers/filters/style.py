"""`language_mix`, `long_paragraph` and `code_block`: what DeepSeek-R1 left out of its traces (arXiv 2501.12948).

Published ablations found no gain in leaving such traces out (OpenThoughts, arXiv 2506.04178), so these only flag unless
`--drop` names them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from distill.records import Trace
from teachers.filters.siblings import Siblings

# First words of Unicode's names of letters. Latin and Greek are not here: mathematics is written in them.
EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO")  # one script here: Japanese mixes them within a sentence
INDIC = ("BENGALI", "DEVANAGARI", "GUJARATI", "GURMUKHI", "KANNADA", "MALAYALAM", "ORIYA", "SINHALA", "TAMIL", "TELUGU")
WESTERN = ("ARABIC", "ARMENIAN", "CYRILLIC", "ETHIOPIC", "GEORGIAN", "HEBREW")
EASTERN = ("HANGUL", "KHMER", "LAO", "MONGOLIAN", "MYANMAR", "THAI", "TIBETAN")
SCRIPTS = {**dict.fromkeys(EAST_ASIAN, "CJK"), **{name: name for name in (*INDIC, *WESTERN, *EASTERN)}}
SPACELESS = {"CJK", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}  # written without spaces: a letter counts as a word
FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)


def language_mix(trace: Trace, siblings: Siblings) -> bool:
    """More than a small share of the words are in a script that the prompt has no letter of; code does not count.

    A word is what stands between white space; in Chinese, Japanese, Thai and the like each letter is one. Latin and
    Greek letters are never foreign, so English in a Chinese trace is not seen.
    """
    texts = [message["content"] for message in trace.messages]
    return foreign_share(trace.completion, texts) > siblings.options.foreign_share


def foreign_share(text: str, own_texts: Iterable[str]) -> float:
    """Return the share of the words of `text`, code left out, in a script that none of `own_texts` has a letter of."""
    if text.isascii():
        return 0.0
    prose = _without_code(text)
    scripts = {letter: script for letter in set(prose) if (script := script_of(letter))}
    own = {script_of(letter) for known in own_texts for letter in set(known)}
    foreign = {letter for letter, script in scripts.items() if script not in own}
    if not foreign:
        return 0.0
    spaceless = {letter for letter, script in scripts.items() if script in SPACELESS}
    spaced = foreign - spaceless
    pieces, counts = prose.split(), Counter(prose)
    found = sum(counts[letter] for letter in foreign & spaceless)
    found += sum(not spaced.isdisjoint(piece) for piece in pieces) if spaced else 0
    return found / (len(pieces) + sum(counts[letter] for letter in spaceless))


@lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str | None:
    """Return the script of a letter, or None for Latin, Greek and whatever is no letter."""
    if character < "\u0400" or not character.isalpha():
        return None
    return SCRIPTS.get(unicodedata.name(character, "").partition(" ")[0])


def _without_code(text: str) -> str:
    """Return the text outside of closed code fences."""
    parts = text.split("```")
    return "\n".join(parts[::2] if len(parts) % 2 else [*parts[:-1:2], parts[-1]])


def long_paragraph(trace: Trace, siblings: Siblings) -> bool:
    """A paragraph runs on for thousands of characters without a line break."""
    limit = siblings.options.paragraph
    return len(trace.completion) > limit and any(len(line) > limit for line in trace.completion.split("\n"))


def code_block(trace: Trace, siblings: Siblings) -> bool:
    """A line opens a fenced block of code."""
    return FENCE.search(trace.completion) is not None
