"""What a pass over a folder's lines counts: questions, traces, and what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from distill.errors import UserError
from distill.viewer.folder import Entry, verdict_of


@dataclass(frozen=True, slots=True)
class Census:
    """The counts of a folder, each trace once.

    `questions` maps the uid of each question, in order of appearance, to its number of traces; `rejected` counts by
    first reason, the most frequent first, so that with `kept` and `pending` it adds up to `traces`. `verdicts` counts
    by `verdict_of`. `lines` were read; `superseded` says how many of them a later line of the same uid replaces.
    """

    questions: Mapping[str, int]
    traces: int
    kept: int
    pending: int
    rejected: Mapping[str, int]
    verdicts: Mapping[str, int]
    lines: int
    superseded: Mapping[str, int]


def take_census(entries: Iterable[Entry], *, path: Path) -> Census:
    """Count the traces of a folder's lines; `path` is the folder's, for the error.

    Raises:
        UserError: there is no trace.
    """
    last: dict[str, tuple[str, str, str, str]] = {}
    superseded: Counter[str] = Counter()
    for entry in entries:
        uid = entry.trace.uid
        if last.pop(uid, None) is not None:  # so that the uid takes the place of its last line
            superseded[uid] += 1
        reason = entry.reasons[0] if entry.reasons else ""
        last[uid] = (entry.trace.prompt_uid, entry.status, reason, verdict_of(entry))
    if not last:
        raise UserError(f"{path} holds no trace yet")
    questions, statuses, reasons, verdicts = (Counter(values) for values in zip(*last.values(), strict=True))
    del reasons[""]
    return Census(
        questions=questions,
        traces=len(last),
        kept=statuses["kept"],
        pending=statuses["pending"],
        rejected=dict(reasons.most_common()),
        verdicts=verdicts,
        lines=len(last) + superseded.total(),
        superseded=superseded,
    )


def current(entries: Iterable[Entry], census: Census) -> Iterator[Entry]:
    """Yield the entries that were counted, without those that a later line of the same trace replaces.

    A run may add lines while the page is made; they are for the next one.
    """
    left = Counter(census.superseded)
    for entry in islice(entries, census.lines):
        if left[entry.trace.uid] > 0:
            left[entry.trace.uid] -= 1
        else:
            yield entry
