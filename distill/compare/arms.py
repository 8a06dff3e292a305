"""One arm in numbers: its score, what its samples were like, its curve over checkpoints, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill.compare.costs import Cost, TraceCosts, charged, mean_ledger
from distill.compare.grouping import Arm
from distill.evaluate import Evaluation, gave_answer, sample_score
from distill.statistics import accuracy_interval, mean_and_stderr, pass_at_k, seed_sd


def score_matrix(members: Sequence[Evaluation], questions: Sequence[str]) -> np.ndarray:
    """Return (S, n): the mean score over samples of each question (in the order given), per training seed."""
    return np.array([[np.mean([sample_score(t) for t in e.samples[uid]]) for uid in questions] for e in members])


def arm_row(arm: Arm, questions: Sequence[str], per_question: int, traces: TraceCosts, share: float) -> dict[str, Any]:
    """Return an arm as it stands in compare.json.

    Args:
        questions: uids, in the order of the scores.
        per_question: samples of each question.
        traces: what generating the traces it learnt from cost.
        share: of that, what it is charged with.
    """
    members = arm.finals
    scores = score_matrix(members, questions)
    samples = [t for e in members for t in e.traces]
    right = [
        pass_at_k(per_question, sum(sample_score(t) >= 1 for t in g), per_question)
        for e in members
        for g in e.samples.values()
    ]
    generated = [traces.generation(e) for e in members]
    return {
        "name": arm.name,
        "model": members[0].summary.get("model"),
        "evals": [str(e.folder) for e in members],
        "seeds": [e.summary.get("train_seed") for e in members],
        "scores": scores.mean(1).tolist(),
        **_accuracy(scores, per_question),
        "seed_sd": seed_sd(scores),
        "pass@k": float(np.mean(right)),
        "truncated": float(np.mean([t.finish_reason == "length" for t in samples])),
        "no_answer": float(np.mean([not gave_answer(t) for t in samples])),
        "unjudged": sum(t.score is None for t in samples),
        "mean_completion_tokens": float(np.mean([t.num_completion_tokens for t in samples])),
        "bits_per_byte": _mean_of(members, "bits_per_byte"),
        "ledger": mean_ledger([e.summary.get("ledger") for e in members]),
        "training": mean_ledger([e.summary.get("training") for e in members]),
        "generation": mean_ledger([cost for _, cost in generated]),
        "generation_share": share if any(learnt for learnt, _ in generated) else 0.0,
        "generation_unknown": any(learnt and cost is None for learnt, cost in generated),
        "curve": [_point(point, questions, per_question, traces, share) for point in arm.checkpoints],
    }


def _accuracy(scores: np.ndarray, per_question: int) -> dict[str, Any]:
    return {
        "accuracy": float(scores.mean()),
        "stderr": mean_and_stderr(scores.mean(0))[1],
        "ci95": list(accuracy_interval(scores, samples_per_question=per_question)),
    }


def _point(
    members: Sequence[Evaluation], questions: Sequence[str], per_question: int, traces: TraceCosts, share: float
) -> dict[str, Any]:
    """Return one checkpoint of an arm: its step, its accuracy over seeds, and the mean of what it cost by then."""
    scores = score_matrix(members, questions)
    return {
        "steps": [e.summary.get("train_step") for e in members],
        "evals": [str(e.folder) for e in members],
        "scores": scores.mean(1).tolist(),
        **_accuracy(scores, per_question),
        "training": mean_ledger([e.summary.get("training") for e in members]),
        "cost": mean_ledger([cost_of(e, traces, share) for e in members]) or {},
    }


def cost_of(evaluation: Evaluation, traces: TraceCosts, share: float) -> Cost:
    """Return what the model of one evaluation cost, its share of its traces included."""
    return charged(evaluation.summary.get("training"), traces.generation(evaluation)[1], share)


def _mean_of(members: Sequence[Evaluation], key: str) -> float | None:
    values = [e.summary.get(key) for e in members]
    return None if any(v is None for v in values) else float(np.mean([float(v) for v in values if v is not None]))
