"""Answers from stored traces: a run can be repeated, judged and filtered elsewhere without its teacher.

A request is answered with the stored sample of the same prompt and the same index, and fails where there is none. The
store must have been sampled as the new run asks for: a trace never passes for one of other settings. What the samples
cost was paid when they were drawn, and stands in their store's manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.records import Completion, Trace
from distill.store import JOURNAL, read_manifest, read_traces
from teachers.backend import Request, engine_options, failed

if TYPE_CHECKING:
    from distill.signals import SignalSpec


class ReplayEngine:
    """A trace store that speaks."""

    name = "replay"
    provides = frozenset({"text", "feed"})
    config = None  # nothing is computed, but the traces were not free: the cost here is unknown, not zero

    def __init__(
        self,
        model: str,
        *,
        concurrency: int | None = None,
        engine_args: Iterable[str] = (),
        chat_template: Any = None,
        trust_remote_code: bool = False,
    ) -> None:
        engine_options(engine_args, known=())
        if chat_template is not None:
            raise UserError("the replay backend renders nothing: leave --chat-template out")
        self.folder = _store(model)
        self.in_flight = concurrency or 1
        self.sampling = read_manifest(self.folder).get("recipe", {}).get("sampling")
        self.places: dict[tuple[str, int], int] = {}
        with (self.folder / JOURNAL).open("rb") as journal:
            start = 0
            for line in journal:
                if line.endswith(b"\n"):
                    row = json.loads(line)
                    self.places[row["prompt_uid"], row["sample_index"]] = start  # the last one of a retried sample
                start += len(line)
        self.description = f"stored traces of {self.folder}, {len(self.places)} samples, {self.in_flight} in flight"

    @classmethod
    def identify(cls, model: str | None, **_: Any) -> tuple[str, str]:
        """Return the store's folder, and the identity of whoever wrote its traces.

        Raises:
            UserError: not a trace store, or one that does not say who.
        """
        folder = _store(model)
        first: Trace | None = next(read_traces(folder), None)
        if first is None:
            raise UserError(f"{folder} holds no trace to replay")
        return str(model), first.teacher

    def generate(
        self, requests: Iterable[Request | None], sampling: Mapping[str, Any], *, signal: SignalSpec | None = None
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield every request with its stored completion, in the order asked (see `teachers.backend.Backend`).

        Raises:
            UserError: the store was sampled with other settings.
        """
        if self.sampling is not None and dict(self.sampling) != dict(sampling):
            raise UserError(f"{self.folder} was sampled with {self.sampling}, here {dict(sampling)} is asked for")
        with (self.folder / JOURNAL).open("rb") as journal:
            for request in requests:
                if request is None:
                    continue  # every request is answered before the next is pulled
                place = self.places.get((request.prompt.uid, request.sample_index))
                if place is None:
                    yield request, failed(f"{self.folder} holds no sample {request.sample_index} of this prompt")
                    continue
                journal.seek(place)
                yield request, _completion(Trace.from_json(json.loads(journal.readline())))

    def close(self) -> None:
        """Nothing is open."""


def _completion(trace: Trace) -> Completion:
    return Completion(
        text=trace.completion,
        finish_reason=trace.finish_reason,
        num_prompt_tokens=trace.num_prompt_tokens,
        num_completion_tokens=trace.num_completion_tokens,
        error=trace.error,
    )


def _store(model: str | None) -> Path:
    if model is None:
        raise UserError("--backend replay answers from a trace store: name its folder with --teacher")
    folder = Path(model).expanduser()
    if not (folder / JOURNAL).is_file():
        raise UserError(f"{folder} is not a trace store: it has no {JOURNAL}")
    return folder
