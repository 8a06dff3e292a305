"""A completion taken apart: the reasoning inside `<think>...</think>`, and the answer after it."""

from __future__ import annotations

from dataclasses import dataclass

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Parts:
    """`fault` says what is wrong with the tags, None when nothing is; without tags, all of the text is the answer."""

    reasoning: str
    answer: str
    fault: str | None


def split_reasoning(text: str, *, required: bool) -> Parts:
    """Split a completion at its reasoning tags.

    A reasoning that never closes leaves no answer: what stands inside it was not said as the answer.

    Args:
        required: the tags must be there.
    """
    opened, closed = text.count(OPEN), text.count(CLOSE)
    if not opened and not closed:
        return Parts("", text.strip(), "no <think>" if required else None)
    before, _, rest = text.partition(OPEN) if opened else ("", "", text)
    inside, closing, answer = rest.rpartition(CLOSE)
    if not closing:
        return Parts(rest.strip(), "", "unclosed <think>")
    inside, answer = inside.strip(), answer.strip()
    if opened != 1 or closed != 1:
        return Parts(inside, answer, f"{opened} <think> and {closed} </think>")
    if before.strip():
        return Parts(inside, answer, "text before <think>")
    if not answer:
        return Parts(inside, answer, "empty answer")
    return Parts(inside, answer, None)
