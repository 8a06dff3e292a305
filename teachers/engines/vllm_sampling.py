"""What is asked of vLLM for one sample or one score, and what its answer says: parameters in, numbers out.

vLLM reports log-probabilities position by position: first the token that came, then the K most likely ones, of which
it may be one. Here the two are taken apart, as arrays. Nothing here starts or drives an engine
(teachers/engines/vllm_engine.py does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.errors import UserError
from distill.token_signal import SignalSpec, TokenSignal

FINISH_REASONS = {"stop": "stop", "length": "length", "repetition": "loop"}  # vLLM's word -> ours


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, as vLLM's often span many; its class where there is no message."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def sample_parameters(
    sampling: Mapping[str, Any], *, seed: int, limit: int | None, end_ids: Sequence[int], signal: SignalSpec | None
) -> Any:
    """Return vLLM's parameters for one sample.

    Args:
        sampling: as in `teachers.backend.Backend.generate`.
        limit: tokens, None for what vLLM's context leaves.
        end_ids: the tokens that end a completion.
        signal: the log-probabilities that come with the sample.

    Raises:
        UserError: settings that vLLM refuses, or would quietly change.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

    try:
        size, count = sampling.get("loop_stop") or (0, 0)
        parameters = SamplingParams(
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            max_tokens=limit,
            seed=seed if sampling["temperature"] > 0 else None,
            stop_token_ids=list(end_ids),
            logprobs=signal.size if signal else None,
            flat_logprobs=signal is not None,
            thinking_token_budget=sampling.get("thinking_budget"),
            repetition_detection=RepetitionDetectionParams(max_pattern_size=size, min_count=count) if size else None,
            detokenize=False,  # by our own tokenizer, which was checked when it was loaded
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    except Exception as error:  # its refusals share no base class across versions
        raise UserError(f"vLLM refuses the sampling settings: {one_line(error)}") from error
    if parameters.temperature != sampling["temperature"]:  # it raises small ones and goes on
        raise UserError(
            f"vLLM takes no temperature between 0 and {parameters.temperature} (given {sampling['temperature']}): "
            "use 0 for greedy, or --backend transformers"
        )
    return parameters


def score_parameters(last: int, signal: SignalSpec) -> Any:
    """Return vLLM's parameters for scoring a text that ends in the token `last`, which is not part of the prompt sent.

    The text before `last` is sent as the prompt, for its prompt log-probabilities, and one token is drawn of which
    only `last` is allowed: what it gets is the raw distribution after the whole text, before anything was ruled out.
    So a text that fills the context to its last token can be scored too, which as a prompt would leave no room to
    draw the one token that vLLM always draws.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        allowed_token_ids=[last],
        logprobs=signal.size,
        prompt_logprobs=signal.size,
        flat_logprobs=True,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def token_signal(token_ids: Sequence[int], *parts: Any, size: int) -> TokenSignal:
    """Return what vLLM said about the tokens of one completion.

    Args:
        token_ids: the completion's T tokens.
        parts: vLLM's flat log-probabilities, in order; the last T positions of their sequence are the completion's.
        size: K, the outcomes asked for at every position.
    """
    count, width = len(token_ids), size + 1
    ids = np.concatenate([np.asarray(part.token_ids, np.int64) for part in parts]).reshape(-1, width)
    logprobs = np.concatenate([np.asarray(part.logprobs, np.float32) for part in parts]).reshape(-1, width)
    ids, logprobs = ids[len(ids) - count :], logprobs[len(logprobs) - count :]
    assert np.array_equal(ids[:, 0], np.asarray(token_ids)), "vLLM's log-probabilities are of other tokens"
    order = np.lexsort((ids[:, 1:], -logprobs[:, 1:]))  # vLLM leaves equal ones in any order
    kept = np.take_along_axis(ids[:, 1:], order, axis=1), np.take_along_axis(logprobs[:, 1:], order, axis=1)
    return TokenSignal(
        token_ids=ids[:, 0],
        token_logprobs=logprobs[:, 0],
        ids=np.where(np.isneginf(kept[1]), -1, kept[0]),  # what cannot come is no outcome
        logprobs=kept[1],
    )
