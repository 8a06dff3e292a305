"""What one tokenizer does, found by trying: how it cuts numbers, what it changes, what its chat template writes.

Nothing is read off a class name or a config: numbers of growing length are encoded, awkward texts are encoded and read
back as bytes, and the template is rendered with known words. Two tokenizers side by side are `align.audit.comparison`.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from align.byte_view import ByteView, tokenise
from distill.errors import UserError
from distill.render import end_of_turn, render_prompt

LONGEST_NUMBER = 12
NUMBERS_OF_A_LENGTH = 24
UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}  # the others occur in no UTF-8 text
DIGITS = frozenset(b"0123456789")
# What encoding may lose, and a text that shows it.
AWKWARD = {
    "accents in two code points (e + ◌́)": "cafe\u0301 n\u0303",
    "compatibility characters (ﬁ ½ ①)": "ﬁ ½ ①",
    "line ends (CR LF)": "a\r\nb",
    "runs of spaces": "a   b     c",
    "spaces at the ends": "  a ",
    "no-break spaces": "a\u00a0b\u202fc",
    "joiners inside emoji": "👩\u200d👩\u200d👧 ✌\ufe0f",
    "tabs and control characters": "a\tb\x07c\x1bd",
    "capital letters": "AbC ÀÉ",
}
SYSTEM, USER, ANSWER, PAST = "qwertzsystem", "qwertzuser", "qwertzanswer", "qwertzpast"


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitPolicy:
    """How a tokenizer cuts numbers.

    Attributes:
        most: digits of the longest token seen in numbers of up to 12 digits.
        fixed: whether numbers of one length are always cut alike, whatever their digits.
        first_short: of fixed groups, whether the short one comes first (1 234) or last (123 4); None for one digit.
        after_space: whether a number's first token takes the space before it.
    """

    most: int
    fixed: bool
    first_short: bool | None
    after_space: bool

    def __str__(self) -> str:
        if not self.most:
            return "none: it cannot write numbers"
        if not self.fixed:
            return f"any number, by the digits (up to {self.most} seen)"
        if self.most == 1:
            return "1"
        return f"up to {self.most}, counted from the {'right' if self.first_short else 'left'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """What a chat template writes around the texts of a conversation.

    Attributes:
        default_system: the system prompt it puts where none is given; "" for none.
        header: other words it writes before the first message, whatever the messages.
        dated: whether what it writes depends on today's date.
        takes_system: whether it accepts a system message.
        opens: the special token a prompt begins with; "" for none.
        prefill: the beginning of the answer that its generation prompt already writes, such as `<think>`.
        end: what it writes behind an answer, up to the token that stops generation.
        drops_reasoning: whether `<think>...</think>` of earlier turns disappears.
    """

    default_system: str
    header: str
    dated: bool
    takes_system: bool
    opens: str
    prefill: str
    end: str
    drops_reasoning: bool


def digit_policy(tokenizer: Any, view: ByteView) -> DigitPolicy:
    """Return how numbers of 1 to 12 digits are cut, from 24 of each length."""
    draw = random.Random(0)
    shapes: dict[int, set[tuple[int, ...]]] = {}
    for length in range(1, LONGEST_NUMBER + 1):
        numbers = ("".join(draw.choice("0123456789") for _ in range(length)) for _ in range(NUMBERS_OF_A_LENGTH))
        shapes[length] = {_digits(tokenizer, view, number) for number in numbers}
    fixed = all(len(shape) == 1 for shape in shapes.values())
    most = max(max(shape, default=0) for group in shapes.values() for shape in group)
    short = next(iter(shapes[most + 1])) if fixed and 1 < most < LONGEST_NUMBER else ()
    spaced = _tokens(tokenizer, view, "a 7")
    return DigitPolicy(
        most=most,
        fixed=fixed,
        first_short=short[0] < short[-1] if short else None,
        after_space=any(token[:1] == b" " and DIGITS & set(token) for token in spaced),
    )


def _digits(tokenizer: Any, view: ByteView, number: str) -> tuple[int, ...]:
    counts = (sum(byte in DIGITS for byte in token) for token in _tokens(tokenizer, view, number))
    return tuple(count for count in counts if count)


def _tokens(tokenizer: Any, view: ByteView, text: str) -> list[bytes]:
    found = tokenise(tokenizer, view, text, continued=True)
    return [] if found is None else found.pieces


def changes(tokenizer: Any, view: ByteView) -> tuple[str, ...]:
    """Return which kinds of text do not come back byte for byte from encoding."""
    return tuple(kind for kind, text in AWKWARD.items() if tokenise(tokenizer, view, text, continued=True) is None)


def template_of(tokenizer: Any, *, stop_ids: Any = None) -> Template | None:
    """Return what a tokenizer's chat template writes, by rendering it; None where there is none.

    Raises:
        UserError: the template cannot be rendered at all.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
    alone, prefill = render_prompt(tokenizer, [user])
    opening = alone.partition(USER)[0]
    try:
        given, _ = render_prompt(tokenizer, [{"role": "system", "content": SYSTEM}, user])
        before, found, after = given.partition(SYSTEM)
        closing = after.partition(USER)[0]
    except UserError:
        before = found = closing = ""
    default = ""
    if found and opening.startswith(before) and opening.endswith(closing):
        default = opening[len(before) : len(opening) - len(closing)]
        header = _words(tokenizer, before)
    else:
        header = _words(tokenizer, opening)
    past = {"role": "assistant", "content": f"<think>\n{PAST}\n</think>\n\n{ANSWER}"}
    try:
        kept = PAST in render_prompt(tokenizer, [user, past, user])[0]
    except UserError:
        kept = True
    first = next(iter(tokenizer.encode(alone, add_special_tokens=False, verbose=False)), None)
    added = tokenizer.added_tokens_decoder.get(first)
    return Template(
        default_system=_words(tokenizer, default),
        header=header,
        dated=bool(re.search(r"strftime_now|date_string", str(tokenizer.chat_template))),
        takes_system=bool(found),
        opens=added.content if added is not None and added.special else "",
        prefill=prefill,
        end=end_of_turn(tokenizer, [user, answer], stop_ids),
        drops_reasoning=not kept,
    )


def _words(tokenizer: Any, text: str) -> str:
    """Return a template's text without special tokens and the bare names of roles."""
    names = {added.content for added in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    for name in sorted(names - {""}, key=len, reverse=True):
        text = text.replace(name, "\n")
    lines = (" ".join(line.split()) for line in text.splitlines())
    return " ".join(line for line in lines if line and line.lower() not in {"system", "user", "assistant", "model"})
