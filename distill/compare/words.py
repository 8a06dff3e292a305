"""What the intervals of a comparison allow to be said, in words. Points are percentage points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

UNITS = {"flops": "FLOPs", "seconds": "seconds", "tokens": "tokens", "prompts": "unique prompts"}


def pair_verdict(pair: Mapping[str, Any], comparisons: int) -> str:
    """Say in words what the interval of a pair allows to be said."""
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


def amount(value: float, quantity: str) -> str:
    """Return a cost with its unit, such as `3.4e+11 FLOPs`."""
    return f"{value:.3g} {UNITS[quantity]}" if quantity in ("flops", "seconds") else f"{value:,.0f} {UNITS[quantity]}"


def matched_findings(
    arms: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]], budget: float, quantity: str
) -> list[str]:
    """Return what can be said of the arms that were matched at a budget; nothing where fewer than two were."""
    return [f"at {amount(budget, quantity)} each, {said}" for said in findings(arms, pairs)] if pairs else []


def target_verdict(row: Mapping[str, Any], quantity: str) -> str:
    """Say how much more of a quantity the dearer arm needs to reach what both reach."""
    bound = "at least " if row["at_least"] else ""
    low, high = row["ci95"]
    return (
        f"to answer {100 * row['target']:.1f} %, {row['dearer']} needs {bound}{_factor(row['ratio'])} times the "
        f"{UNITS[quantity]} of {row['cheaper']} [{_factor(low)}, {_factor(high)}]"
    )


def _factor(value: float) -> str:
    """Return two digits, without an exponent as far as a person would write it so."""
    return f"{float(f'{value:.2g}'):g}"


def notes(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a reader must know beside the numbers."""
    said = []
    once = [a["name"] for a in arms if len(a["seeds"]) == 1 and a["seeds"][0] is not None]
    if once:
        said.append(
            f"One training seed: {', '.join(once)}. Their intervals cover other questions and other samples, "
            "not another training run."
        )
    unjudged = sum(a["unjudged"] for a in arms)
    if unjudged:
        said.append(f"{unjudged} samples could not be judged and count as wrong.")
    unknown = [a["name"] for a in arms if a["generation_unknown"] and a["generation_share"] and len(a["curve"]) > 1]
    if unknown:
        said.append(
            f"What generating the traces of {', '.join(unknown)} cost is not known, and is not in their costs: "
            "name the trace store with --store."
        )
    return said
