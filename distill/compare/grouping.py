"""Evaluation folders sorted into arms, training seeds and checkpoints; what is not comparable is refused.

Arms are compared question by question, so all evaluations must have answered the same questions with the same
sampling. Nothing is adjusted for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from distill.errors import UserError
from distill.evaluate import Evaluation


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm of a comparison.

    Attributes:
        name: of the arm.
        runs: for each training seed its evaluations in order of the training step, as many for each seed.
    """

    name: str
    runs: tuple[tuple[Evaluation, ...], ...]

    @property
    def finals(self) -> list[Evaluation]:
        """The evaluation of the greatest step of each seed: the arm's score."""
        return [run[-1] for run in self.runs]

    @property
    def checkpoints(self) -> list[tuple[Evaluation, ...]]:
        """The evaluations of each checkpoint, first to last, each over the seeds."""
        return list(zip(*self.runs, strict=True))


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


def group_arms(evaluations: Sequence[Evaluation], labels: Mapping[str, str] | None = None) -> list[Arm]:
    """Group evaluations by arm, in order of first appearance; within an arm by training seed, then by training step.

    An arm's name is `labels[str(folder)]`, else `arm` of its eval.json, else the folder's name with as many parents as
    tell the unnamed folders apart (`base/eval`, `student/eval`).

    Raises:
        UserError: a folder given twice, an unknown label, two folders of one arm with the same training seed and step,
            or seeds of an arm with more checkpoints than others.
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
    return [Arm(name, _runs(name, members)) for name, members in arms.items()]


def _arm(evaluation: Evaluation) -> str:
    return str(evaluation.summary.get("arm") or "")


def _runs(name: str, members: list[Evaluation]) -> tuple[tuple[Evaluation, ...], ...]:
    """Sort the evaluations of one arm into training runs."""
    seeds, steps = ([e.summary.get(key) for e in members] for key in ("train_seed", "train_step"))
    said = ", ".join(f"{e.folder} (seed {s}, step {t})" for e, s, t in zip(members, seeds, steps, strict=True))
    places = Counter(zip(seeds, steps, strict=True))
    repeated = any(count > 1 for count in places.values())
    unordered = None in steps and len(set(seeds)) < len(seeds)
    if repeated or unordered or (None in seeds and set(seeds) != {None}):
        raise UserError(f"arm {name!r} has several evaluations that are not different training seeds or steps: {said}")

    def place(evaluation: Evaluation) -> tuple[Any, ...]:
        return (evaluation.summary.get("train_seed") or 0, evaluation.summary.get("train_step") or 0)

    ordered = sorted(members, key=place)
    runs = tuple(tuple(run) for _, run in groupby(ordered, key=lambda e: e.summary.get("train_seed")))
    if len({len(run) for run in runs}) > 1:
        counts = ", ".join(f"seed {run[0].summary.get('train_seed')} has {len(run)}" for run in runs)
        raise UserError(
            f"arm {name!r} needs as many evaluated checkpoints of every training seed, and {counts}: evaluate the same "
            "milestones of each"
        )
    return runs
