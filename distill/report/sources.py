"""What the page says of where things came from: the funnels of trace stores, and what everything cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.errors import UserError

QUANTITIES = ("flops", "seconds", "tokens", "verifier_calls")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def funnel(store: Path) -> dict[str, Any]:
    """Read a trace store's counts and cost.

    Raises:
        UserError: funnel.json is missing or lacks its counts.
    """
    counts = _read_json(store / "funnel.json")
    manifest = _read_json(store / "manifest.json") if (store / "manifest.json").exists() else {}
    try:
        total, kept, rejected = counts["samples"], counts["kept"], dict(counts["rejected"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{store / 'funnel.json'} lacks samples, kept or rejected") from error
    rows = [("written", total, "all")]
    rows += [
        (f"rejected: {reason}", n, "out") for reason, n in sorted(rejected.items(), key=lambda kv: (-kv[1], kv[0]))
    ]
    rows.append(("kept", kept, "kept"))
    return {
        "name": store.resolve().name,
        "teacher": manifest.get("recipe", {}).get("teacher"),
        "ledger": manifest.get("ledger"),
        "rows": [{"name": n, "count": c, "kind": k, "share": c / total if total else 0.0} for n, c, k in rows],
    }


def costs(arms: Sequence[Mapping[str, Any]], funnels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the table of costs: the stores, then each arm's traces, training, rollouts and evaluation.

    Rollouts are part of the training, and only their tokens are known apart.
    """
    rows = [_cost(f"generating {f['name']}", None, f["ledger"]) for f in funnels]
    for arm in arms:
        share, name, index = arm["generation_share"], arm["name"], arm["index"]
        if arm["generation"] and share:
            part = {key: share * value for key, value in arm["generation"].items()}
            rows.append(_cost(f"{name}: its traces" + ("" if share == 1 else f", {share:.2g} of them"), index, part))
        rows.append(_cost(f"{name}: training", index, arm["training"]))
        rolled = (arm["training"] or {}).get("rollout_tokens")
        rows.append(_cost(f"{name}: of it rollouts", index, {"tokens": rolled} if rolled else None))
        rows.append(_cost(f"{name}: evaluation", index, arm["ledger"]))
    return [row for row in rows if row is not None]


def _cost(name: str, index: int | None, ledger: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not ledger:
        return None
    return {"name": name, "index": index, **{key: ledger.get(key) for key in QUANTITIES}}
