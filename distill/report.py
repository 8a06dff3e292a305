"""One self-contained HTML page of a comparison, for people: `report.html`.

Everything is in the file: no script, no font, no image, no request (a Content-Security-Policy says so to the browser).
Questions, completions and names are text written by others and are escaped by the template, always. This module lays
out numbers (positions in percent of a chart's width, pixels of its height); `data/report.html.j2` draws them. The
figures themselves come from `distill.compare`; only what it does not hold (levels, lengths, texts) is read again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.compare import score_matrix
from distill.errors import UserError
from distill.evaluate import Evaluation, gave_answer, load_evaluation, sample_score
from distill.records import Trace
from distill.statistics import accuracy_interval

SHOWN_QUESTIONS = 4
SHOWN_CHARACTERS = 6000  # of one completion; the page says how many more there are
PLOT_HEIGHT = 240  # pixels of the level chart from 0 to 100 %
BAR_HEIGHT = 42
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def write_report(
    result: Mapping[str, Any],
    out: Path,
    *,
    eval_dirs: Sequence[Path],
    stores: Sequence[Path] = (),
    title: str = "Distillation compared",
) -> Path:
    """Write the page of a comparison.

    Args:
        result: what `distill.compare.compare` returned (or compare.json, read back).
        out: a file ending in .html, or a folder that gets `report.html`.
        eval_dirs: the evaluation folders of the comparison.
        stores: trace stores whose funnel to show; each has funnel.json, and manifest.json for the cost.
        title: the line above the verdict, and of the browser's tab.

    Returns:
        The file written.

    Raises:
        UserError: a folder is broken, or the folders are not those of the comparison.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loaded = {Path(folder).resolve(): load_evaluation(Path(folder)) for folder in eval_dirs}
    members: list[list[Evaluation]] = []
    for arm in result["arms"]:
        folders = [Path(folder).resolve() for folder in arm["evals"]]
        missing = [folder for folder in folders if folder not in loaded]
        if missing:
            raise UserError(f"the report needs {missing[0]}, an evaluation of arm {arm['name']!r} in the comparison")
        members.append([loaded[folder] for folder in folders])

    arms = [{**arm, "index": index} for index, arm in enumerate(result["arms"])]
    funnels = [_funnel(Path(store)) for store in stores]
    levels, by_level = _levels(members, int(result["samples_per_question"]))
    environment = Environment(
        loader=PackageLoader("distill", "data"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(FILTERS)
    page = environment.get_template("report.html.j2").render(
        title=title,
        result=result,
        arms=arms,
        many_seeds=any(len(arm["seeds"]) > 1 for arm in arms),
        bits=any(arm["bits_per_byte"] is not None for arm in arms),
        share_ticks=[
            {"at": at, "label": f"{at} %" if at in (0, 100) else f"{at}", "zero": at == 0}
            for at in (0, 25, 50, 75, 100)
        ],
        **_forest(result),
        levels=levels,
        by_level=by_level,
        lengths=_lengths(members),
        stores=funnels,
        costs=_costs(arms, funnels),
        traces=_side_by_side(arms, members),
    )
    path = out if out.suffix == ".html" else out / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # A completion may hold half a surrogate pair, which UTF-8 cannot: it is shown as "?".
    partial.write_bytes(page.encode("utf-8", "replace"))
    os.replace(partial, path)
    return path


def place(share: float) -> float:
    """Return a share as a position in percent, short enough for an attribute."""
    return round(100 * float(share), 3)


def percent(share: float) -> str:
    """Return `61.3 %`."""
    return f"{100 * share:.1f} %"


def signed(share: float) -> str:
    """Return `+4.1` or `−4.1`, in points."""
    return f"{100 * share:+.1f}".replace("-", "−")


def p_value(p: float) -> str:
    """Return a p-value to the precision its bootstrap has."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def count(value: float | None) -> str:
    """Return `12 345` with narrow no-break spaces, or a dash where nothing is known."""
    return "–" if value is None else f"{round(value):,}".replace(",", "\u202f")


def flops(value: float | None) -> str:
    """Return `1.2 × 10¹⁵`."""
    if value is None:
        return "–"
    if value <= 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def duration(seconds: float | None) -> str:
    """Return `41 s`, `4 min 20 s` or `2 h 5 min`."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


FILTERS: dict[str, Callable[..., Any]] = {
    "place": place,
    "percent": percent,
    "number": lambda share: f"{100 * share:.1f}",
    "signed": signed,
    "p_value": p_value,
    "count": count,
    "tokens": lambda value: count(value) if value >= 100 else f"{value:.1f}",
    "flops": flops,
    "duration": duration,
    "sentence": lambda text: text[:1].upper() + text[1:] + "." if text.startswith("no ") else text + ".",
    "words": lambda name: str(name).replace("_", " ").capitalize(),
}


def nice_step(width: float, pieces: int) -> float:
    """Return the step of 1, 2 or 5 times a power of ten that cuts `width` into at most `pieces` pieces."""
    raw = max(width, 1e-9) / pieces
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))


