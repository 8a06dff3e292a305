"""What the filters can be told."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from distill.errors import UserError

Band = tuple[float, float]  # lowest and highest value that pass, both included


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterOptions:
    """The filters' settings; None where a filter has nothing to go by."""

    length: Band | None = None  # tokens of a completion
    pass_rate: Band | None = None  # share of a prompt's judged samples that are right
    near_duplicate: float = 0.9  # estimated Jaccard similarity of word 5-shingles, in (0, 1]
    paragraph: int = 3000  # characters a line may have
    foreign_share: float = 0.01  # share of the words that may be in a script the prompt does not have
    seek_in_completions: bool = False  # contamination: in what the teacher wrote, not only in what was asked


def parse_band(text: str, kind: str) -> Band:
    """Read `LO:HI`, both ends included; either may be empty.

    Args:
        kind: `length` (whole numbers of tokens) or `pass-rate` (shares from 0 to 1), as the flag is called.

    Raises:
        UserError: anything else, or an empty band.
    """
    number, example, highest = {
        "length": (r"\d+", "16:4096, 16: or :4096", math.inf),
        "pass-rate": (r"\d*\.?\d+", "0.1:0.9, 0.1: or :0.9", 1.0),
    }[kind]
    found = re.fullmatch(rf"({number})?:({number})?", text.strip(), re.ASCII)
    if not found or not (found[1] or found[2]):
        raise UserError(f"--{kind} takes LO:HI, such as {example}, not {text!r}")
    low, high = float(found[1] or 0), float(found[2] or highest)
    if low > high:
        raise UserError(f"--{kind} {text} lets nothing through: the first number must not be above the second")
    if kind == "pass-rate" and high > highest:
        raise UserError(f"--{kind} {text}: a pass rate is a share from 0 to 1")
    return low, high
