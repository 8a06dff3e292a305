"""The records that flow through the toolkit: `Prompt` -> `Trace` -> `Trace` with verdicts.

All are frozen; a stage returns a new record with one more field filled (`dataclasses.replace`). No torch here:
the whole data half (prompts to verified traces) runs without it. The JSON names are the contract of
`traces.jsonl` (docs/trace_format.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


def content_hash(value: Any) -> str:
    """Return 24 hex digits (96 bits of SHA-256) of a JSON-able value; key order does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True, kw_only=True)  # no slots: they have no place for what is computed once
class Prompt:
    """One question to a teacher or a student.

    `gold` is the reference answer, or None when there is none. `source` says where the row came from
    (`file.jsonl:12`). `meta` keeps what evaluation groups by, such as a difficulty `level`.
    """

    messages: tuple[Message, ...]
    gold: str | None = None
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def uid(self) -> str:
        """Content hash of the messages alone: a corrected gold is still the same prompt."""
        return content_hash(list(self.messages))


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a model answered to one prompt, as a backend hands it over.

    `text` starts with what the chat template prefilled for the assistant (an opened `<think>`), if anything.
    `finish_reason` is `stop` (an end token), `length` (cut at the limit), `loop` (ended early because it repeated
    itself) or `error`; counts are the author's tokens. `signal` is what the author said about each of its own tokens, a
    `distill.signals.TokenSignal`, where it was asked for.
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_completion_tokens: int
    error: str | None = None
    signal: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One verifier's opinion: `score` in [0, 1], or None when it could not be had (never counted as correct).

    `predicted` is the final answer as the verifier read it, if it found one.
    """

    verifier: str
    version: str
    score: float | None
    reason: str = ""
    predicted: str | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a view decides about a trace: why it is rejected (nothing: it is kept), and what was noticed about it."""

    reasons: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One completion of one prompt, who wrote it, and what is known about it: a line of `traces.jsonl`."""

    uid: str  # content hash of prompt, author, sampling and sample index
    prompt_uid: str
    messages: tuple[Message, ...]  # the prompt
    completion: str  # raw text, reasoning and answer
    reasoning: str
    answer: str  # what follows the reasoning
    finish_reason: str
    num_prompt_tokens: int
    num_completion_tokens: int
    sample_index: int
    seed: int
    teacher: str  # whoever wrote the completion, a student in an evaluation
    backend: str
    gold: str | None = None
    predicted: str | None = None  # the final answer as the verifier read it
    verdicts: tuple[Verdict, ...] = ()
    flags: tuple[str, ...] = ()
    source: str = ""
    error: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """The last verdict's score; None when nothing judged the trace."""
        return self.verdicts[-1].score if self.verdicts else None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; `from_json` is its inverse.

        Its values are the trace's own, not copies as `dataclasses.asdict` makes: every sample passes here twice.
        """
        row = {name: getattr(self, name) for name in _FIELDS}
        row["verdicts"] = [asdict(verdict) for verdict in self.verdicts]
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Trace:
        """Build a trace from a journal line; unknown keys, a verdict's too, are ignored: newer stores stay readable.

        Raises:
            KeyError, TypeError: a required field is missing.
        """
        values = _known(cls, row)
        values["messages"] = tuple(values["messages"])
        values["verdicts"] = tuple(Verdict(**_known(Verdict, v)) for v in values.get("verdicts", ()))
        values["flags"] = tuple(values.get("flags", ()))
        return cls(**values)


_FIELDS = tuple(f.name for f in fields(Trace))


def _known(record: type, row: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise TypeError(f"a {record.__name__} must be an object, not {type(row).__name__}")
    names = {f.name for f in fields(record)}
    return {key: value for key, value in row.items() if key in names}


def trace_uid(prompt_uid: str, author: str, sampling: Mapping[str, Any], sample_index: int) -> str:
    """Return the identity of one sample: the same four things always give the same uid, on any machine."""
    return content_hash([prompt_uid, author, dict(sampling), sample_index])


def sample_seed(run_seed: int, uid: str) -> int:
    """Return the 31-bit seed of one sample: it depends on the run's seed and the sample's uid, not on order."""
    return int(hashlib.sha256(f"{run_seed}:{uid}".encode()).hexdigest()[:8], 16) & 0x7FFFFFFF
