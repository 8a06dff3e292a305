"""Who wins where: every question of a pair of arms in order of the difference, and all arms' scores side by side.

Runs of questions with the same value are one mark, so that ten thousand questions stay a small page. Positions are
percent of the width and pixels of the height.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from distill.compare import score_matrix
from distill.evaluate import Evaluation

STRIP = 30  # pixels from no difference to the largest
MOST_PAIRS = 6
THIRDS = ("hard", "middling", "easy")


def win_loss(
    pairs: Sequence[Mapping[str, Any]], members: Mapping[str, Sequence[Evaluation]], levels: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the strips of pairs, the matrix of all arms, and what each pair won and lost by difficulty.

    Args:
        pairs: those to be shown.
        members: arm -> the evaluations of its seeds.
        levels: of the questions, where they are known; else they are sorted into thirds by all arms' mean score.
    """
    samples = next(iter(members.values()))[0].samples
    uids = list(samples)
    scores = {name: score_matrix(evaluations, uids).mean(0) for name, evaluations in members.items()}
    groups = _groups(
        np.array(list(scores.values())).mean(0), [samples[uid][0].meta.get("level") for uid in uids], levels
    )
    strips = []
    for pair in pairs[:MOST_PAIRS]:
        difference = scores[pair["a"]] - scores[pair["b"]]
        strips.append(
            {
                **pair,
                "ties": len(uids) - pair["wins"] - pair["losses"],
                "bars": _strip(difference),
                "groups": [
                    {"wins": int((difference[mask] > 0).sum()), "losses": int((difference[mask] < 0).sum())}
                    for _, mask in groups
                ],
            }
        )
    return {
        "strips": strips,
        "more": max(0, len(pairs) - MOST_PAIRS),
        "groups": [{"name": name, "questions": int(mask.sum())} for name, mask in groups],
        "by_level": bool(levels),
        "matrix": _matrix(scores),
    }


def _groups(
    mean: np.ndarray, level_of: Sequence[Any], levels: Sequence[Mapping[str, Any]]
) -> list[tuple[str, np.ndarray]]:
    """Return (name, mask) of groups of questions, those without one left out."""
    if levels:
        groups = [(f"level {level['name']}", np.array([v == level["name"] for v in level_of])) for level in levels]
    else:
        third = np.minimum(2, (3 * mean).astype(int))
        groups = [(name, third == i) for i, name in enumerate(THIRDS)]
    return [(name, mask) for name, mask in groups if mask.any()]


def _strip(difference: np.ndarray) -> list[dict[str, Any]]:
    """Return bars from the largest win to the largest loss; ties are left empty."""
    bars = []
    for value, begin, end in _runs(np.sort(difference)[::-1]):
        if value:
            height = round(max(1.0, STRIP * abs(value)), 2)
            y = round(STRIP - height if value > 0 else STRIP, 2)
            bars.append({"won": value > 0, "x": begin, "width": round(end - begin, 3), "y": y, "height": height})
    return bars


def _matrix(scores: Mapping[str, np.ndarray]) -> list[list[dict[str, float]]]:
    """Return for each arm its cells: questions from those that every arm answers to those that none does."""
    table = np.array(list(scores.values()))
    ordered = table[:, np.lexsort((*table[::-1], table.mean(0)))[::-1]]
    return [
        [
            {"x": begin, "width": round(end - begin, 3), "score": round(value, 3)}
            for value, begin, end in _runs(row)
            if value
        ]
        for row in ordered
    ]


def _runs(values: np.ndarray) -> list[tuple[float, float, float]]:
    """Return (value, begin, end) of stretches of equal values, in percent of all."""
    runs, place = [], 0
    for value, group in groupby(np.round(values, 6).tolist()):
        size = len(list(group))
        begin, end = (round(100 * at / len(values), 3) for at in (place, place + size))
        runs.append((value, begin, end))
        place += size
    return runs
