"""Evaluation folders to `compare.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.compare.arms import arm_row, score_matrix
from distill.compare.costs import QUANTITIES, TraceCosts, amortisation
from distill.compare.grouping import check_comparable, group_arms
from distill.compare.matched import matched
from distill.compare.pairs import RESAMPLES, pair_rows
from distill.compare.words import findings, notes
from distill.errors import UserError
from distill.evaluate import load_evaluation


def compare(
    eval_dirs: Sequence[Path],
    out: Path,
    *,
    labels: Mapping[str, str] | None = None,
    seed: int = 0,
    match: str = "flops",
    amortize_teacher: str = "full",
    stores: Sequence[Path] = (),
) -> dict[str, Any]:
    """Compare evaluation folders and write `compare.json` into the folder `out`.

    Args:
        eval_dirs: at least two arms' folders made by `distill eval`, over the same questions and sampling. Those of one
            arm and training seed are its checkpoints; the one with the greatest training step is its score.
        out: folder of the comparison, created where missing.
        labels: folder (as given) to arm name, over what eval.json says.
        seed: of the bootstrap draws.
        match: what is made equal in `matched`: flops, seconds, tokens or prompts.
        amortize_teacher: `full`, `none` or `1/M`: how much of what their traces cost is charged to arms.
        stores: trace stores, for runs that do not know what theirs cost.

    Returns:
        What compare.json holds. Accuracies, differences and shares are fractions; `ledger` (evaluating), `training` and
        `generation` (of its traces) are the mean of one run.

    Raises:
        UserError: fewer than two arms, a broken folder, or evaluations that are not comparable.
    """
    if match not in QUANTITIES:
        raise UserError(f"--match is one of {', '.join(QUANTITIES)}, not {match!r}")
    share = amortisation(amortize_teacher)
    evaluations = [load_evaluation(Path(folder)) for folder in eval_dirs]
    if not evaluations:
        raise UserError("nothing to compare: give at least two evaluation folders")
    groups = group_arms(evaluations, labels)
    if len(groups) < 2:
        raise UserError(f"nothing to compare: the one arm is {groups[0].name!r}; give at least two arms")
    check_comparable(evaluations)
    questions = list(evaluations[0].samples)
    if len(questions) < 2:
        raise UserError("a comparison needs at least two questions; these evaluations have 1")
    summary = evaluations[0].summary
    per_question = int(summary["samples_per_question"])
    traces = TraceCosts(stores)
    arms = [arm_row(arm, questions, per_question, traces, share) for arm in groups]
    pairs = pair_rows({arm.name: score_matrix(arm.finals, questions) for arm in groups}, seed)
    level = matched(groups, questions, per_question, quantity=match, traces=traces, share=share, seed=seed)
    said = findings(arms, pairs)
    result = {
        "verdict": "; ".join(said),
        "findings": said,
        "notes": notes(arms),
        "questions": len(questions),
        "samples_per_question": per_question,
        "sampling": {k: v for k, v in (summary.get("sampling") or {}).items() if k != "seed"},
        "prompts_hash": summary.get("prompts_hash"),
        "resamples": RESAMPLES,
        "seed": seed,
        "arms": arms,
        "pairs": pairs,
        "matched": level,
    }
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "compare.json.partial"
    partial.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, out / "compare.json")
    return result
