"""Arms at equal compute: their accuracy at one budget, and the compute each needs for one accuracy.

A comparison of end points says as much about how long each arm was trained as about how it was. So arms are read at
the largest budget that all of them reached (`distill.compare.curves`), and compared there as at their ends; and the
other way round, at the best accuracy that two of them reach, by the ratio of what it cost them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from distill.compare.arms import cost_of, score_matrix
from distill.compare.costs import TraceCosts
from distill.compare.curves import Curve, crossing, curve, on_one_grid, read_at
from distill.compare.grouping import Arm
from distill.compare.pairs import RESAMPLES, pair_rows
from distill.compare.words import matched_findings, target_verdict
from distill.statistics import accuracy_interval, components, resampling_counts

Lines = dict[str, list[Curve]]  # arm -> a curve for each training seed


def matched(
    arms: Sequence[Arm],
    questions: Sequence[str],
    per_question: int,
    *,
    quantity: str,
    traces: TraceCosts,
    share: float,
    seed: int,
) -> dict[str, Any]:
    """Return the comparison at equal compute as it stands in compare.json.

    Args:
        questions: uids, in the order of the scores.
        per_question: samples of each question.
        quantity: what is matched: flops, seconds, tokens or prompts.
        traces: what generating the traces that arms learnt from cost.
        share: of that, what they are charged with.
        seed: of the bootstrap.
    """
    lines, left = _lines(arms, questions, quantity, traces, share)
    budget = _budget(lines)
    read: dict[str, np.ndarray] = {}
    between: dict[str, bool] = {}
    for name, runs in lines.items():
        got = [read_at(run, budget) for run in runs] if budget else [None]
        if any(each is None for each in got):
            left[name] = _why(runs, budget)
            continue
        known = [each for each in got if each is not None]
        read[name], between[name] = np.array([scores for scores, _ in known]), any(inside for _, inside in known)
    rows = [
        {
            "name": name,
            "accuracy": float(scores.mean()),
            "scores": scores.mean(1).tolist(),
            "ci95": list(accuracy_interval(scores, samples_per_question=per_question)),
            "interpolated": between[name],
        }
        for name, scores in read.items()
    ]
    pairs = pair_rows(read, seed) if len(read) > 1 else []
    return {
        "by": quantity,
        "amortize_teacher": share,
        "budget": budget,
        "arms": rows,
        "unmatched": [{"name": name, "why": why} for name, why in left.items()],
        "pairs": pairs,
        "findings": matched_findings(rows, pairs, budget, quantity) if budget else [],
        "to_target": to_target(lines, quantity, seed),
    }


def _lines(
    arms: Sequence[Arm], questions: Sequence[str], quantity: str, traces: TraceCosts, share: float
) -> tuple[Lines, dict[str, str]]:
    """Return the curves of the arms whose costs are known, and why others have none."""
    lines: Lines = {}
    left: dict[str, str] = {}
    for arm in arms:
        found = [
            curve([cost_of(e, traces, share)[quantity] for e in run], score_matrix(run, questions)) for run in arm.runs
        ]
        runs = [run for run in found if run is not None]
        if len(runs) == len(found):
            lines[arm.name] = runs
        else:
            left[arm.name] = f"{quantity} of its training and traces are not recorded"
    return lines, left


def _budget(lines: Lines) -> float | None:
    """Return the largest cost that all arms reached; arms of a single checkpoint do not limit it where others exist."""
    long = [runs for runs in lines.values() if len(runs[0].cost) > 1]
    reached = [min(float(run.cost[-1]) for run in runs) for runs in long or list(lines.values())]
    return min(reached) if len(reached) > 1 else None


def _why(runs: Sequence[Curve], budget: float | None) -> str:
    if budget is None:
        return "no other arm's curve is known"
    if len(runs[0].cost) == 1:
        return f"its one checkpoint cost {runs[0].cost[0]:.3g}: evaluate its milestones"
    if min(run.cost[-1] for run in runs) < budget:
        return f"it ended at {min(run.cost[-1] for run in runs):.3g}"
    return f"its first checkpoint cost {max(run.cost[0] for run in runs):.3g} already"


def to_target(lines: Lines, quantity: str, seed: int) -> list[dict[str, Any]]:
    """Return, for every two arms with curves, the ratio of what the best accuracy that both reach cost them.

    Questions are resampled for both arms alike; a training seed moves a whole curve, by Student's t of what seeds
    differ beyond noise at its end. A pair whose dearer arm is there at its first checkpoint says nothing and is left
    out.
    """
    grids = {name: on_one_grid(runs) for name, runs in lines.items()}
    known = {name: grid for name, grid in grids.items() if grid is not None}
    if len(known) < 2:
        return []
    drawn = _resampled(known, seed)
    rows = []
    for b, a in combinations(known, 2):
        ends, seen = {}, {}
        target = np.minimum(*(drawn[name].max(-1) for name in (a, b)))
        for name in (a, b):
            ends[name], seen[name] = crossing(drawn[name], np.log(known[name].cost), target)
        cheaper, dearer = (a, b) if ends[a][0] <= ends[b][0] else (b, a)
        if seen[dearer][0]:
            continue
        log_ratio = ends[dearer] - ends[cheaper]
        low, high = np.quantile(log_ratio[1:], [0.025, 0.975])
        row: dict[str, Any] = {
            "cheaper": cheaper,
            "dearer": dearer,
            "target": float(target[0]),
            "cost": {name: float(np.exp(ends[name][0])) for name in (cheaper, dearer)},
            "ratio": float(np.exp(log_ratio[0])),
            "ci95": [float(np.exp(low)), float(np.exp(high))],
            "at_least": bool(seen[cheaper][0]),
        }
        rows.append({**row, "verdict": target_verdict(row, quantity)})
    return rows


def _resampled(grids: Mapping[str, Curve], seed: int) -> dict[str, np.ndarray]:
    """Return for each arm (1 + R, G) its curve: as measured, then on R resamples of the questions, alike for all."""
    rng = np.random.default_rng(seed)
    means = {name: grid.scores.mean(1) for name, grid in grids.items()}  # (G, n)
    questions = next(iter(means.values())).shape[1]
    parts: dict[str, list[np.ndarray]] = {name: [mean.mean(1)[None]] for name, mean in means.items()}
    for counts in resampling_counts(questions, RESAMPLES, rng):
        for name, mean in means.items():
            parts[name].append(counts @ mean.T / questions)
    drawn = {name: np.concatenate(part) for name, part in parts.items()}
    for name, grid in grids.items():
        last = components(grid.scores[-1])
        if last.seeds > 1 and last.excess > 0:
            drawn[name][1:] += np.sqrt(last.excess) * rng.standard_t(last.seeds - 1, (RESAMPLES, 1))
    return drawn
