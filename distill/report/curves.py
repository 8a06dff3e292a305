"""Accuracy against compute: for each quantity of the ledger a panel with a curve and a band for every arm.

The x axis is logarithmic. A curve joins measured checkpoints and goes no further; the band is their 95 % intervals.
Arms whose cost is not known (a model that was not trained here) are a level line. Positions are percent of the width
and pixels of the height.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill.compare.words import UNITS
from distill.report.numbers import COSTS, nice_step, percent

HEIGHT = 300
TITLES = {"flops": "FLOPs", "seconds": "time", "tokens": "tokens", "prompts": "unique prompts"}


def panels(arms: Sequence[Mapping[str, Any]], level: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a panel for each quantity that at least one arm has a curve by; the matched one first.

    Args:
        arms: of compare.json, each with an `index`.
        level: `matched` of compare.json.
    """
    order = sorted(UNITS, key=lambda quantity: quantity != level["by"])
    return [panel for quantity in order if (panel := _panel(quantity, arms, level)) is not None]


def _panel(quantity: str, arms: Sequence[Mapping[str, Any]], level: Mapping[str, Any]) -> dict[str, Any] | None:
    known = {arm["name"]: [p for p in arm["curve"] if (p["cost"].get(quantity) or 0) > 0] for arm in arms}
    costs = [p["cost"][quantity] for points in known.values() for p in points]
    if max(map(len, known.values())) < 2:
        return None
    low, high = math.log10(min(costs)), math.log10(max(costs))
    edge = max(0.05, 0.06 * (high - low))
    low, high = low - edge, high + edge
    top, bottom, rows = _rows(arms)

    def x(cost: float) -> float:
        return round(100 * (math.log10(cost) - low) / (high - low), 3)

    def y(share: float) -> float:
        return round(HEIGHT * (top - share) / (top - bottom), 2)

    series = []
    for arm in arms:
        points = [
            {
                "x": x(p["cost"][quantity]),
                "y": y(p["accuracy"]),
                "low_y": y(p["ci95"][0]),
                "high_y": y(p["ci95"][1]),
                "said": f"{arm['name']}, {_steps(p['steps'])}{COSTS[quantity](p['cost'][quantity])}: "
                f"{percent(p['accuracy'])} [{100 * p['ci95'][0]:.1f}, {100 * p['ci95'][1]:.1f}]",
            }
            for p in known[arm["name"]]
        ]
        upper, lower = ([f"{p['x']},{p[side]}" for p in points] for side in ("high_y", "low_y"))
        series.append(
            {
                "name": arm["name"],
                "index": arm["index"],
                "points": points,
                "line": " ".join(f"{p['x']},{p['y']}" for p in points),
                "band": " ".join([*upper, *reversed(lower)]) if len(points) > 1 else "",
                "level_y": None if points else y(arm["accuracy"]),
            }
        )
    budget = level["budget"] if level["by"] == quantity and len(level["arms"]) > 1 else None
    return {
        "quantity": quantity,
        "title": TITLES[quantity],
        "series": series,
        "ticks": [_tick(x(10**at), label) for at, label in _log_ticks(quantity, low, high)],
        "rows": [{"y": y(share), "label": percent(share).replace(".0", "")} for share in rows],
        "budget": None if budget is None else {"at": x(budget), "said": COSTS[quantity](budget)},
    }


def _tick(at: float, label: str) -> dict[str, Any]:
    """Return a tick whose label does not reach over the edge of the chart."""
    anchor = "start" if at < 5 else "end" if at > 93 else "middle"
    return {"at": at, "label": label.removeprefix("1.0 × "), "anchor": anchor}


def _steps(steps: Sequence[int | None]) -> str:
    known = sorted({step for step in steps if step is not None})
    return "" if not known else f"step {known[0]}, " if len(known) == 1 else f"steps {known[0]} to {known[-1]}, "


def _rows(arms: Sequence[Mapping[str, Any]]) -> tuple[float, float, list[float]]:
    """Return the top and the bottom of the accuracies drawn, as shares, and the lines between them."""
    ends = [end for arm in arms for end in (*arm["ci95"], *(e for p in arm["curve"] for e in p["ci95"]))]
    step = nice_step(100 * (max(ends) - min(ends)), 5) / 100
    first, last = math.floor(min(ends) / step + 1e-9), math.ceil(max(ends) / step - 1e-9)
    return min(1.0, last * step), max(0.0, first * step), [min(1.0, i * step) for i in range(first, last + 1)]


def _log_ticks(quantity: str, low: float, high: float) -> list[tuple[float, str]]:
    """Return (place, label) of round costs on a logarithmic axis: of powers of ten, and between them where few fit."""
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        places = [
            (math.log10(factor) + power, factor * 10.0**power)
            for power in range(math.floor(low), math.ceil(high) + 1)
            for factor in factors
        ]
        ticks = [(at, COSTS[quantity](cost)) for at, cost in places if low <= at <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: max(1, math.ceil(len(ticks) / 6))]
