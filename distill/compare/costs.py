"""What the models of a comparison cost: their training, and their share of what generating their traces cost.

A run's own ledger stands in `eval.json` (`training`). What its traces cost stands where they came from: recorded by
the run, or in the manifest of the store it learnt from. Runs that read only prompts from a store (reinforcement
learning, on-policy distillation without teacher-written text) are not charged for its traces.

What a student was before its run (pretraining, an earlier stage) and the training of the teacher are never charged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import UserError
from distill.evaluate import Evaluation

QUANTITIES = ("flops", "seconds", "tokens", "prompts")
GENERATED = ("flops", "seconds", "tokens")  # of them, what generating traces adds to: prompts are the run's own
Cost = dict[str, float | None]


def amortisation(text: str) -> float:
    """Return the share of its traces' cost that is charged to a run: `full`, `none` or `1/M`.

    Raises:
        UserError: anything else.
    """
    if text in ("full", "none"):
        return float(text == "full")
    if found := re.fullmatch(r"1/([1-9]\d*)", text):
        return 1 / int(found.group(1))
    raise UserError(f"--amortize-teacher is full, none or 1/M (traces shared by M students, such as 1/4), not {text!r}")


class TraceCosts:
    """What generating the traces behind evaluated models cost, looked up once per source.

    Args:
        stores: trace stores given by hand, for runs that do not know theirs or whose path moved.
    """

    def __init__(self, stores: Sequence[Path] = ()) -> None:
        self.stores = list(stores)
        self._hashes: dict[Path, str | None] = {}

    def generation(self, evaluation: Evaluation) -> tuple[bool, Cost | None]:
        """Return whether a model learnt from traces, and what generating them cost; None where nobody knows."""
        recorded = evaluation.summary.get("training_data")
        run = _run_record(evaluation)
        if recorded is None and not run:
            return evaluation.summary.get("training") is not None, None
        recipe = run.get("recipe") or {}
        recorded = recorded or {"path": recipe.get("data"), "sha256": run.get("data_sha256")}
        use = recorded.get("use") or ("prompts" if _prompts_only(recipe) else "traces")
        if use != "traces":
            return False, None
        return True, _numbers(recorded.get("ledger")) or self._looked_up(recorded)

    def _looked_up(self, recorded: Mapping[str, Any]) -> Cost | None:
        """Find the store with the content that a run read."""
        places = [*self.stores, *([Path(recorded["path"])] if recorded.get("path") else [])]
        for store in places:
            if recorded.get("sha256") and self._hash(store) == recorded["sha256"]:
                return _numbers((_json(store / "manifest.json") or {}).get("ledger"))
        return None

    def _hash(self, store: Path) -> str | None:
        if store not in self._hashes:
            from distill.dataset import data_file, sha256

            try:
                self._hashes[store] = sha256(data_file(store))
            except (UserError, OSError):
                self._hashes[store] = None
        return self._hashes[store]


def _run_record(evaluation: Evaluation) -> dict[str, Any]:
    model = evaluation.summary.get("model")
    return (_json(Path(str(model)) / "run.json") or {}) if model else {}


def _prompts_only(recipe: Mapping[str, Any]) -> bool:
    """Return whether a recipe reads a store for its questions alone: the student writes all that is learnt from."""
    mode = str(recipe.get("mode") or "").replace("_", "-")
    return mode == "grpo" or (mode == "on-policy" and recipe.get("student_share", 1.0) == 1.0)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else None


def _numbers(ledger: Any) -> Cost | None:
    """Return a ledger's quantities as numbers; None where there is no ledger."""
    if not isinstance(ledger, Mapping):
        return None
    return {
        key: float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
        for key, value in ledger.items()
    }


def charged(training: Mapping[str, Any] | None, generation: Cost | None, share: float) -> Cost:
    """Return what a model cost by each of `QUANTITIES`, None where that is not known.

    Args:
        training: its run's ledger.
        generation: of its traces; None: nothing is added.
        share: of `generation` that it is charged with.
    """
    own = _numbers(training) or {}
    total: Cost = {key: own.get(key) for key in QUANTITIES}
    if generation is not None and share > 0:
        for key in GENERATED:
            mine, theirs = total[key], generation.get(key)
            total[key] = None if mine is None or theirs is None else mine + share * theirs
    return total


def mean_ledger(ledgers: Sequence[Mapping[str, Any] | None]) -> Cost | None:
    """Return the mean cost of one run, of what all of them recorded; None where there is nothing."""
    listed = [_numbers(ledger) or {} for ledger in ledgers]
    mean: Cost = {}
    for key in listed[0]:
        values = [row.get(key) for row in listed]
        if all(value is not None for value in values):
            mean[key] = float(np.mean([value for value in values if value is not None]))
    return mean or None
