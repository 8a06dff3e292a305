"""An example's text in the teacher's tokens: its own prompt, the answer's bytes tokenised anew, and where the two meet.

The student's tokens are given and stay as they are, canonical or not: they are what it is trained on. Only what the
assistant itself wrote is aligned; each side has the prompt that its own chat template makes of the conversation, with
reasoning opened by the template or not, and its own token that ends a turn. Those two tokens are a span, the last.

A text that the teacher's tokenizer would change is not aligned at all. One in which the student wrote a special token
is aligned up to there, and with it where the teacher has one that means the same. Bytes that are no character, which a
student may write, are to the teacher the tokens of single bytes; one for which it has none ends the text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from align.byte_view import ByteView, Tokens, byte_view, tokenise
from align.spans import spans_of
from distill.records import Message
from distill.render import OPENED, Example, Other, continuation, end_of_turn, render_prompt

LONE = re.compile("([\udc80-\udcff])")  # a byte that is no character, as `surrogateescape` writes it
TAIL = 16  # tokens at the end of a prompt in which a template may have opened the reasoning


@dataclass(frozen=True, slots=True)
class Side:
    """One model's tokenizer, as pairing uses it.

    Attributes:
        tokenizer: the model's.
        view: its ids as bytes.
        stops: the ids that end an answer.
        closing: (E,) what the chat template writes behind an answer, up to the stop token; that token alone where there
            is no template.
        single: byte -> the token that stands for it alone.
    """

    tokenizer: Any
    view: ByteView
    stops: frozenset[int]
    closing: tuple[int, ...]
    single: Mapping[int, int]

    @property
    def before_stop(self) -> bytes:
        """The text that the template writes between an answer and the stop token: with most templates none."""
        return b"".join(self.written(self.closing).pieces)

    def written(self, ids: Sequence[int]) -> Written:
        """Return the text that a completion's tokens stand for, up to its end or its first special token."""
        pieces: list[bytes] = []
        for token in ids:
            piece = self.view.tokens[token] if 0 <= token < len(self.view) else None
            if piece is None or token in self.stops:
                return Written(pieces, token in self.stops)
            pieces.append(piece)
        return Written(pieces, False)

    def opened(self, prompt: Sequence[int]) -> str:
        """Return the beginning of the assistant's text that a prompt ends with: reasoning opened by a template."""
        text = self.tokenizer.decode(list(prompt[-TAIL:]), clean_up_tokenization_spaces=False)
        found = OPENED.search(text)
        return found.group() if found else ""


class Written(NamedTuple):
    """The tokens of a completion that stand for text, as bytes, and whether a stop token follows them."""

    pieces: list[bytes]
    ended: bool


def side(tokenizer: Any, stops: Collection[int]) -> Side:
    """Return a model's side.

    Args:
        stops: the ids that end an answer, the one that plain text ends with first.

    Raises:
        UserError: a tokenizer whose tokens cannot be read as bytes, or a chat template that cannot be rendered.
    """
    view, closing = byte_view(tokenizer), list(stops)[:1]
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
        text = end_of_turn(tokenizer, turns, stops)
        closing = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    single = {token[0]: index for index, token in enumerate(view.tokens) if token and len(token) == 1}
    return Side(tokenizer, view, frozenset([*stops, *closing[-1:]]), tuple(closing), single)


def teacher_prompt(teacher: Side, conversation: list[Message] | tuple[str, str]) -> list[int]:
    """Return the ids of the prompt as the teacher's own template renders it, or of a plain string.

    Raises:
        UserError: the tokenizer has no chat template, or it refuses the messages.
    """
    if isinstance(conversation, tuple):
        return list(teacher.tokenizer.encode(conversation[0])) if conversation[0] else []
    text, _ = render_prompt(teacher.tokenizer, conversation[:-1])
    return list(teacher.tokenizer.encode(text, add_special_tokens=False, verbose=False))


def pair(
    student: Side,
    teacher: Side,
    example: Example,
    prompt: Sequence[int],
    *,
    specials: Mapping[int, int] | None = None,
    sampled: Sequence[int] | None = None,
) -> Other | None:
    """Return what the teacher reads in the place of an example, None where its tokens are not the same bytes.

    Args:
        example: the student's; `begin` says where its completion begins.
        prompt: the teacher's prompt.
        specials: student id -> teacher id of special tokens that mean the same.
        sampled: the teacher's tokens of the completion, where they are given; the prompt is then left out, as stored
            numbers have none.
    """
    given = example.input_ids.tolist()
    own = student.written(given[example.begin :])
    text = b"".join(own.pieces)
    if own.ended:
        text = text.removesuffix(student.before_stop)
    if sampled is None:
        # The student's token that the text ends with, and what the teacher reads in its place.
        ending = teacher.closing if own.ended else _partner(given, example.begin + len(own.pieces), specials or {})
        text, read = _anew(teacher, student.opened(given[: example.begin]), text, prompt, ending)
    else:
        read = _as_stored(teacher, sampled)
    common = min(text, read.text, key=len) if read is not None else b""
    if read is None or not (text.endswith(common) and read.text.endswith(common)):
        return None
    spans = _overlap(own.pieces, len(text) - len(common), read.pieces, len(read.text) - len(common), common)
    if spans is None:
        return None
    if read.stop is not None and (own.ended or sampled is None):
        spans = np.concatenate([spans, [[len(own.pieces), len(own.pieces) + 1, read.stop, read.stop + 1]]])
    spans = spans + np.array([example.begin, example.begin, read.begin, read.begin])
    predicted = spans[:, 2] >= (1 if sampled is None else 0)  # nothing predicts the first token of a sequence
    untrained = np.cumsum(np.concatenate([[0], example.weights <= 0]))
    trained = untrained[spans[:, 1]] == untrained[spans[:, 0]]
    spans = spans[predicted & trained]
    return Other(np.array(read.ids, np.int32), read.begin, spans.astype(np.int32)) if len(spans) else None


