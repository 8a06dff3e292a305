"""`distill generate`: prompts to a trace store, with its views.

Sampling and judging are in teachers/sampling.py, what is kept is decided in teachers/filters.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distill.config import GenerateConfig
from distill.errors import RunError, UserError
from distill.progress import say
from distill.records import Prompt
from distill.store import MANIFEST, TraceStore, latest, read_manifest, write_json, write_views
from teachers.backend import Backend
from teachers.filters import make_judge, parse_drop, parse_keep
from teachers.prompts import read_prompts, require
from teachers.sampling import Author, check_golds, fill, plan, verifier_name
from teachers.verifiers.pool import VerifierPool


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
        "reasoning": author.reasoning,
    }
