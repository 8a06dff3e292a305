"""`distill filter`: a trace store judged and filtered again, without generating."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from distill.config import FilterConfig
from distill.errors import RunError, UserError
from distill.progress import Meter
from distill.records import Prompt, Trace
from distill.store import FUNNEL, JOURNAL, MANIFEST, TraceStore, latest, write_views
from teachers.filters import make_judge, parse_drop, parse_keep
from teachers.sampling import verifier_name
from teachers.verifiers.pool import VerifierPool


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
