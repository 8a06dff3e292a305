"""Literal tables: how a name in a recipe becomes a function.

A table is a dict at the place of use. Its values are functions, or lazy ``"package.module:name"``
strings where the import is heavy. A name that is itself ``"package.module:name"`` is imported as it is,
so a user's own function needs no registration.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from distill.errors import UserError


def suggest(given: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` for the nearest allowed name, or an empty string."""
    near = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def load(path: str) -> Any:
    """Import ``"package.module:name"``.

    Raises:
        UserError: the module or the name does not exist, or the module does not import.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # it may be the user's own module, and that may raise anything
        what = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise UserError(f"cannot import {module_name!r} (from {path!r}): {what}{error}") from error
    if not hasattr(module, name):
        raise UserError(f"module {module_name!r} has no {name!r}{suggest(name, dir(module))}")
    return getattr(module, name)


def lookup(table: Mapping[str, Any], name: str, kind: str) -> Any:
    """Return what `name` stands for in `table`, importing lazy entries and ``pkg.mod:name`` paths.

    Raises:
        UserError: the name is unknown; the message lists the known ones and the nearest.
    """
    if name in table:
        entry = table[name]
        return load(entry) if isinstance(entry, str) else entry
    if ":" in name:
        return load(name)
    known = ", ".join(table)
    raise UserError(f"unknown {kind} {name!r}: known are {known}{suggest(name, table)}")


def bind(function: Callable[..., Any], options: Mapping[str, Any], kind: str) -> Callable[..., Any]:
    """Fix the keyword-only arguments of `function` named in `options`.

    Raises:
        UserError: an option is not a keyword-only argument of the function; the accepted are listed.
    """
    parameters = inspect.signature(function).parameters.values()
    accepted = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for key in options:
        if key not in accepted:
            listed = ", ".join(accepted) or "none"
            raise UserError(f"{kind} takes no option {key!r}: accepted are {listed}{suggest(key, accepted)}")
    return partial(function, **options) if options else function
