"""The table of filters, and `--drop`: which of them reject. The others only flag.

Published ablations found that most filters on *answers* do not beat a random choice of the same size (OpenThoughts,
arXiv 2506.04178), so only what is broken or contaminated is dropped by default.
"""

from __future__ import annotations

from collections.abc import Callable

from distill.errors import UserError
from distill.records import Trace
from distill.tables import lookup
from teachers.filters.loops import loop
from teachers.filters.options import FilterOptions
from teachers.filters.siblings import Siblings, contaminated, duplicate, length, near_duplicate, pass_rate
from teachers.filters.structure import malformed, truncated
from teachers.filters.style import code_block, language_mix, long_paragraph

Filter = Callable[[Trace, Siblings], bool]

FILTERS: dict[str, Filter] = {
    "truncated": truncated,
    "malformed": malformed,
    "loop": loop,
    "contaminated": contaminated,
    "length": length,
    "pass_rate": pass_rate,
    "language_mix": language_mix,
    "long_paragraph": long_paragraph,
    "code_block": code_block,
    "duplicate": duplicate,
    "near_duplicate": near_duplicate,
}

DEFAULT_DROP = "truncated,malformed,loop,contaminated"
DESCRIPTIVE = ("loop", "language_mix", "long_paragraph", "code_block")  # flagged as soon as a trace is made


def parse_drop(text: str) -> list[str]:
    """Read a comma-separated list of filters; `none` is the empty list.

    Raises:
        UserError: an unknown name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    names = [] if names == ["none"] else names
    for name in names:
        lookup(FILTERS, name, "filter")
    return list(dict.fromkeys(names))


def dropping(drop: list[str], options: FilterOptions, *, index: bool) -> list[str]:
    """Return the filters that reject: those named, then those that an option alone asks for.

    Args:
        drop: as `parse_drop` returns it.
        index: evaluation files were given.

    Raises:
        UserError: a filter is named that lacks its option.
    """
    for name, flag, band in (("length", "--length", options.length), ("pass_rate", "--pass-rate", options.pass_rate)):
        if name in drop and band is None:
            raise UserError(f"--drop {name} needs {flag} LO:HI, which says what passes")
    asked = {"length": options.length is not None, "pass_rate": options.pass_rate is not None, "contaminated": index}
    return [*drop, *(name for name, given in asked.items() if given and name not in drop)]
