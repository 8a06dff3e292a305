"""`distill generate`: prompts to a trace store, with its views.

What to draw next is decided in teachers/plan.py, sampling is in teachers/sampling.py, verdicts that need all samples or
a model are in teachers/judging.py, and what is kept is decided in teachers/curation.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distill.config import GenerateConfig, key_values
from distill.errors import RunError, UserError
from distill.progress import say
from distill.records import Prompt
from distill.store import MANIFEST, TraceStore, read_manifest, write_json
from teachers.backend import Backend
from teachers.curation import Curator
from teachers.judging import JudgeModel, check_judge, judge_store, judged_after
from teachers.plan import AdaptivePlan, Author, FixedPlan, Plan
from teachers.prompts import read_prompts, require
from teachers.sampling import fill
from teachers.score import spec_of
from teachers.verifiers.gold import check_golds, verifier_name
from teachers.verifiers.pool import VerifierPool


def run_generate(
    config: GenerateConfig, author: Author, open_backend: Callable[[], Backend], judge: JudgeModel | None = None
) -> dict[str, Any]:
    """Carry out `distill generate`: fill the store at `config.out` and return the summary.

    Args:
        author: the teacher, resolved.
        open_backend: starts the engine; called only when something is left to sample.
        judge: the model that a judging verifier asks.

    Raises:
        UserError: unusable prompts or settings, or a store of another recipe.
        RunError: an engine or the disk failed, or no trace survived. The journal keeps what was finished.
    """
    curator, signal = Curator(config), spec_of(config.top_logprobs, config.sample_logprobs)
    plan_of(config, [], author)  # refuses before anything is written
    prompts, bad = read_prompts(config.prompts, limit=config.limit, system_prompt=config.system_prompt)
    verifier = verifier_name(config.verifier, prompts)
    options = key_values(config.verifier_option, "--verifier-option")
    after = verifier is not None and judged_after(verifier)
    if verifier is not None:
        check_judge(verifier, options, judge)
    elif judge is not None:
        raise UserError("--judge is for --verifier judge or universal-self-consistency")
    if curator.keep.correct and verifier is None:
        raise UserError("--keep correct needs a verifier and gold answers; the prompts have none: use --keep any")
    if config.until_correct is not None and (verifier is None or after):
        raise UserError(f"--until-correct needs a verifier that judges one trace at a time, not {verifier or 'none'}")
    if config.skip_bad_rows:
        for row in bad:
            say(f"skipped {row.source}: {row.reason}")
    needed = verifier if curator.keep.correct or config.until_correct else None
    prompts = require(prompts, bad, verifier=needed, skip=config.skip_bad_rows)
    limits: dict[str, Any] = {"workers": config.verifier_workers, "limit_seconds": config.verifier_seconds}
    with ExitStack() as stack:
        store = stack.enter_context(TraceStore(config.out))
        store.claim(recipe_of(config, author), teacher_model=author.name)
        if store.torn_bytes:
            say(f"dropped a torn last line of {store.torn_bytes} bytes (the last run was killed while writing)")
        prompts, aside = curator.clean(prompts)
        pool = (
            stack.enter_context(VerifierPool(verifier, options=options, **limits)) if verifier and not after else None
        )
        if pool:
            readable, unreadable = check_golds(prompts, pool)
            if needed:
                prompts = readable
                aside += [(p, f"its gold {p.gold!r} cannot be verified ({reason})") for p, reason in unreadable]
            elif unreadable:
                first, reason = unreadable[0]
                say(f"{len(unreadable)} golds cannot be verified, answers have no score: {first.source}, {reason}")
        listed = [{"source": p.source, "gold": p.gold, "reason": reason} for p, reason in aside]
        write_json(config.out / MANIFEST, {**read_manifest(config.out), "set_aside": listed})
        for prompt, reason in aside[:5]:
            say(f"set aside {prompt.source}: {reason}")
        if not prompts:
            raise RunError(f"all {len(aside)} prompts were set aside, the first: {aside[0][0].source}, {aside[0][1]}")
        plan = plan_of(config, prompts, author)
        try:
            ledger = fill(
                store,
                plan,
                open_backend,
                pool,
                author=author,
                sampling=config.sampling(),
                verifier=verifier,
                signal=signal,
                reason=curator.reason if pool or not verifier else None,
                line_seconds=config.log_seconds,
            )
            judged = None
            if verifier is not None and after:
                judged = judge_store(store, verifier, options=options, judge=judge, only_unjudged=True, **limits)
        finally:
            # After Ctrl-C or a dead engine too: the views show everything the journal holds.
            adaptive = {"adaptive": plan.summary()} if isinstance(plan, AdaptivePlan) else {}
            funnel = curator.write(config.out, config.out, {"set_aside": len(aside), **adaptive})
    if not funnel["kept"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in funnel["rejected"].items())
        raise RunError(f"none of {funnel['samples']} traces survived ({reasons}): see {config.out / 'rejected.jsonl'}")
    cost = {**ledger.to_json(), **({"judge": judged.ledger.to_json()} if judged and judge else {})}
    return {**funnel, "out": str(config.out), **cost}


def features(config: GenerateConfig) -> list[str]:
    """Return what a backend must provide beyond sampling (see `teachers.backend.FEATURES`)."""
    asked = {
        "top_logprobs": config.top_logprobs,
        "sample_logprobs": config.sample_logprobs,
    }
    return [feature for feature, setting in asked.items() if setting is not None]


def plan_of(config: GenerateConfig, prompts: list[Prompt], author: Author) -> Plan:
    """Return what is to be drawn: `n` samples of every prompt, or as many as it takes.

    Raises:
        UserError: settings of both.
    """
    if config.until_correct is None:
        for key in ("max_samples", "ahead"):
            if key in config.model_fields_set:
                raise UserError(f"--{key.replace('_', '-')} is for --until-correct, which is not given")
        return FixedPlan(prompts, config.n, author, config.sampling(), config.seed)
    if "n" in config.model_fields_set:
        raise UserError("-n draws a fixed number, --until-correct as many as it takes: give one of them")
    if config.max_samples is None or config.max_samples < config.until_correct:
        raise UserError(f"--until-correct {config.until_correct} needs --max-samples, at least as many")
    return AdaptivePlan(
        prompts,
        author,
        config.sampling(),
        config.seed,
        correct=config.until_correct,
        most=config.max_samples,
        ahead=config.ahead,
    )


def recipe_of(config: GenerateConfig, author: Author) -> dict[str, Any]:
    """Return what must not change between two runs on one store. More prompts and a larger `n` may."""
    signal = spec_of(config.top_logprobs, config.sample_logprobs)
    return {
        "prompts": config.prompts if ":" in config.prompts else Path(config.prompts).name,
        "teacher": author.identity,
        "sampling": config.sampling(),
        "seed": config.seed,
        "system_prompt": config.system_prompt,
        "reasoning": author.reasoning,
        # Without its log-probabilities a trace drawn earlier would be a hole in signal/.
        "signal": f"{signal.kind}:{signal.size}" if signal else None,
    }
