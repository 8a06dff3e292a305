"""The words at the top of the page: what a folder is, in a headline, a few facts, and remarks on what is amiss.

Counts come from the traces themselves; where `funnel.json` has others, the page says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distill.report.numbers import count, duration, percent
from distill.viewer.census import Census
from distill.viewer.folder import Folder

SCORES = (  # of eval.json, as words; shares
    ("pass@k", "Pass@k"),
    ("maj@k", "Maj@k"),
    ("truncated", "Truncated"),
    ("no_answer", "No answer"),
    ("repetition", "Repetition"),
)


def noun(number: int, word: str) -> str:
    """Return `1 trace` or `2 traces`."""
    return f"{count(number)} {word}{'' if number == 1 else 's'}"


def headline(folder: Folder, census: Census) -> str:
    """Return the one finding: how many traces were kept, or how many samples are right."""
    if folder.scores is not None and _is_number(folder.scores.get("pass@1")):
        return f"{percent(folder.scores['pass@1'])} right on {noun(len(census.questions), 'question')}"
    if folder.kind == "rollouts":
        return f"{noun(census.traces, 'answer')} of a student in training, the first of every sampling"
    if folder.kind == "evaluation":
        return f"{noun(census.traces, 'sample')} of an evaluation that has not finished"
    if census.pending == census.traces:
        return f"{noun(census.traces, 'trace')}, not filtered yet"
    return f"{count(census.kept)} of {noun(census.traces, 'trace')} kept"


def facts(folder: Folder, census: Census) -> list[tuple[str, str]]:
    """Return (name, value) pairs: who wrote the traces, on what, how, by which rules, at what cost."""
    recipe = _mapping(folder.manifest.get("recipe"))
    scores = folder.scores or {}
    author = "Teacher" if folder.kind == "store" else "Model"
    found: list[tuple[str, Any]] = [
        (author, _name(scores.get("model") or recipe.get(author.lower()))),
        ("Prompts", _name(scores.get("prompts") or recipe.get("prompts"))),
        ("Questions", count(len(census.questions))),
        ("Sampling", ", ".join(_sampling(_mapping(recipe.get("sampling"))))),
        *_scores(scores),
    ]
    if folder.funnel is not None:
        found += [("Keep", folder.funnel.get("keep")), ("Drop", _listed(folder.funnel.get("drop")))]
    ledger = _mapping(folder.manifest.get("ledger"))
    if _is_number(ledger.get("tokens")) and _is_number(ledger.get("seconds")):
        found.append(("Written", f"{count(ledger['tokens'])} tokens in {duration(ledger['seconds'])}"))
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def remarks(folder: Folder, census: Census, *, shown: int, sampled: bool) -> list[str]:
    """Return sentences on what the page does not show, and on files that disagree with each other.

    Args:
        shown: how many questions the page has.
        sampled: whether they were drawn at random, rather than the first ones.
    """
    said = []
    if shown < len(census.questions):
        which = "drawn at random" if sampled else "the first"
        said.append(
            f"This page has {count(shown)} of {noun(len(census.questions), 'question')}, {which}; the counts above the "
            "filters are of all of them."
        )
    if folder.kind != "store":
        return said
    if 0 < census.pending < census.traces:  # where it is all of them, the headline says it
        said.append(f"{noun(census.pending, 'trace')} not filtered yet: the run that drew them has not finished.")
    if folder.funnel is not None and not census.pending:
        told = tuple(folder.funnel.get(name) for name in ("samples", "kept", "rejected"))
        if told != (census.traces, census.kept, dict(census.rejected)):
            said.append("funnel.json has other counts than these files; distill filter makes all of them anew.")
    aside = folder.manifest.get("set_aside")
    if isinstance(aside, list) and aside:
        said.append(f"{noun(len(aside), 'prompt')} not asked: see set_aside in manifest.json.")
    return said


def _scores(scores: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    interval, per_question = scores.get("ci95"), scores.get("samples_per_question", 1)
    if isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval)):
        low, high = (f"{100 * end:.1f}" for end in interval)
        yield "95 % interval", f"{low} to {high}"
    for key, name in SCORES:
        if _is_number(scores.get(key)) and not ("@k" in key and per_question == 1):
            yield name.replace("@k", f"@{per_question}"), percent(scores[key])


def _sampling(sampling: Mapping[str, Any]) -> Iterator[str]:
    for key, value in sampling.items():
        if key == "max_completion_length" and _is_number(value):
            yield f"at most {count(value)} tokens"
        elif value is not None:
            yield f"{key.replace('_', '-')} {value}"


def _listed(names: Any) -> str:
    return str(names).replace(",", ", ") if names else ""


def _name(value: Any) -> str:
    """Return a name as it is; of a path, which says where somebody's files lie, the last two parts."""
    path = Path(str(value or ""))
    return "/".join(path.parts[-2:]) if path.is_absolute() else str(value or "")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
