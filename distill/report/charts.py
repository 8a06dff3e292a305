"""Where the marks of the page's charts stand: positions in percent of a chart's width, pixels of its height."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.compare import score_matrix
from distill.evaluate import Evaluation, sample_score
from distill.report.numbers import count, nice_step
from distill.statistics import accuracy_interval

PLOT_HEIGHT = 240  # pixels of the level chart from 0 to 100 %
BAR_HEIGHT = 42


def forest(result: Mapping[str, Any]) -> dict[str, Any]:
    """Place the paired differences on one axis that always shows zero; pairs with the first arm come first."""
    pairs, names = result["pairs"], [arm["name"] for arm in result["arms"]]
    low, high = min(0.0, *(p["ci95"][0] for p in pairs)), max(0.0, *(p["ci95"][1] for p in pairs))
    step = nice_step(100 * (high - low), 5)
    first, last = math.floor(100 * low / step), math.ceil(100 * high / step)
    last = max(last, first + 1)

    def at(share: float) -> float:
        return round(100 * (100 * share / step - first) / (last - first), 3)

    digits = 0 if step >= 1 else -math.floor(math.log10(step))
    ticks = [
        {"at": at(i * step / 100), "label": f"{i * step:+.{digits}f}".replace("-", "−") if i else "0", "zero": i == 0}
        for i in range(first, last + 1)
    ]
    views = [
        {
            **pair,
            "at": at(pair["difference"]),
            "low_at": at(pair["ci95"][0]),
            "high_at": at(pair["ci95"][1]),
            "unsure": pair["ci95"][0] <= 0 <= pair["ci95"][1],
            "index": names.index(pair["a"]),
        }
        for pair in pairs
    ]
    aside = len(views) > 6
    return {
        "difference_ticks": ticks,
        "main_pairs": [v for v in views if v["b"] == names[0] or not aside],
        "other_pairs": [v for v in views if v["b"] != names[0] and aside],
    }


def levels(members: Sequence[Sequence[Evaluation]], per_question: int) -> tuple[list[Any], list[list[Any]]]:
    """Group the questions by `meta["level"]`; empty unless at least two levels are known for every question."""
    samples = members[0][0].samples
    level_of = {uid: group[0].meta.get("level") for uid, group in samples.items()}
    names = sorted({v for v in level_of.values() if v is not None}, key=lambda v: (isinstance(v, str), v))
    if len(names) < 2 or None in level_of.values():
        return [], []
    width = 100 / len(names)
    groups = [
        {"name": name, "questions": sum(v == name for v in level_of.values()), "at": round((i + 0.5) * width, 3)}
        for i, name in enumerate(names)
    ]
    by_level = []
    for index, arm in enumerate(members):
        # A sixth of a level's width is shared out so that intervals of several arms do not cover each other.
        aside = (index - (len(members) - 1) / 2) / len(members) * width / 3
        series = []
        for level in groups:
            scores = score_matrix(arm, [uid for uid, v in level_of.items() if v == level["name"]])
            accuracy, ci95 = float(scores.mean()), accuracy_interval(scores, samples_per_question=per_question)
            y, low_y, high_y = (round(PLOT_HEIGHT * (1 - share), 1) for share in (accuracy, *ci95))
            at = round(level["at"] + aside, 3)
            series.append({"accuracy": accuracy, "ci95": ci95, "at": at, "y": y, "low_y": low_y, "high_y": high_y})
        by_level.append(series)
    return groups, by_level


def lengths(members: Sequence[Sequence[Evaluation]]) -> dict[str, Any]:
    """Count completion lengths in common bins; bars are stacked right, wrong, truncated, each arm to its own height."""
    traces = [[t for e in arm for t in e.traces] for arm in members]
    longest = max(1, *(t.num_completion_tokens for arm in traces for t in arm))
    step = nice_step(longest, 5)
    top = step * math.ceil(longest / step)
    edges = np.linspace(0, top, 41)
    rows = []
    for arm in traces:
        kinds = {"right": [], "wrong": [], "cut": []}  # type: dict[str, list[int]]
        for trace in arm:
            kind = "cut" if trace.finish_reason == "length" else "right" if sample_score(trace) >= 1 else "wrong"
            kinds[kind].append(trace.num_completion_tokens)
        counts = {kind: np.histogram(values, bins=edges)[0] for kind, values in kinds.items()}
        scale = BAR_HEIGHT / max(1, int(sum(counts.values()).max()))  # type: ignore[union-attr]
        bars = []
        for i in range(len(edges) - 1):
            foot = 46.0
            for kind, tally in counts.items():
                if tally[i]:
                    height = float(tally[i]) * scale
                    foot -= height
                    x, width = round(i * 2.5 + 0.2, 2), 2.1
                    bars.append({"kind": kind, "x": x, "width": width, "y": round(foot, 2), "height": round(height, 2)})
        rows.append({"bars": bars, "median": float(np.median([t.num_completion_tokens for t in arm]))})
    ticks = [
        {"at": round(100 * i * step / top, 3), "label": count(i * step), "zero": False}
        for i in range(round(top / step) + 1)
    ]
    return {"rows": rows, "ticks": ticks}
