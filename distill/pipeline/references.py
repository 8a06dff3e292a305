"""`${...}` inside a pipeline's values: how it is written, and what takes its place.

`${vars.rate}` and `${rewards.maths}` are values of those sections, `${seed}` the value of an axis of the stage, and
`${student}` the folder of another stage; `${student[0]}`, `${student[arm=soft, seed=*]}` choose among its instances.
Alone in a value it keeps its kind (a number, a list); inside a text it is written into it. `$${` is a plain `${`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from distill.errors import UserError

_MARK = re.compile(r"\$\$\{|\$\{([^{}]*)\}|\$\{")
_INSIDE = re.compile(r"\s*([A-Za-z][\w-]*)(?:\.([\w-]+))?\s*(?:\[([^\[\]]*)\])?\s*")
ALL, ONLY = "*", ""  # in an index: every label; the axis of a stage that has one axis, which needs no name


@dataclass(frozen=True, slots=True)
class Reference:
    """`${name.key[index]}`; `index` is axis -> label, None where there are no brackets."""

    name: str
    key: str | None = None
    index: Mapping[str, str] | None = None
    text: str = field(default="", compare=False)  # as it was written, for messages


@dataclass(frozen=True, slots=True)
class Output:
    """The folder of one instance of a stage, by its id."""

    stage: str


@dataclass(frozen=True, slots=True)
class Text:
    """A text with folders in it that are not named yet."""

    parts: tuple[str | Output, ...]

    def render(self, folder: Callable[[str], str]) -> str:
        """Return the text, with `folder(id)` for each output."""
        return "".join(part if isinstance(part, str) else folder(part.stage) for part in self.parts)


def pieces(text: str) -> list[str | Reference]:
    """Split a text into what is plain and what is a reference.

    Raises:
        UserError: a `${` that is not closed, or an inside that is no reference.
    """
    found: list[str | Reference] = []
    plain, end = "", 0
    for mark in _MARK.finditer(text):
        plain, end = plain + text[end : mark.start()], mark.end()
        if mark[0] == "$${":
            plain += "${"
            continue
        if mark[1] is None:
            raise UserError(f"{text!r} has a ${{ that is not closed: write ${{name}}, or $${{ for a plain ${{")
        if plain:
            found.append(plain)
        plain = ""
        found.append(_reference(mark))
    if (rest := plain + text[end:]) or not found:
        found.append(rest)
    return found


def _reference(mark: re.Match[str]) -> Reference:
    inside = _INSIDE.fullmatch(mark[1])
    if inside is None:
        raise UserError(f"{mark[0]} is no reference: allowed are ${{name}}, ${{vars.name}}, ${{name[label]}}")
    name, key, listed = inside.groups()
    if listed is None:
        return Reference(name, key, text=mark[0])
    index: dict[str, str] = {}
    for item in listed.split(","):
        axis, equals, label = (part.strip() for part in item.partition("="))
        axis, label = (axis, label) if equals else (ONLY, axis)
        if not label or axis in index:
            raise UserError(f"{mark[0]} has no such index: allowed are [label], [*] and [axis=label, axis=*]")
        index[axis] = label
    return Reference(name, key, index, mark[0])


def references(value: Any) -> Iterator[Reference]:
    """Yield every reference in a value, those in lists and mappings included."""
    if isinstance(value, str):
        yield from (piece for piece in pieces(value) if isinstance(piece, Reference))
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def fill(value: Any, answer: Callable[[Reference], Any]) -> Any:
    """Return a value with what `answer` says in place of its references.

    An answer that is a list, alone in an item of a list, takes its place there item by item. One inside a text makes a
    list of texts.

    Args:
        answer: a reference to a scalar, an `Output`, or a list of either.

    Raises:
        UserError: two lists in one text, or an answer that is a mapping.
    """
    if isinstance(value, list):
        filled: list[Any] = []
        for item in value:
            one = fill(item, answer)
            filled += one if isinstance(one, list) and not isinstance(item, list) else [one]
        return filled
    if not isinstance(value, str):
        return value
    parts: list[Any] = [piece if isinstance(piece, str) else answer(piece) for piece in pieces(value)]
    if any(isinstance(part, Mapping) for part in parts):
        raise UserError(f"{value} is a mapping: a reference stands for one value, or for a list of them")
    if len(parts) == 1 and not isinstance(parts[0], Output):
        only = parts[0]
        return [_joined([each]) for each in only] if isinstance(only, list) else only
    lists = [i for i, part in enumerate(parts) if isinstance(part, list)]
    if len(lists) > 1:
        raise UserError(f"{value!r} has two lists in one text")
    if lists:
        (at,) = lists
        return [_joined([*parts[:at], each, *parts[at + 1 :]]) for each in parts[at]]
    return _joined(parts)


def _joined(parts: list[Any]) -> Any:
    """Return parts as one value: a single scalar as it is, else a text."""
    if len(parts) == 1 and not isinstance(parts[0], (Output, Text)):
        return parts[0]
    flat: list[str | Output] = []
    for part in parts:
        flat += part.parts if isinstance(part, Text) else [part if isinstance(part, Output) else str(part)]
    return Text(tuple(flat)) if any(isinstance(part, Output) for part in flat) else "".join(map(str, flat))


def render(value: Any, folder: Callable[[str], str]) -> Any:
    """Return a filled value with names in place of its outputs."""
    if isinstance(value, list):
        return [render(each, folder) for each in value]
    return value.render(folder) if isinstance(value, Text) else value


def outputs(value: Any) -> Iterator[Output]:
    """Yield the outputs in a filled value."""
    if isinstance(value, list):
        for each in value:
            yield from outputs(each)
    elif isinstance(value, Text):
        yield from (part for part in value.parts if isinstance(part, Output))
