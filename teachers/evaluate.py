"""`distill eval`: sample a model on questions, judge the samples, and sum them up.

The sampling is the same as for traces, into a journal of the same form (`samples.jsonl`), so that an interrupted
evaluation resumes. What the numbers mean is `distill.evaluate`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distill.config import EvalConfig, key_values
from distill.errors import UserError
from distill.evaluate import bits_per_byte, strata, summarise
from distill.progress import say
from distill.records import Message
from distill.run_folder import RUN
from distill.store import TraceStore, read_lines, read_manifest, read_traces, write_json
from teachers.backend import Backend
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
        UserError: unusable questions, an unreadable gold, or a folder of another evaluation.
        RunError: the engine or the disk failed; the samples drawn so far stay.
    """
    prompts, bad = read_prompts(config.prompts, limit=config.limit, split="heldout", system_prompt=config.system_prompt)
    verifier = verifier_name(config.verifier, prompts) or "math"
    if config.verifier == "none" or judged_after(verifier):
        raise UserError(
            f"an evaluation compares with what is known to be right, and --verifier {config.verifier} does not: name "
            "math, choice, code_tests, reasoning-gym or pkg.mod:function"
        )
    prompts = require(prompts, bad, verifier=verifier, skip=False)
    options = key_values(config.verifier_option, "--verifier-option")
    conversations = _conversations(config)
    with ExitStack() as stack:
        store = stack.enter_context(TraceStore(config.out, journal=SAMPLES))
        store.claim(_recipe(config, author, verifier), own=(Path(author.location).name,))
        limits: dict[str, Any] = {"workers": config.verifier_workers, "limit_seconds": config.verifier_seconds}
        pool = stack.enter_context(VerifierPool(verifier, options=options, **limits))
        prompts, unreadable = check_golds(prompts, pool)
        if unreadable:
            listed = "; ".join(f"{p.source}: {p.gold!r} ({reason})" for p, reason in unreadable[:3])
            raise UserError(f"{len(unreadable)} gold answers cannot be verified, mend or remove them: {listed}")
        fill(
            store,
            FixedPlan(prompts, config.n, author, config.sampling(), config.seed),
            open_backend,
            pool,
            author=author,
            sampling=config.sampling(),
            verifier=verifier,
            title="eval",
            retry_failed=False,
            reason=lambda trace: verdict_reason(trace, KeepRule(correct=True)),
        )
    result = summarise(read_traces(config.out / SAMPLES), samples_per_question=config.n)
    levels = strata(read_traces(config.out / SAMPLES), "level")
    if levels:
        result["by_level"] = levels
    if conversations:
        result.update(_text_bits(config, author, conversations))
    result |= {
        "sampling": {**config.sampling(), "seed": config.seed, "system_prompt": config.system_prompt},
        "model": author.name,
        "identity": author.identity,
        "prompts": config.prompts,
        "verifier": verifier,
        "ledger": read_manifest(config.out).get("ledger"),  # None: nobody noted what the samples cost
        "versions": versions(),
    }
    trained = Path(author.location) / RUN
    if trained.is_file():  # a folder made by `distill train`: what it cost belongs beside what it scores
        result["training"] = json.loads(trained.read_text(encoding="utf-8"))["ledger"]
    if config.arm is not None:
        result["arm"] = config.arm
    if config.train_seed is not None:
        result["train_seed"] = config.train_seed
    write_json(config.out / SUMMARY, result)
    return result


def _recipe(config: EvalConfig, author: Author, verifier: str) -> dict[str, Any]:
    """Everything that decides the samples: an evaluation, unlike a store, is never extended."""
    settings = {key: getattr(config, key) for key in ("prompts", "n", "seed", "limit", "system_prompt")}
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