def _forest(result: Mapping[str, Any]) -> dict[str, Any]:
    """Place the paired differences on one axis that always shows zero; pairs with the first arm come first."""
    pairs, names = result["pairs"], [arm["name"] for arm in result["arms"]]
    low, high = min(0.0, *(p["ci95"][0] for p in pairs)), max(0.0, *(p["ci95"][1] for p in pairs))
    step = nice_step(100 * (high - low), 5)
    first, last = math.floor(100 * low / step), math.ceil(100 * high / step)
    last = max(last, first + 1)

    def at(share: float) -> float:
        return round(100 * (100 * share / step - first) / (last - first), 3)

    digits = 0 if step >= 1 else -math.floor(math.log10(step))
    ticks = [
        {"at": at(i * step / 100), "label": f"{i * step:+.{digits}f}".replace("-", "−") if i else "0", "zero": i == 0}
        for i in range(first, last + 1)
    ]
    views = [
        {
            **pair,
            "at": at(pair["difference"]),
            "low_at": at(pair["ci95"][0]),
            "high_at": at(pair["ci95"][1]),
            "unsure": pair["ci95"][0] <= 0 <= pair["ci95"][1],
            "index": names.index(pair["a"]),
        }
        for pair in pairs
    ]
    aside = len(views) > 6
    return {
        "difference_ticks": ticks,
        "main_pairs": [v for v in views if v["b"] == names[0] or not aside],
        "other_pairs": [v for v in views if v["b"] != names[0] and aside],
    }


def _levels(members: Sequence[Sequence[Evaluation]], per_question: int) -> tuple[list[Any], list[list[Any]]]:
    """Group the questions by `meta["level"]`; empty unless at least two levels are known for every question."""
    samples = members[0][0].samples
    level_of = {uid: group[0].meta.get("level") for uid, group in samples.items()}
    names = sorted({v for v in level_of.values() if v is not None}, key=lambda v: (isinstance(v, str), v))
    if len(names) < 2 or None in level_of.values():
        return [], []
    width = 100 / len(names)
    levels = [
        {"name": name, "questions": sum(v == name for v in level_of.values()), "at": round((i + 0.5) * width, 3)}
        for i, name in enumerate(names)
    ]
    by_level = []
    for index, arm in enumerate(members):
        # A sixth of a level's width is shared out so that intervals of several arms do not cover each other.
        aside = (index - (len(members) - 1) / 2) / len(members) * width / 3
        series = []
        for level in levels:
            scores = score_matrix(arm, [uid for uid, v in level_of.items() if v == level["name"]])
            accuracy, ci95 = float(scores.mean()), accuracy_interval(scores, samples_per_question=per_question)
            y, low_y, high_y = (round(PLOT_HEIGHT * (1 - share), 1) for share in (accuracy, *ci95))
            at = round(level["at"] + aside, 3)
            series.append({"accuracy": accuracy, "ci95": ci95, "at": at, "y": y, "low_y": low_y, "high_y": high_y})
        by_level.append(series)
    return levels, by_level