class _Read(NamedTuple):
    """A text in the teacher's tokens: all ids, where its completion begins, the pieces and bytes of that, and which of
    its tokens, counted from there, is met by the one that ends the student's; None for none."""

    ids: list[int]
    begin: int
    pieces: list[bytes]
    text: bytes
    stop: int | None


def _anew(
    teacher: Side, opened: str, text: bytes, prompt: Sequence[int], ending: Sequence[int]
) -> tuple[bytes, _Read | None]:
    """Return how much of a text the teacher can read, and that in its tokens; None where its tokenizer changes it.

    Args:
        opened: the beginning of the student's text, which its template wrote.
        ending: what follows the text if it is read whole, the last of it meeting the student's own end.
    """
    spelled, whole = _writable(text.decode(errors="surrogateescape"), teacher)
    text = spelled.encode(errors="surrogateescape")
    tokens = _tokens(teacher, continuation(teacher.opened(prompt), opened + spelled))
    if tokens is None:
        return text, None
    ending = ending if whole else ()
    stop = len(tokens.pieces) + len(ending) - 1 if ending else None
    ids = [*prompt, *tokens.ids, *ending]
    return text, _Read(ids, len(prompt), tokens.pieces, b"".join(tokens.pieces), stop)


def _as_stored(teacher: Side, sampled: Sequence[int]) -> _Read:
    """Return the teacher's own tokens of a completion."""
    pieces, ended = teacher.written(sampled)
    text = b"".join(pieces)
    if ended:
        text = text.removesuffix(teacher.before_stop)
    return _Read(list(sampled), 0, pieces, text, len(pieces) if ended else None)


def _partner(ids: Sequence[int], place: int, specials: Mapping[int, int]) -> tuple[int, ...]:
    """Return the teacher's token for the special one at a place, () where it has none or the sequence ends there."""
    return (specials[ids[place]],) if place < len(ids) and ids[place] in specials else ()


def _writable(text: str, side: Side) -> tuple[str, bool]:
    """Return a text up to its first lone byte that a side has no token for, and whether that is all of it."""
    for lone in LONE.finditer(text):
        if ord(lone.group()) - 0xDC00 not in side.single:
            return text[: lone.start()], False
    return text, True


def _tokens(side: Side, text: str) -> Tokens | None:
    """Return a side's tokens of a text, lone bytes apart; None where its tokenizer changes the text."""
    whole = Tokens([], [])
    for part in LONE.split(text):
        if LONE.fullmatch(part):
            byte = ord(part) - 0xDC00
            tokens: Tokens | None = Tokens([side.single[byte]], [bytes([byte])])
        else:
            tokens = tokenise(side.tokenizer, side.view, part, continued=True)
        if tokens is None:
            return None
        whole = Tokens(whole.ids + tokens.ids, whole.pieces + tokens.pieces)
    return whole


def _overlap(
    student: Sequence[bytes], student_skip: int, teacher: Sequence[bytes], teacher_skip: int, common: bytes
) -> np.ndarray | None:
    """Return (S, 4) int64 the spans of a text that both sides have, each after `skip` bytes of its own.

    Tokens that reach over an end of it are in no span. None where the sides are not the same bytes.
    """
    parts, firsts, ends = [], [], []
    for pieces, skip in ((student, student_skip), (teacher, teacher_skip)):
        stops = np.cumsum([len(piece) for piece in pieces], dtype=np.int64) - skip
        starts = stops - np.array([len(piece) for piece in pieces], dtype=np.int64)
        inside = np.flatnonzero((starts >= 0) & (stops <= len(common)))
        if len(inside) == 0:
            return np.zeros((0, 4), np.int64)
        first, last = inside[0], inside[-1]
        head, tail = common[: starts[first]], common[stops[last] :]
        parts.append([*([head] if head else []), *pieces[first : last + 1], *([tail] if tail else [])])
        firsts.append(first - bool(head))
        ends.append((bool(head), bool(tail)))
    try:
        found = spans_of(*parts)
    except ValueError:
        return None
    spans = np.concatenate([found.student + firsts[0], found.teacher + firsts[1]], 1)
    cut = slice(int(any(head for head, _ in ends)), len(spans) - int(any(tail for _, tail in ends)))
    return spans[cut]
