"""Several evaluations, one verdict: what `distill compare EVAL_DIR...` computes and writes to `compare.json`.

Evaluations of one arm with different training seeds are grouped. Arms are compared question by question, so they must
have answered the same questions with the same sampling; anything else is refused, not adjusted for. Every score is
recomputed from `samples.jsonl` (a truncated sample is wrong and no answer); only costs and bits per byte, which the
samples do not hold, are taken from `eval.json`.

It neither trains nor generates nor draws: `distill.report` draws. No torch.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.errors import UserError
from distill.evaluate import Evaluation, gave_answer, load_evaluation, sample_score
from distill.statistics import (
    NORMAL,
    accuracy_interval,
    holm,
    mean_and_stderr,
    minimum_detectable_effect,
    paired_bootstrap,
    pass_at_k,
    wilcoxon_signed_rank,
)

if TYPE_CHECKING:
    from rich.table import Table

RESAMPLES = 10_000


def check_comparable(evaluations: Sequence[Evaluation]) -> None:
    """Refuse evaluations that answer different questions, or answer them under different conditions.

    Raises:
        UserError: naming the first pair that does not match, and in what.
    """
    first = evaluations[0]
    golds = {uid: group[0].gold for uid, group in first.samples.items()}
    for other in evaluations[1:]:
        names = f"{first.folder} and {other.folder} are not comparable"
        if other.samples.keys() != first.samples.keys():
            shared = len(other.samples.keys() & first.samples.keys())
            raise UserError(
                f"{names}: they share {shared} questions of {len(first.samples)} and {len(other.samples)}; "
                "evaluate both on the same --prompts and --limit"
            )
        changed = sum(group[0].gold != golds[uid] for uid, group in other.samples.items())
        if changed:
            raise UserError(f"{names}: {changed} of {len(golds)} shared questions have another gold answer")
        for key in ("samples_per_question", "prompts_hash"):
            mine, theirs = first.summary.get(key), other.summary.get(key)
            if mine != theirs:
                raise UserError(f"{names}: {key} is {mine} and {theirs}; evaluate both with the same settings")
        judges = [", ".join(sorted(_judges(evaluation))) for evaluation in (first, other)]
        if all(judges) and judges[0] != judges[1]:
            raise UserError(
                f"{names}: they were judged by {judges[0]} and {judges[1]}; evaluate both with one verifier"
            )
        # The seed of the sampling may differ, and should: it is noise, not a condition.
        mine, theirs = (dict(e.summary.get("sampling") or {}) for e in (first, other))
        differing = sorted(k for k in mine.keys() | theirs.keys() if k != "seed" and mine.get(k) != theirs.get(k))
        if differing:
            listed = ", ".join(f"{k} {mine.get(k)} and {theirs.get(k)}" for k in differing)
            raise UserError(f"{names}: they were sampled differently ({listed}); evaluate both with the same settings")


def _judges(evaluation: Evaluation) -> set[str]:
    return {f"{t.verdicts[-1].verifier} {t.verdicts[-1].version}" for t in evaluation.traces if t.verdicts}


def group_arms(
    evaluations: Sequence[Evaluation], labels: Mapping[str, str] | None = None
) -> dict[str, list[Evaluation]]:
    """Group evaluations by arm, in order of first appearance, each sorted by training seed.

    An arm's name is `labels[str(folder)]`, else `arm` of its eval.json, else the folder's name with as many parents as
    tell the unnamed folders apart (`base/eval`, `student/eval`).

    Raises:
        UserError: a folder given twice, an unknown label, or two folders of one arm with the same training seed.
    """
    labels = dict(labels or {})
    folders = [e.folder.resolve() for e in evaluations]
    for folder, count in Counter(folders).items():
        if count > 1:
            raise UserError(f"{folder} is given {count} times; a difference to itself says nothing")
    unknown = [key for key in labels if key not in {str(e.folder) for e in evaluations}]
    if unknown:
        raise UserError(f"label for {unknown[0]!r}, which is not among the folders given")
    unnamed = [f for e, f in zip(evaluations, folders, strict=True) if not (labels.get(str(e.folder)) or _arm(e))]
    depth = 1
    while len({f.parts[-depth:] for f in unnamed}) < len(unnamed):
        depth += 1
    arms: dict[str, list[Evaluation]] = {}
    for evaluation, folder in zip(evaluations, folders, strict=True):
        name = labels.get(str(evaluation.folder)) or _arm(evaluation) or "/".join(folder.parts[-depth:])
        arms.setdefault(name, []).append(evaluation)
    for name, members in arms.items():
        seeds = [e.summary.get("train_seed") for e in members]
        if len(members) > 1 and (None in seeds or len(set(seeds)) < len(seeds)):
            listed = ", ".join(f"{e.folder} (seed {s})" for e, s in zip(members, seeds, strict=True))
            raise UserError(f"arm {name!r} has several evaluations that are not different training seeds: {listed}")
        members.sort(key=lambda e: (e.summary.get("train_seed") is None, e.summary.get("train_seed")))
    return arms


def _arm(evaluation: Evaluation) -> str:
    return str(evaluation.summary.get("arm") or "")


def score_matrix(members: Sequence[Evaluation], questions: Sequence[str]) -> np.ndarray:
    """Return (S, n): the mean score over samples of each question (in the order given), per training seed."""
    return np.array([[np.mean([sample_score(t) for t in e.samples[uid]]) for uid in questions] for e in members])


def _mean_of(members: Sequence[Evaluation], key: str) -> float | None:
    values = [e.summary.get(key) for e in members]
    return None if any(v is None for v in values) else float(np.mean([float(v) for v in values if v is not None]))


def _arm_row(name: str, members: Sequence[Evaluation], scores: np.ndarray, per_question: int) -> dict[str, Any]:
    traces = [t for e in members for t in e.traces]
    right = [
        pass_at_k(per_question, sum(sample_score(t) >= 1 for t in g), per_question)
        for e in members
        for g in e.samples.values()
    ]
    return {
        "name": name,
        "model": members[0].summary.get("model"),
        "evals": [str(e.folder) for e in members],
        "seeds": [e.summary.get("train_seed") for e in members],
        "scores": scores.mean(1).tolist(),
        "accuracy": float(scores.mean()),
        "stderr": mean_and_stderr(scores.mean(0))[1],
        "ci95": list(accuracy_interval(scores, samples_per_question=per_question)),
        "pass@k": float(np.mean(right)),
        "truncated": float(np.mean([t.finish_reason == "length" for t in traces])),
        "no_answer": float(np.mean([not gave_answer(t) for t in traces])),
        "unjudged": sum(t.score is None for t in traces),
        "mean_completion_tokens": float(np.mean([t.num_completion_tokens for t in traces])),
        "bits_per_byte": _mean_of(members, "bits_per_byte"),
        "ledger": _mean_ledger(members, "ledger"),
        "training": _mean_ledger(members, "training"),
    }


def _mean_ledger(members: Sequence[Evaluation], key: str) -> dict[str, float] | None:
    """Return the mean cost of one run, of what all members recorded; None where there is nothing."""
    ledgers = [e.summary.get(key) or {} for e in members]
    costs = [k for k in ledgers[0] if all(isinstance(row.get(k), int | float) for row in ledgers)]
    return {k: float(np.mean([row[k] for row in ledgers])) for k in costs} or None


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
        "wins": int((paired > 0).sum()),
        "losses": int((paired < 0).sum()),
        "minimum_detectable_effect": minimum_detectable_effect(error * questions**0.5, questions),
    }


def pair_verdict(pair: Mapping[str, Any], comparisons: int) -> str:
    """Say in words what the interval of a pair allows to be said. Points are percentage points."""
    (low, high), difference = pair["ci95"], pair["difference"]
    if low <= 0 <= high:
        seen = 100 * pair["minimum_detectable_effect"]
        return (
            f"no detectable difference between {pair['a']} and {pair['b']} [{100 * low:+.1f}, {100 * high:+.1f}]; "
            f"{seen:.1f} points would have been seen"
        )
    better, worse = (pair["a"], pair["b"]) if difference > 0 else (pair["b"], pair["a"])
    near, far = sorted((abs(low), abs(high)))
    text = f"{better} answers {abs(100 * difference):.1f} points more than {worse} [{100 * near:.1f}, {100 * far:.1f}]"
    if pair["p_holm"] >= 0.05:
        text += f", not significant after correction for {comparisons} comparisons (Holm p = {pair['p_holm']:.2f})"
    return text


def findings(arms: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what can be said of all arms: the best and what it cannot be told from, the next, the first arm given."""
    if len(pairs) == 1:
        return [str(pairs[0]["verdict"])]
    between = {frozenset((p["a"], p["b"])): p for p in pairs}
    ranked = sorted(arms, key=lambda arm: -arm["accuracy"])
    best, first = ranked[0]["name"], arms[0]["name"]
    against = [(arm["name"], between[frozenset((best, arm["name"]))]) for arm in ranked[1:]]
    level = [(name, pair) for name, pair in against if pair["ci95"][0] <= 0 <= pair["ci95"][1]]
    behind = [(name, pair) for name, pair in against if not pair["ci95"][0] <= 0 <= pair["ci95"][1]]
    said = []
    if level:
        seen = 100 * max(pair["minimum_detectable_effect"] for _, pair in level)
        names = ", ".join(name for name, _ in level[:-1]) + (" and " if len(level) > 1 else "") + level[-1][0]
        said.append(f"no detectable difference between {best} and {names}; {seen:.1f} points would have been seen")
    if behind:
        said.append(str(behind[0][1]["verdict"]))
        said += [str(pair["verdict"]) for name, pair in behind[1:] if name == first]
    return said


