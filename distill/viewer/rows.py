"""Traces as the rows of the page's data: JSON that no text in it can end, in blocks that a browser reads one by one.

Reasoning and answer are in a completion once each: a row holds `thought` and `text`, which joined are the completion.
A field that is empty or null is left out. The script (`data/view_traces.js`) reads what is written here.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator
from typing import Any

from distill.records import Trace
from distill.viewer.folder import Entry, verdict_of

BLOCK_CHARACTERS = 4_000_000  # a browser parses that in about 20 ms; one string must stay below 512 M
# In JSON these stand inside strings only, where an escape means the same. With "<" escaped no text can close the
# element, open a comment or start another script; U+2028 and U+2029 end a line of script in older readers.
ESCAPES = {"<": "\\u003c", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def choose(questions: Iterable[str], *, limit: int | None = None, sample: int | None = None) -> list[str]:
    """Return the uids of the questions to show, in their order: the first `limit`, or `sample` drawn at random.

    The draw is by a hash of the uid, so that it is the same for the same store, whatever order it is in.
    """
    uids = list(questions)
    if limit is not None:
        return uids[:limit]
    if sample is None:
        return uids
    drawn = set(heapq.nsmallest(sample, uids, key=lambda uid: hashlib.sha256(f"view:{uid}".encode()).digest()))
    return [uid for uid in uids if uid in drawn]


def blocks(entries: Iterable[Entry], chosen: Iterable[str]) -> Iterator[str]:
    """Yield JSON lists of rows, ready to stand in an HTML element: a question's row comes before its first trace's.

    Args:
        entries: every trace of a folder.
        chosen: the uids of the questions to show.
    """
    wanted = set(chosen)
    numbers: dict[str, int] = {}
    waiting: list[str] = []
    size = 0
    for entry in entries:
        uid = entry.trace.prompt_uid
        if uid not in wanted:
            continue
        rows = []
        if uid not in numbers:
            numbers[uid] = len(numbers)
            rows.append(question_row(entry.trace))
        rows.append(trace_row(entry, question=numbers[uid]))
        for row in rows:
            waiting.append(embedded(row))
            size += len(waiting[-1])
        if size >= BLOCK_CHARACTERS:
            yield "[" + ",\n".join(waiting) + "]"
            waiting, size = [], 0
    if waiting:
        yield "[" + ",\n".join(waiting) + "]"


def question_row(trace: Trace) -> dict[str, Any]:
    """Return what all samples of a question share."""
    meta = {key: value for key, value in trace.meta.items() if isinstance(value, (str, int, float))}
    return _without_nothing(
        {
            "uid": trace.prompt_uid,
            "messages": [[turn["role"], turn["content"]] for turn in trace.messages],
            "source": trace.source,
            "meta": meta,
        }
    )


def trace_row(entry: Entry, *, question: int) -> dict[str, Any]:
    """Return what is shown of one trace; `question` is the number of its question's row."""
    trace = entry.trace
    thought, text = halves(trace)
    last = trace.verdicts[-1] if trace.verdicts else None
    row = {
        "uid": trace.uid,
        "sample": trace.sample_index,
        "seed": trace.seed,
        "tokens": trace.num_completion_tokens,
        "verdict": verdict_of(entry),
        "thought": thought,
        "text": text,
        "gold": trace.gold,
        "predicted": trace.predicted,
        "finish": trace.finish_reason,
        "status": entry.status,
        "reasons": list(entry.reasons),
        "flags": list(trace.flags),
        "verifier": f"{last.verifier} ({last.version})" if last else "",
        "why": last.reason if last else "",
        "score": last.score if last and last.score not in (0, 1) else None,
        "error": trace.error,
    }
    return {"q": question, **_without_nothing(row)}


def halves(trace: Trace) -> tuple[str, str]:
    """Return a completion in two: the reasoning with its tags, and the answer; joined, they are the completion."""
    body = trace.completion.rstrip()
    if not trace.reasoning or not body.endswith(trace.answer):
        return "", trace.completion
    cut = len(body) - len(trace.answer)
    return trace.completion[:cut], trace.completion[cut:]


def embedded(row: Any) -> str:
    """Return a value as JSON for a `<script type="application/json">`; half a surrogate pair stays an escape."""
    text = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            text = json.dumps(row, ensure_ascii=True, separators=(",", ":"))
    for character, escape in ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _without_nothing(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value not in (None, "", [], {})}
