"""`distill score`: what a teacher says about traces that exist, token by token, into a store's `signal/`.

The teacher need not be who wrote them; the header of `signal/` says whose numbers they are. Each conversation is
rendered with the scoring teacher's own chat template and tokenizer, exactly as a student of that tokenizer would be
trained on it, end token included. What is scored already is left out, which is all that resume is. A trace beyond the
teacher's context is counted and left out, never cut.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill.config import ScoreConfig
from distill.errors import RunError, UserError
from distill.ledger import Ledger, forward_cost
from distill.progress import Meter, say
from distill.records import Message
from distill.render import render
from distill.signals import HEADER, SignalReader, SignalSpec, SignalWriter
from distill.store import JOURNAL, KEPT, MANIFEST, SIGNAL, TraceStore, latest, read_lines, read_manifest, write_json
from teachers.backend import Backend
from teachers.plan import Author
from teachers.sampling import NOTE_SECONDS, signal_writer, versions


def run_score(config: ScoreConfig, author: Author, open_backend: Callable[[], Backend]) -> dict[str, Any]:
    """Carry out `distill score` and return the summary.

    Args:
        author: the teacher that scores, resolved.
        open_backend: starts the engine, which provides "score"; called only when something is left to score.

    Raises:
        UserError: not a trace store, nothing or two things asked for, or a folder with other numbers.
        RunError: the engine or the disk failed, or there is nothing that can be scored. What was finished is kept.
    """
    spec = spec_of(config.top_logprobs, config.sample_logprobs)
    if spec is None:
        raise UserError("say what to store: --top-logprobs K or --sample-logprobs N")
    if not (config.store / JOURNAL).is_file():
        raise UserError(f"{config.store} is not a trace store: it has no {JOURNAL}")
    folder = config.out or config.store / SIGNAL
    with ExitStack() as stack:
        stack.enter_context(TraceStore(config.store))
        wanted = {uid for uid, _ in conversations(config.store, config.which)}
        if not wanted:
            raise RunError(f"{config.store} holds no trace to score yet")
        missing = wanted - _scored(folder, spec, author)
        if already := len(wanted) - len(missing):
            say(f"{already} of {len(wanted)} traces are already scored in {folder}")
        facts = {"teacher": author.identity, **asdict(spec), "which": config.which, "out": str(folder)}
        work = _Work(config.store, len(read_manifest(config.store).get("scores", [])), facts)
        if missing:
            stack.callback(work.note)
            backend = open_backend()
            stack.callback(backend.close)
            work.note()
            say(f"model: {author.identity}, {backend.description}")
            writer = stack.enter_context(signal_writer(folder, spec, backend, author))
            with Meter("score", len(wanted), done=already) as meter:
                work.score(backend, writer, spec, meter, _missing(config, missing))
    if work.too_long:
        say(f"left out {work.too_long} traces that are longer than the context of {author.name}")
    if not already and not work.scored:
        raise RunError(f"none of {len(wanted)} traces fits into the context of {author.name}")
    return {"out": str(folder), "traces": len(wanted), "already": already, **work.to_json()}


def spec_of(top: int | None, sampled: int | None) -> SignalSpec | None:
    """Return what `--top-logprobs` and `--sample-logprobs` ask for; None when neither is given.

    Raises:
        UserError: both are.
    """
    if top is not None and sampled is not None:
        raise UserError("--top-logprobs and --sample-logprobs exclude each other: a folder holds one kind of numbers")
    if top is not None:
        return SignalSpec("top", top)
    return None if sampled is None else SignalSpec("sampled", sampled)


def conversations(store: Path, which: str) -> Iterator[tuple[str, list[Message]]]:
    """Yield uid and messages, the assistant's turn last, of the kept traces or of all that came to their end.

    Raises:
        UserError: a view or journal that is missing or damaged.
    """
    if which == "kept":
        for number, row in read_lines(store / KEPT):
            if not isinstance(row.get("uid"), str) or not isinstance(row.get("messages"), list):
                raise UserError(f"{store / KEPT} line {number} is not a kept trace: it has no uid or messages")
            yield row["uid"], row["messages"]
        return
    for trace in latest(store):
        if trace.error is None and trace.finish_reason == "stop":
            yield trace.uid, [*trace.messages, {"role": "assistant", "content": trace.completion}]


def _missing(config: ScoreConfig, missing: set[str]) -> Iterator[tuple[str, list[Message]]]:
    return (item for item in conversations(config.store, config.which) if item[0] in missing)


def _scored(folder: Path, spec: SignalSpec, author: Author) -> set[str]:
    """Return the uids that a folder holds, after a look at whose numbers they are: before an engine is started."""
    if not (folder / HEADER).is_file():
        return set()
    there = SignalReader(folder)
    if len(there):
        there.require(**asdict(spec), teacher=author.identity)
    return set(there.uids)


@dataclass(slots=True)
class _Work:
    """One run over a store, and what it cost so far."""

    store: Path
    number: int  # of the store's earlier runs
    facts: dict[str, Any]
    scored: int = 0
    too_long: int = 0
    stored_bytes: int = 0
    ledger: Ledger = field(default_factory=Ledger)

    def score(
        self,
        backend: Any,
        writer: SignalWriter,
        spec: SignalSpec,
        meter: Meter,
        items: Iterator[tuple[str, list[Message]]],
    ) -> None:
        """Score and store until nothing is left, noting the cost in the manifest now and then."""
        began = noted = time.monotonic()
        cost = forward_cost(backend.config)
        lengths: dict[str, int] = {}
        for uid, signal in backend.score(self._tokenised(backend, items, lengths), spec):
            self.stored_bytes += writer.append(uid, signal)
            self.scored += 1
            self.ledger.tokens += len(signal)
            self.ledger.forward(cost, lengths.pop(uid))
            self.ledger.seconds = time.monotonic() - began
            rate = f"{self.ledger.tokens / max(self.ledger.seconds, 1e-9):.0f} tokens/s"
            meter.advance(f"{rate}, {self.stored_bytes / self.ledger.tokens:.1f} bytes per token")
            if time.monotonic() - noted > NOTE_SECONDS:
                noted = time.monotonic()
                self.note()

    def _tokenised(
        self, backend: Any, items: Iterator[tuple[str, list[Message]]], lengths: dict[str, int]
    ) -> Iterator[tuple[str, list[int], list[int]]]:
        """Yield uid, prompt ids and completion ids of what fits into the context; the rest is counted."""
        from distill.models import context_length

        context = getattr(backend, "context", None) or context_length(backend.config)
        for uid, messages in items:
            try:
                example = render(backend.tokenizer, messages, stop_ids=backend.end_ids)
            except UserError as error:
                raise UserError(f"the trace {uid} cannot be scored: {error}") from error
            if context is not None and len(example) > context:
                self.too_long += 1
                continue
            lengths[uid] = len(example)
            begin = int((example.weights > 0).argmax())
            ids = example.input_ids.tolist()
            yield uid, ids[:begin], ids[begin:]

    def to_json(self) -> dict[str, Any]:
        """Return what was done and what it cost."""
        per_token = self.stored_bytes / self.ledger.tokens if self.ledger.tokens else None
        done = {"scored": self.scored, "too_long": self.too_long, "bytes_per_token": per_token}
        return {**done, **self.ledger.to_json()}

    def note(self) -> None:
        """Write this run into the store's manifest."""
        manifest = read_manifest(self.store)
        run = {**self.facts, **self.to_json(), "versions": versions()}
        write_json(self.store / MANIFEST, {**manifest, "scores": [*manifest.get("scores", [])[: self.number], run]})