def _notes(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    once = [a["name"] for a in arms if len(a["seeds"]) == 1 and a["seeds"][0] is not None]
    if once:
        notes.append(
            f"One training seed: {', '.join(once)}. Their intervals cover other questions and other samples, "
            "not another training run."
        )
    unjudged = sum(a["unjudged"] for a in arms)
    if unjudged:
        notes.append(f"{unjudged} samples could not be judged and count as wrong.")
    return notes


def compare(
    eval_dirs: Sequence[Path], out: Path, *, labels: Mapping[str, str] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compare evaluation folders and write `compare.json` into the folder `out`.

    Args:
        eval_dirs: at least two folders made by `distill eval`, over the same questions and sampling.
        out: folder of the comparison, created where missing.
        labels: folder (as given) to arm name, over what eval.json says.
        seed: of the bootstrap draws.

    Returns:
        What compare.json holds. Accuracies, differences and shares are fractions; `ledger` (evaluating)
        and `training` are the mean of one run.

    Raises:
        UserError: fewer than two arms, a broken folder, or evaluations that are not comparable.
    """
    evaluations = [load_evaluation(Path(folder)) for folder in eval_dirs]
    if not evaluations:
        raise UserError("nothing to compare: give at least two evaluation folders")
    groups = group_arms(evaluations, labels)
    if len(groups) < 2:
        raise UserError(f"nothing to compare: the one arm is {next(iter(groups))!r}; give at least two arms")
    check_comparable(evaluations)
    questions = list(evaluations[0].samples)
    if len(questions) < 2:
        raise UserError("a comparison needs at least two questions; these evaluations have 1")
    summary = evaluations[0].summary
    per_question = int(summary["samples_per_question"])
    scores = {name: score_matrix(members, questions) for name, members in groups.items()}
    arms = [_arm_row(name, members, scores[name], per_question) for name, members in groups.items()]
    names = list(groups)
    pairs = [_pair_row(a, b, scores[a], scores[b], seed) for i, b in enumerate(names) for a in names[i + 1 :]]
    for pair, corrected in zip(pairs, holm([p["p"] for p in pairs]), strict=True):
        pair["p_holm"] = corrected
        pair["verdict"] = pair_verdict(pair, len(pairs))
    said = findings(arms, pairs)
    result = {
        "verdict": "; ".join(said),
        "findings": said,
        "notes": _notes(arms),
        "questions": len(questions),
        "samples_per_question": per_question,
        "sampling": {k: v for k, v in (summary.get("sampling") or {}).items() if k != "seed"},
        "prompts_hash": summary.get("prompts_hash"),
        "resamples": RESAMPLES,
        "seed": seed,
        "arms": arms,
        "pairs": pairs,
    }
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "compare.json.partial"
    partial.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, out / "compare.json")
    return result


def render_table(result: Mapping[str, Any]) -> Table:
    """Return the comparison as a table for a terminal of 80 columns: a row per arm, differences to the first arm."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    arms, first = result["arms"], result["arms"][0]["name"]
    to_first = {p["a"]: p for p in result["pairs"] if p["b"] == first}
    with_bits = any(a["bits_per_byte"] is not None for a in arms)
    table = Table(
        title=f"{result['questions']} questions x {result['samples_per_question']} samples; accuracy in %, points",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        show_edge=False,
    )
    table.add_column("arm", overflow="fold", min_width=12)
    for column in ("accuracy [95 %]", f"against {first}"):
        table.add_column(Text(column), justify="right", no_wrap=True)
    for column in ["no answer", "tokens"] + ["bits /byte"] * with_bits:
        table.add_column(column, justify="right", min_width=6, max_width=6)
    for arm in arms:
        pair = to_first.get(arm["name"])
        row = [
            arm["name"] + (f" ({len(arm['seeds'])} seeds)" if len(arm["seeds"]) > 1 else ""),
            f"{100 * arm['accuracy']:.1f} [{100 * arm['ci95'][0]:.1f}, {100 * arm['ci95'][1]:.1f}]",
            f"{100 * pair['difference']:+.1f} [{100 * pair['ci95'][0]:.1f}, {100 * pair['ci95'][1]:.1f}]"
            if pair
            else "",
            f"{100 * arm['no_answer']:.1f} %",
            f"{arm['mean_completion_tokens']:.0f}",
        ]
        if with_bits:
            row.append("" if arm["bits_per_byte"] is None else f"{arm['bits_per_byte']:.3f}")
        table.add_row(*map(Text, row))
    return table
