"""The questions of a reinforcement run, with golds that were checked, and the scorer of the answers to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from distill.config import TrainConfig, key_values
from distill.errors import UserError
from distill.progress import say
from distill.records import Prompt
from distill.reinforce.recipes import recipe_of
from distill.store import JOURNAL, read_traces
from distill.tables import lookup
from teachers.prompts import read_prompts, require
from teachers.rewards import ACCURACY, REWARDS
from teachers.rewards.scorer import RewardScorer, read_weights
from teachers.verifiers.gold import check_golds, verifier_name
from teachers.verifiers.pool import VerifierPool


@contextmanager
def open_rewards(config: TrainConfig) -> Iterator[tuple[list[Prompt], RewardScorer]]:
    """Give the questions and the scorer of a run; the verifier's processes live as long as the context.

    Raises:
        UserError: no usable question, a gold that cannot be verified, an unknown reward or option.
    """
    weights = read_weights(recipe_of(config).rewards)
    prompts, bad = _questions(config)
    asks_verifier = ACCURACY in weights or any(
        getattr(lookup(REWARDS, name, "reward"), "unit", "") == "group" for name in weights if name in REWARDS
    )
    with ExitStack() as stack:
        pool = None
        if asks_verifier:
            verifier = verifier_name(config.verifier, prompts)
            if verifier is None:
                raise UserError(
                    "the reward accuracy needs questions with a gold answer, and these have none: leave accuracy "
                    "out of --reward, or name questions that have one"
                )
            prompts = require(prompts, bad, verifier=verifier)
            pool = stack.enter_context(
                VerifierPool(
                    verifier,
                    options=key_values(config.verifier_option, "--verifier-option"),
                    workers=config.verifier_workers,
                    limit_seconds=config.verifier_seconds,
                )
            )
            prompts, unreadable = check_golds(prompts, pool)
            if unreadable:
                prompt, reason = unreadable[0]
                say(
                    f"left out {len(unreadable)} questions whose gold answer cannot be verified, the first: "
                    f"{prompt.source}: {prompt.gold!r} ({reason})"
                )
        else:
            prompts = require(prompts, bad, verifier=None)
        if not prompts:
            raise UserError(f"--data {config.data}: no question is left to learn from")
        yield (
            prompts,
            RewardScorer(weights, options=config.reward_option, limit=config.max_completion_length, pool=pool),
        )


def _questions(config: TrainConfig) -> tuple[list[Prompt], list]:
    """Return the questions of a trace store, each once and in order, or those of a SRC."""
    if not (config.data / JOURNAL).is_file():
        if config.data.is_dir():
            raise UserError(f"--data: the folder {config.data} has no {JOURNAL}: it is not a trace store")
        return read_prompts(str(config.data), limit=config.limit)
    return _asked(config.data / JOURNAL, config.limit), []


def _asked(journal: Path, limit: int | None) -> list[Prompt]:
    prompts: dict[str, Prompt] = {}
    for trace in read_traces(journal):
        if trace.prompt_uid not in prompts:
            prompts[trace.prompt_uid] = Prompt(
                messages=trace.messages, gold=trace.gold, source=trace.source, meta=trace.meta
            )
    # The journal is in order of completion, which no two runs share.
    ordered = sorted(prompts.values(), key=lambda prompt: prompt.uid)
    return ordered[:limit]
