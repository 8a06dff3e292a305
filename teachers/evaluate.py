"""`distill eval`: sample a model on questions, judge the samples, and sum them up.

The sampling is the same as for traces, into a journal of the same form (`samples.jsonl`), so that an interrupted
evaluation resumes. What the numbers mean is `distill.evaluate`'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distill.config import EvalConfig, key_values
from distill.errors import UserError
from distill.evaluate import WHOLE, bits_per_byte, strata, summarise
from distill.progress import say
from distill.records import Message, Trace
from distill.run_folder import RUN, read_run
from distill.store import TraceStore, read_lines, read_manifest, read_traces, write_json
from teachers.backend import Backend
from teachers.exams.sample_size import samples_per_question
from teachers.exams.votes import wrong_classes
from teachers.filters.keep import KeepRule, verdict_reason
from teachers.judging import judged_after
from teachers.plan import Author, FixedPlan
from teachers.prompts import read_prompts, require
from teachers.sampling import fill, versions
from teachers.verifiers.gold import check_golds, verifier_name
from teachers.verifiers.pool import VerifierPool

SAMPLES, SUMMARY = "samples.jsonl", "eval.json"


def run_eval(config: EvalConfig, author: Author, open_backend: Callable[[], Backend]) -> dict[str, Any]:
    """Fill `samples.jsonl` and write `eval.json` at `config.out`; return the latter.

    Raises:
        UserError: unusable questions, an unreadable gold, a difference that these questions cannot show, or a folder
            of another evaluation.
        RunError: the engine or the disk failed; the samples drawn so far stay.
    """
    prompts, bad = read_prompts(config.prompts, limit=config.limit, split="heldout", system_prompt=config.system_prompt)
    verifier = verifier_name(config.verifier, prompts) or "math"
    if config.verifier == "none" or judged_after(verifier):
        raise UserError(
            f"an evaluation compares with what is known to be right, and --verifier {config.verifier} does not: name "
            "math, choice, code_tests, reasoning-gym or pkg.mod:function"
        )
    prompts = require(prompts, bad, verifier=verifier)
    n, plan = samples_per_question(config, len(prompts))
    options = key_values(config.verifier_option, "--verifier-option")
    conversations = _conversations(config)
    with ExitStack() as stack:
        store = stack.enter_context(TraceStore(config.out, journal=SAMPLES))
        store.claim(_recipe(config, author, verifier, n), own=(Path(author.location).name,))
        limits: dict[str, Any] = {"workers": config.verifier_workers, "limit_seconds": config.verifier_seconds}
        pool = stack.enter_context(VerifierPool(verifier, options=options, **limits))
        prompts, unreadable = check_golds(prompts, pool)
        if unreadable:
            listed = "; ".join(f"{p.source}: {p.gold!r} ({reason})" for p, reason in unreadable[:3])
            raise UserError(f"{len(unreadable)} gold answers cannot be verified, mend or remove them: {listed}")
        fill(
            store,
            FixedPlan(prompts, n, author, config.sampling(), config.seed),
            open_backend,
            pool,
            author=author,
            sampling=config.sampling(),
            verifier=verifier,
            title="eval",
            retry_failed=False,
            reason=_fault,
        )
    classes, unclassed = wrong_classes(read_traces(config.out / SAMPLES), verifier, limits)
    result = summarise(read_traces(config.out / SAMPLES), samples_per_question=n, classes=classes)
    result["maj@k_unclassed"] = unclassed
    levels = strata(read_traces(config.out / SAMPLES), "level")
    if levels:
        result["by_level"] = levels
    if plan:
        result["mde"] = plan
    if conversations:
        result.update(_text_bits(config, author, conversations))
    result |= {
        "sampling": {**config.sampling(), "seed": config.seed, "system_prompt": config.system_prompt},
        "prompts": config.prompts,
        "verifier": verifier,
        "ledger": read_manifest(config.out).get("ledger"),  # None: nobody noted what the samples cost
        **whose(config, author),
    }
    write_json(config.out / SUMMARY, result)
    return result


def whose(config: EvalConfig, author: Author) -> dict[str, Any]:
    """Return what eval.json says of the model: what it is, which arm and training seed, and what its training cost."""
    facts: dict[str, Any] = {"model": author.name, "identity": author.identity, "versions": versions()}
    run = read_run(Path(author.location)) if (Path(author.location) / RUN).is_file() else {}
    if {"ledger", "steps"} <= run.keys():  # a folder, or a milestone, of `distill train`
        runs = [*(read_run(folder) for folder in config.trained_before), run]
        names = dict.fromkeys(name for each in runs for name in each["ledger"])
        values = {name: [each["ledger"].get(name, 0) for each in runs] for name in names}
        ledger = {name: None if None in known else sum(known) for name, known in values.items()}
        facts |= {"training": ledger, "train_step": sum(each["steps"] for each in runs)}
    elif config.trained_before:
        raise UserError(f"--trained-before is for a model that `distill train` made, and {config.model} has no {RUN}")
    named = {"arm": config.arm, "train_seed": config.train_seed}
    return facts | {key: value for key, value in named.items() if value is not None}


def _fault(trace: Trace) -> str | None:
    """Return why a sample counts for nothing, for the progress line: as the scores will have it."""
    return "cut" if trace.finish_reason != WHOLE else verdict_reason(trace, KeepRule(correct=True))


def _recipe(config: EvalConfig, author: Author, verifier: str, n: int) -> dict[str, Any]:
    """Everything that decides the samples: an evaluation, unlike a store, is never extended."""
    settings = {key: getattr(config, key) for key in ("prompts", "seed", "limit", "system_prompt")} | {"n": n}
    judged = {"verifier": verifier, "verifier_option": config.verifier_option or None}
    return {**settings, "model": author.identity, "sampling": config.sampling(), **judged}


def _conversations(config: EvalConfig) -> list[list[Message]]:
    if config.text is None:
        return []
    from distill.dataset import conversation, data_file

    path, found = data_file(config.text), []
    for number, row in read_lines(path):
        messages = conversation(row)
        if isinstance(messages, tuple):
            raise UserError(f"{path} line {number}: bits per byte needs messages, not plain prompt and completion")
        found.append(messages)
    if not found:
        raise UserError(f"{path} holds no conversation to measure bits per byte on")
    return found


def _text_bits(config: EvalConfig, author: Author, conversations: list[list[Message]]) -> dict[str, float]:
    from distill.models import load_model, load_tokenizer

    say(f"bits per byte of {len(conversations)} conversations")
    tokenizer = load_tokenizer(
        author.location, chat_template=config.chat_template, trust_remote_code=config.trust_remote_code
    )
    model = load_model(author.location, trust_remote_code=config.trust_remote_code).eval()
    return bits_per_byte(model, tokenizer, conversations)
