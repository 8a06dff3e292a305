"""`choice`: does the answer name the right option of a multiple choice?

Read as a person reads it: the last plain statement counts (`\\boxed{C}`, "the answer is (C)", "option C is correct", a
last line with nothing but C), else a last line or a first line that begins with "C." or "C)", else a bold **C**. Where
the options are known, the text of one is as good as its letter. A statement that names several letters is no answer.
Letters are capitals (in a box any), so that "a" and "A good idea" and "I think" are words.

All patterns are bounded and none repeats a repetition, so any text is read in linear time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from distill.records import Trace, Verdict
from teachers.prompts import last_boxed

NAME = "choice"
RULES = 1
WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|rm|bf)[ ]?\{([^{}]{0,1000})\}")
MARKUP = " \t\r*_`\"'$\\{}"
# What stands between the word and the letter: a verb or a colon, then perhaps "option" and markup.
LINK = r"[ \t*_`]{0,6}(?:(?:is|are|be|was|would be|should be|must be)\b|[:=])[ \t]?:?"
OPENING = r"[\s:*_`\"'$\\({\[]{0,8}"
CLOSING = r"[\s*_`\"'$\\)}\].]{0,8}"
FILLER = rf"{OPENING}(?:(?:option|choice|letter|text|therefore|thus|clearly|either|both)\b{OPENING})?"
LETTER = r"(?-i:([A-Z]))(?![A-Za-z0-9'’-])"
ANNOUNCED = re.compile(rf"\b(?:answers?|options?|choices?)\b{LINK}{FILLER}{LETTER}", re.IGNORECASE)
CONFIRMED = re.compile(
    rf"\b(?:option|choice|answer)\b{OPENING}{LETTER}{CLOSING}is (?:the |indeed |therefore ){{0,2}}"
    r"(?:correct|right|best|answer)\b",
    re.IGNORECASE,
)
ANSWER_TEXT = re.compile(rf"\banswer\b{LINK}([^\n]{{1,1000}})", re.IGNORECASE)
BOLD = re.compile(r"\*\*\(?([A-Z])[).:]?\*\*")
LABELLED = re.compile(r"[ \t*_`\"']{0,8}\(?([A-Z])(?:[).:]|\*\*)(?:[\s*]|$)")
ALONE = re.compile(r"[ \t*_`\"'$#>(\[]{0,8}([A-Z])[ \t*_`\"'$.:)\]]{0,8}")
MORE = re.compile(rf"{CLOSING}(?:,|/|&|\bor\b|\band\b|\bnor\b)(?: or\b| and\b)?{OPENING}([A-Z])(?![A-Za-z0-9'’])")
# After "the answer is A", these go on with the sentence; any other word makes the letter an article or a pronoun.
GOES_ON = re.compile(
    r"[ \t]*(?:[^\sA-Za-z]|$|\n|"
    r"(?:because|since|as|which|where|with|for|and|or|but|not|in|by|due|from|given|so|is|that)\b)"
)


@dataclass(frozen=True, slots=True)
class Statement:
    """What one statement names, and where it stands; no letter: several, or none of the options."""

    place: int
    letter: str | None


def choice(trace: Trace) -> Verdict:
    """Compare the option that the trace's answer names with its gold, a letter or the text of one of the options."""
    found = trace.meta.get("choices")
    choices = {str(key): str(text) for key, text in found.items()} if isinstance(found, Mapping) else {}
    if trace.gold is None:
        return Verdict(verifier=NAME, version=VERSION, score=None, reason="no gold")
    gold = gold_letter(trace.gold, choices)
    if gold is None:
        return Verdict(verifier=NAME, version=VERSION, score=None, reason="unreadable gold")
    letter = chosen(trace.answer, choices)
    if letter is None:
        return Verdict(verifier=NAME, version=VERSION, score=0.0, reason="no answer found")
    right = letter == gold
    reason = "equal" if right else "differs"
    return Verdict(verifier=NAME, version=VERSION, score=float(right), reason=reason, predicted=letter)


VERSION = f"rules {RULES}"


