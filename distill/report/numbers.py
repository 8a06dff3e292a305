"""How the page writes numbers, for people."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def place(share: float) -> float:
    """Return a share as a position in percent, short enough for an attribute."""
    return round(100 * float(share), 3)


def percent(share: float) -> str:
    """Return `61.3 %`."""
    return f"{100 * share:.1f} %"


def signed(share: float) -> str:
    """Return `+4.1` or `−4.1`, in points."""
    return f"{100 * share:+.1f}".replace("-", "−")


def p_value(p: float) -> str:
    """Return a p-value to the precision its bootstrap has."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def count(value: float | None) -> str:
    """Return `12 345` with narrow no-break spaces, or a dash where nothing is known."""
    return "–" if value is None else f"{round(value):,}".replace(",", "\u202f")


def flops(value: float | None) -> str:
    """Return `1.2 × 10¹⁵`."""
    if value is None:
        return "–"
    if value <= 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def powers(text: str) -> str:
    """Return a text with its numbers such as `3.4e+11` written `3.4 × 10¹¹`."""
    return re.sub(
        r"(?<![\w.])(\d(?:\.\d+)?)e\+?(-?)0?(\d+)\b",
        lambda found: f"{found[1]} × 10{(found[2] + found[3]).translate(_SUPERSCRIPT)}",
        text,
    )


def duration(seconds: float | None) -> str:
    """Return `41 s`, `4 min 20 s` or `2 h 5 min`."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


COSTS: dict[str, Callable[[float | None], str]] = {
    "flops": flops,
    "seconds": duration,
    "tokens": count,
    "prompts": count,
}
FILTERS: dict[str, Callable[..., Any]] = {
    "place": place,
    "percent": percent,
    "number": lambda share: f"{100 * share:.1f}",
    "signed": signed,
    "p_value": p_value,
    "count": count,
    "tokens": lambda value: count(value) if value >= 100 else f"{value:.1f}",
    "flops": flops,
    "duration": duration,
    "cost": lambda value, quantity: COSTS[quantity](value),
    "powers": powers,
    "capital": lambda text: powers(text[:1].upper() + text[1:]),
    "sentence": lambda text: text[:1].upper() + text[1:] + "." if text.startswith("no ") else text + ".",
    "words": lambda name: str(name).replace("_", " ").capitalize(),
}


def nice_step(width: float, pieces: int) -> float:
    """Return the step of 1, 2 or 5 times a power of ten that cuts `width` into at most `pieces` pieces."""
    raw = max(width, 1e-9) / pieces
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
