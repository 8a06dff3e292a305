"""`distill filter`: a trace store judged and filtered again, without generating."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distill.config import FilterConfig, key_values
from distill.errors import RunError, UserError
from distill.records import Prompt
from distill.store import FUNNEL, JOURNAL, MANIFEST, TraceStore, latest
from teachers.curation import Curator
from teachers.judging import JudgeModel, judge_store
from teachers.verifiers.gold import verifier_name


def run_filter(config: FilterConfig, judge: JudgeModel | None = None) -> dict[str, Any]:
    """Carry out `distill filter`: new verdicts if asked, then new views of the journal; return the summary.

    Args:
        judge: the model that a judging verifier asks.

    Raises:
        UserError: not a trace store, an unknown rule or filter, or an output folder that is another store.
        RunError: the disk is full, a judge's engine failed, or no trace survived.
    """
    curator = Curator(config)
    options = key_values(config.verifier_option, "--verifier-option")
    if config.verifier is None and (options or judge):
        raise UserError("--verifier-option and --judge are for --verifier, which is not given")
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
            judge_store(
                source,
                name,
                options=options,
                judge=judge,
                workers=config.verifier_workers,
                limit_seconds=config.verifier_seconds,
            )
        if elsewhere:
            out.mkdir(parents=True, exist_ok=True)
            shutil.copy2(config.store / MANIFEST, out / MANIFEST)
        funnel = curator.write(config.store, out)
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
    asked = (Prompt(messages=trace.messages, gold=trace.gold, meta=trace.meta) for trace in latest(store))
    name = verifier_name(setting, asked)
    if name is None:
        why = "no trace has a gold answer" if setting == "auto" else "it judges nothing"
        raise UserError(f"--verifier {setting}: {why}; leave it out to keep the stored verdicts")
    return name
