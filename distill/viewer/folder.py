"""What lies in a folder to be viewed: its traces, and what was decided about each.

A trace store has a journal and views made from it; while a run is going on, or was killed, the views are behind and
some traces are `pending`: neither kept nor rejected yet. A folder made by `distill filter --out` has the views alone.
An evaluation has samples, a training by rewards some of the student's rollouts, and both keep them all. Nothing is
judged or filtered here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from distill.errors import UserError
from distill.evaluate import sample_score
from distill.records import Trace
from distill.reinforce.journal import ROLLOUTS
from distill.store import FUNNEL, JOURNAL, KEPT, MANIFEST, REJECTED, read_lines, read_traces

SAMPLES, SCORES = "samples.jsonl", "eval.json"
Status = Literal["kept", "rejected", "pending", ""]  # "" in an evaluation, where nothing is rejected
FAILED = ("failed",)


@dataclass(frozen=True, slots=True)
class Entry:
    """One trace with what was decided about it: `reasons` is empty unless it is rejected."""

    trace: Trace
    status: Status = ""
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder to be viewed, opened: its JSON files are read, its traces are not."""

    path: Path
    kind: Literal["store", "evaluation", "rollouts"]
    journal: Path | None  # None where only views are there
    views: tuple[Path, ...]  # kept.jsonl and rejected.jsonl, as far as they are there
    decided: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]  # uid: why rejected, flags
    funnel: Mapping[str, Any] | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] | None = None  # eval.json


def open_folder(path: Path) -> Folder:
    """Read what says how a folder's traces are to be read.

    Raises:
        UserError: none of these, or a file of it is damaged.
    """
    manifest = _json(path / MANIFEST) or {}
    if (path / SAMPLES).is_file():
        return Folder(path, "evaluation", path / SAMPLES, (), {}, manifest=manifest, scores=_json(path / SCORES))
    if (path / ROLLOUTS).is_file():
        return Folder(path, "rollouts", path / ROLLOUTS, (), {})
    views = tuple(path / name for name in (KEPT, REJECTED) if (path / name).is_file())
    if not views and not (path / JOURNAL).is_file():
        raise UserError(
            f"{path} is neither a trace store nor an evaluation: it has none of {JOURNAL}, {KEPT}, {REJECTED}, "
            f"{SAMPLES} and {ROLLOUTS}; name the --out of generate, filter, eval or a training by rewards"
        )
    journal = path / JOURNAL if (path / JOURNAL).is_file() else None
    decided = {}
    if journal is not None:
        for view in views:
            for number, row in read_lines(view):
                trace, reasons = _read(view, number, row)
                decided[trace.uid] = (reasons, trace.flags)
    return Folder(path, "store", journal, views, decided, funnel=_json(path / FUNNEL), manifest=manifest)


def read_entries(folder: Folder) -> Iterator[Entry]:
    """Yield the trace of every line, in the journal's order; without a journal, the kept ones first.

    A sample that failed and was drawn again has several lines; `distill.viewer.census.current` leaves the last.

    Raises:
        UserError: a line is damaged (named by number).
    """
    if folder.kind != "store":
        assert folder.journal is not None
        yield from map(Entry, read_traces(folder.journal))
    elif folder.journal is not None:
        for trace in read_traces(folder.journal):
            reasons, flags = folder.decided.get(trace.uid, (None, ()))
            # A sample that failed and was then drawn again is decided anew at the end of the run that drew it.
            if reasons is None or (reasons == FAILED) != (trace.error is not None):
                yield Entry(trace, "pending")
            else:
                yield Entry(replace(trace, flags=flags), "rejected" if reasons else "kept", reasons)
    else:
        for view in folder.views:
            for number, row in read_lines(view):
                trace, reasons = _read(view, number, row)
                yield Entry(trace, "rejected" if reasons else "kept", reasons)


def count_lines(folder: Folder) -> int:
    """Return how many lines `read_entries` reads."""
    lines = 0
    for path in [folder.journal] if folder.journal is not None else folder.views:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                lines += chunk.count(b"\n")
    return lines


def verdict_of(entry: Entry) -> str:
    """Return `right`, `wrong` or `unjudged`; in an evaluation a truncated sample is wrong, as its scores have it."""
    trace = entry.trace
    if trace.error is not None or trace.score is None:
        return "unjudged"
    score = trace.score if entry.status else sample_score(trace)
    return "right" if score >= 1 else "wrong"


def _read(view: Path, number: int, row: dict[str, Any]) -> tuple[Trace, tuple[str, ...]]:
    """Return the trace and the reasons of a view's line; kept.jsonl has what `distill.store.as_conversation` makes."""
    try:
        if "completion" not in row:
            *prompt, turn = row["messages"]
            texts = {name: json.loads(row[name]) for name in ("meta", "flags")}
            empty = {name: row[name] or None for name in ("gold", "predicted")}
            row = {**row, **texts, **empty, "messages": prompt, "completion": turn["content"]}
        reasons = tuple(row["reasons"]) if view.name == REJECTED else ()
        if view.name == REJECTED and not reasons:
            raise ValueError("rejected without a reason")
        return Trace.from_json(row), reasons
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{view} line {number} is not a trace: {error!r}; `distill filter` makes it anew") from error


def _json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, None where there is no file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must be a JSON object, not {type(value).__name__}")
    return value
