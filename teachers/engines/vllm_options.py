"""The engine arguments vLLM is started with: ours, what the run will want of it, and what the user adds.

vLLM answers a misspelt argument with pages of trace; here it is one line. Nothing here starts an engine
(teachers/engines/vllm_engine.py does).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import Any

from distill.errors import UserError
from distill.ledger import forward_cost
from distill.tables import suggest
from teachers.backend import engine_options

SMALL_MACHINE = 4  # cores
SMALL_MODEL = 10_000_000  # weights: below, a second core makes a step no faster
RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
_RESERVED_BY_USER = RESERVED in os.environ
CPU_CACHE_GIB = "4"  # vLLM reserves this for attention caches on CPU unless VLLM_CPU_KVCACHE_SPACE says otherwise
TAGS = ("<think>", "</think>")
SCORE_BYTES = 256 << 20  # of one block of prompt log-probabilities (tokens x vocabulary, float32); a few such are held
SCORE_TOKENS = range(256, 8192 + 1)  # of a block, however large or small the vocabulary
SCORE_SHARE = 0.8  # of the device's memory; vLLM plans with 0.9 and forgets the blocks
OURS = {  # engine arguments that are ours to set, and what to do instead
    "model": "give --teacher",
    "data_parallel_size": "give --data-parallel-size",
    "logprobs_mode": "log-probabilities are always the model's own, before temperature and top-p",
}


def set_environment(config: Any = None) -> None:
    """Set what vLLM reads from the environment when it is imported or started, where the user has not.

    Args:
        config: the model's text config, where it is known.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")  # what the guard can see
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # no telemetry unless the user turns it on
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
    if (os.cpu_count() or 1) <= SMALL_MACHINE and not _RESERVED_BY_USER:
        # vLLM keeps one core free for its front end, which does little beside a real model: of two cores that is half
        # the speed. A tiny one computes no faster on both, and its front end and verifier keep the other busy.
        small = config is not None and forward_cost(config).weights < SMALL_MODEL
        os.environ[RESERVED] = "1" if small else "0"


def user_arguments(pairs: Iterable[str]) -> dict[str, Any]:
    """Parse the `key=value` of `--engine-arg`.

    Raises:
        UserError: an argument that vLLM does not know, or that is ours to set.
    """
    from vllm.engine.arg_utils import EngineArgs

    known = [field.name for field in fields(EngineArgs)]
    given = engine_options(pairs)
    for key in given:
        if key in OURS:
            raise UserError(f"--engine-arg {key} cannot be set: {OURS[key]}")
        if key not in known:
            raise UserError(f"--engine-arg {key!r} is none of vLLM's engine arguments{suggest(key, known)}")
    return given


def engine_arguments(*, on_cpu: bool, in_flight: int, wants: Collection[str], tokenizer: Any) -> dict[str, Any]:
    """Return the arguments an engine is started with, before the user's.

    Args:
        in_flight: requests at once.
        wants: features the engine must be started for (see `teachers.engines.vllm_engine.VllmEngine`).

    Raises:
        UserError: a thinking budget is wanted of a model without reasoning tags.
    """
    options: dict[str, Any] = {
        "max_num_seqs": in_flight,
        "dtype": "auto",
        "max_logprobs": -1,  # no bound; what a request asks for is what it costs
    }
    if on_cpu:
        # A seeded request dies on CPU when its prefill is cut in chunks ("CPU Generator does not use offset"), and
        # compiling costs minutes there.
        options |= {"enforce_eager": True, "enable_chunked_prefill": False}
    if "thinking_budget" in wants:
        for tag in TAGS:
            if len(tokenizer.encode(tag, add_special_tokens=False)) != 1:
                raise UserError(f"--thinking-budget needs a model with a token {tag}; this one's tokenizer has none")
        options["reasoning_config"] = {"reasoning_start_str": TAGS[0], "reasoning_end_str": TAGS[1]}
    if "score" in wants:
        block = min(max(SCORE_TOKENS[0], SCORE_BYTES // (4 * len(tokenizer))), SCORE_TOKENS[-1])
        options |= {
            "enable_chunked_prefill": True,  # scores have no seed
            "max_num_batched_tokens": block,
            "max_num_seqs": min(in_flight, block),
            "gpu_memory_utilization": SCORE_SHARE,
        }
    return options