def _lengths(members: Sequence[Sequence[Evaluation]]) -> dict[str, Any]:
    """Count completion lengths in common bins; bars are stacked right, wrong, truncated, each arm to its own height."""
    traces = [[t for e in arm for t in e.traces] for arm in members]
    longest = max(1, *(t.num_completion_tokens for arm in traces for t in arm))
    step = nice_step(longest, 5)
    top = step * math.ceil(longest / step)
    edges = np.linspace(0, top, 41)
    rows = []
    for arm in traces:
        kinds = {"right": [], "wrong": [], "cut": []}  # type: dict[str, list[int]]
        for trace in arm:
            kind = "cut" if trace.finish_reason == "length" else "right" if sample_score(trace) >= 1 else "wrong"
            kinds[kind].append(trace.num_completion_tokens)
        counts = {kind: np.histogram(values, bins=edges)[0] for kind, values in kinds.items()}
        scale = BAR_HEIGHT / max(1, int(sum(counts.values()).max()))  # type: ignore[union-attr]
        bars = []
        for i in range(len(edges) - 1):
            foot = 46.0
            for kind, tally in counts.items():
                if tally[i]:
                    height = float(tally[i]) * scale
                    foot -= height
                    x, width = round(i * 2.5 + 0.2, 2), 2.1
                    bars.append({"kind": kind, "x": x, "width": width, "y": round(foot, 2), "height": round(height, 2)})
        rows.append({"bars": bars, "median": float(np.median([t.num_completion_tokens for t in arm]))})
    ticks = [
        {"at": round(100 * i * step / top, 3), "label": count(i * step), "zero": False}
        for i in range(round(top / step) + 1)
    ]
    return {"rows": rows, "ticks": ticks}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _funnel(store: Path) -> dict[str, Any]:
    """Read a trace store's counts and cost.

    Raises:
        UserError: funnel.json is missing or lacks its counts.
    """
    funnel = _read_json(store / "funnel.json")
    manifest = _read_json(store / "manifest.json") if (store / "manifest.json").exists() else {}
    try:
        total, kept, rejected = funnel["samples"], funnel["kept"], dict(funnel["rejected"])
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


def _costs(arms: Sequence[Mapping[str, Any]], funnels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    runs = [(f"generating {f['name']}", None, f["ledger"]) for f in funnels]
    runs += [(f"training {arm['name']}", arm["index"], arm["training"]) for arm in arms]
    runs += [(f"evaluating {arm['name']}", arm["index"], arm["ledger"]) for arm in arms]
    return [
        {"name": name, "index": index, **{key: ledger.get(key) for key in ("flops", "seconds", "tokens")}}
        for name, index, ledger in runs
        if ledger
    ]


def _said(trace: Trace) -> str:
    if trace.finish_reason == "length":
        return "✗ truncated"
    if not gave_answer(trace):
        return "✗ no answer"
    return ("✓ " if sample_score(trace) >= 1 else "✗ ") + str(trace.predicted)


def _side_by_side(arms: Sequence[Mapping[str, Any]], members: Sequence[Sequence[Evaluation]]) -> dict[str, Any]:
    """Pick the questions on which arms disagree most (variance of their scores; the earlier one on a tie)."""
    uids = list(members[0][0].samples)
    disagreement = np.array([score_matrix(arm, uids).mean(0) for arm in members]).var(0)
    chosen = np.argsort(-disagreement, kind="stable")[:SHOWN_QUESTIONS]
    questions = []
    for i in chosen:
        shown = [arm[0].samples[uids[i]][0] for arm in members]
        answers = []
        for arm, trace in zip(arms, shown, strict=True):
            # The raw text is shown; the part of it that is reasoning, where it can be found, is drawn softer.
            text = trace.completion[:SHOWN_CHARACTERS]
            start = trace.completion.find(trace.reasoning) if trace.reasoning else -1
            cut = start + len(trace.reasoning) if start >= 0 else 0
            if cut and text[cut:].lstrip().startswith("</think>"):
                cut = text.index("</think>", cut) + len("</think>")
            answers.append(
                {
                    "name": arm["name"],
                    "index": arm["index"],
                    "right": sample_score(trace) >= 1,
                    "said": _said(trace),
                    "thought": text[:cut],
                    "text": text[cut:],
                    "tokens": trace.num_completion_tokens,
                    "hidden": max(0, len(trace.completion) - SHOWN_CHARACTERS),
                }
            )
        questions.append(
            {
                "text": "\n\n".join(m["content"] for m in shown[0].messages if m["role"] != "system"),
                "gold": shown[0].gold,
                "level": shown[0].meta.get("level"),
                "answers": answers,
            }
        )
    agree = not disagreement[chosen].any()
    lead = "The arms score alike on every question; the first few." if agree else "Where the arms disagree most."
    return {"questions": questions, "lead": lead}
