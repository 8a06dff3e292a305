"""Plain data between the code under test and its tests, as JSON: nothing that comes across can do anything.

Standard library only, as it is used inside the sandbox (exam.py). A subclass of a built-in type arrives as that type.
"""

from __future__ import annotations

import collections
import decimal
import fractions
from collections.abc import Callable
from typing import Any

MAKE: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
    "bytes": bytes,
    "bytearray": bytearray,
    "range": lambda parts: range(*parts),
    "complex": lambda parts: complex(*parts),
}
TEXTS: dict[str, Callable[[str], Any]] = {"Decimal": decimal.Decimal, "Fraction": fractions.Fraction}
ITERABLES = (list, tuple, set, frozenset, collections.deque, bytes, bytearray)


def pack(value: Any, keep: Callable[[Any], int]) -> Any:
    """Return a JSON-able form of plain data; any other object is given to `keep`, for the number that stands for it."""
    if value is None or isinstance(value, bool):
        return value
    for scalar in (int, float, str):
        if isinstance(value, scalar):
            return scalar(value)
    if isinstance(value, dict):
        return {"dict": [[pack(key, keep), pack(item, keep)] for key, item in value.items()]}
    for kind in ITERABLES:
        if isinstance(value, kind):
            return {kind.__name__: [pack(item, keep) for item in list(value)]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    for name, made in TEXTS.items():
        if isinstance(value, made):  # type: ignore[arg-type]
            return {name: str(value)}
    return {"object": keep(value)}


def unpack(value: Any, find: Callable[[int], Any]) -> Any:
    """Return what `pack` took.

    Raises:
        ValueError, TypeError, KeyError, ArithmeticError, RecursionError: `pack` did not make it.
    """
    if isinstance(value, list):
        raise ValueError("no packed value")
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "dict":
        return {unpack(key, find): unpack(item, find) for key, item in inner}
    if kind == "object":
        return find(int(inner))
    if kind in TEXTS:
        return TEXTS[kind](inner)
    return MAKE[kind]([unpack(item, find) for item in inner])
