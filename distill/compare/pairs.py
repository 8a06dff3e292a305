"""Two arms on the same questions: the difference, its interval, three tests and the power, corrected over all pairs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from distill.compare.words import pair_verdict
from distill.statistics import (
    NORMAL,
    holm,
    minimum_detectable_effect,
    paired_bootstrap,
    paired_t,
    wilcoxon_signed_rank,
)

RESAMPLES = 10_000


def pair_rows(scores: Mapping[str, np.ndarray], seed: int) -> list[dict[str, Any]]:
    """Return every pair of arms as it stands in compare.json, an arm against each that was given before it.

    Args:
        scores: arm -> (S, n), on the same questions.
        seed: of the bootstrap.
    """
    pairs = sorted(combinations(range(len(scores)), 2))
    names = list(scores)
    rows = [_pair_row(names[a], names[b], scores[names[a]], scores[names[b]], seed) for b, a in pairs]
    for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = corrected
        row["verdict"] = pair_verdict(row, len(rows))
    return rows


def _pair_row(a: str, b: str, first: np.ndarray, second: np.ndarray, seed: int) -> dict[str, Any]:
    result = paired_bootstrap(first, second, resamples=RESAMPLES, seed=seed)
    low, high, questions = float(result.low), float(result.high), first.shape[1]
    paired = first.mean(0) - second.mean(0)
    # The error behind the interval, seeds and small samples included, so that interval and power tell one story.
    error = (high - low) / 2 / NORMAL.inv_cdf(0.975)
    return {
        "a": a,
        "b": b,
        "difference": float(result.difference),
        "ci95": [low, high],
        "p": float(result.p),
        "p_wilcoxon": wilcoxon_signed_rank(paired),
        "p_t": paired_t(paired),
        "wins": int((paired > 0).sum()),
        "losses": int((paired < 0).sum()),
        "minimum_detectable_effect": minimum_detectable_effect(error * questions**0.5, questions),
    }