def gold_letter(gold: str, choices: Mapping[str, str]) -> str | None:
    """Return the letter a gold stands for: itself, or the option whose text it is; None where it is neither."""
    bare = _bare(gold).strip("().: ")
    if len(bare) == 1 and "A" <= bare.upper() <= "Z" and (not choices or bare.upper() in choices):
        return bare.upper()
    return _by_text(gold, choices)


def chosen(text: str, choices: Mapping[str, str]) -> str | None:
    """Return the letter of the option that a text decides for, or None."""
    stated = sorted(_statements(text, choices), key=lambda statement: statement.place)
    if stated:
        last = stated[-1]
        for before in reversed(stated[:-1]):
            between = text[before.place : last.place]
            if before.letter == last.letter or len(between) > 60:
                continue
            if re.fullmatch(r"[^A-Za-z]*\\boxed\{[^{}]*\}[\s$.]*(?:,|or|and|&|/)?[\s$]*", between):
                return None  # \boxed{A} and \boxed{B}
        return last.letter
    lines = [line for line in text.strip().split("\n") if line.strip()]
    if not lines:
        return None
    for letters in (_labels(reversed(lines)), _labels(iter(lines))):
        if letters:
            return letters.pop() if len(letters) == 1 else None
    bold = {match[1] for match in BOLD.finditer(text)}
    if bold:
        return bold.pop() if len(bold) == 1 else None
    return _by_text(lines[-1], choices) or _by_text(text, choices)


def _statements(text: str, choices: Mapping[str, str]) -> Iterator[Statement]:
    boxed = last_boxed(text)
    if boxed is not None:
        for opening, end in _boxes(text):
            content = last_boxed(text[opening : min(end, opening + 2000)]) or ""
            letter = _in_box(content, choices)
            if letter is not None or boxed == content:
                yield Statement(opening, letter)
    for pattern in (ANNOUNCED, CONFIRMED):
        for match in pattern.finditer(text):
            letter, after = match[1], text[match.end() : match.end() + 80]
            if letter in "AI" and not GOES_ON.match(after):
                continue
            more = MORE.match(after)
            if more is not None and more[1] in "AI" and not GOES_ON.match(after[more.end() :]):
                more = None
            yield Statement(match.start(), letter if more is None or more[1] == letter else None)
    for match in ANSWER_TEXT.finditer(text):
        letter = _by_text(match[1], choices)
        if letter is not None:
            yield Statement(match.start(), letter)
    last = text.rstrip().rpartition("\n")
    alone = ALONE.fullmatch(last[2].strip())
    if alone:
        yield Statement(len(last[0]) + 1, alone[1])


def _boxes(text: str) -> Iterator[tuple[int, int]]:
    """Yield where the last boxes begin, and where the next one does; earlier ones cannot matter."""
    end = len(text)
    for _ in range(4):
        start = text.rfind("\\boxed{", 0, end)
        if start < 0:
            return
        yield start, end
        end = start


def _in_box(content: str, choices: Mapping[str, str]) -> str | None:
    bare = _bare(content).strip("().:[] ")
    if len(bare) == 1 and "A" <= bare.upper() <= "Z":
        return bare.upper()
    labelled = LABELLED.match(_bare(content))
    if labelled and MORE.match(_bare(content)[labelled.end(1) :]) is None:
        return labelled[1]
    return _by_text(content, choices)


def _labels(lines: Iterator[str]) -> set[str]:
    """Return the letters that lines next to each other begin with: several are options that are told again."""
    letters: set[str] = set()
    for line in lines:
        match = LABELLED.match(line)
        if match is None:
            return letters
        letters.add(match[1])
    return letters


def _by_text(text: str, choices: Mapping[str, str]) -> str | None:
    """Return the letter of the one option whose text this is, up to case, markup and a full stop."""
    plain = _plain(text)
    found = [letter for letter, option in choices.items() if _plain(option) == plain]
    return found[0] if len(found) == 1 and plain else None


def _plain(text: str) -> str:
    return " ".join(_bare(text[:2000]).casefold().split()).strip(". ")


def _bare(text: str) -> str:
    """Return a text without the markup around it."""
    return WRAPPER.sub(r"\1", text).strip(MARKUP)
