"""Many machines: vLLM engines on a Ray cluster, fed and read through Ray Data's own vLLM processor (`ray.data.llm`).

Ray Data starts the engines, spreads the samples, restarts what dies and hands a lost machine's samples to another.
Engines start once, and requests join while others run (teachers/engines/ray_stream.py says how). Rendering,
tokenising, decoding and journaling happen here, by the tokenizer that was checked when it was loaded; what travels is
token ids, and workers write nothing.

Ray Data's scheduler wakes ten times a second, so a sample takes about 0.3 s beyond its own time: nothing for reasoning
traces, much for short answers on one machine (teachers/engines/vllm_engine.py does not have it).
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from distill.errors import RunError, UserError
from distill.hub import locate
from distill.models import context_length, end_token_ids, load_tokenizer
from distill.records import Completion
from distill.render import decode, render_prompt
from distill.signals import SignalSpec, TokenSignal
from teachers.backend import Request, engine_options, failed, room
from teachers.engines import ray_cluster, vllm_options
from teachers.engines.ray_stream import Row, Stream
from teachers.engines.vllm_sampling import one_line, sample_parameters, token_signal

OWN = ("address", "accelerator_type")  # engine arguments that are Ray's, not vLLM's
REFUSAL = re.compile(r"\b(Validation|Value)Error\b")  # what vLLM raises for settings that do not fit the model
_END = object()


@dataclass(frozen=True, slots=True)
class _Flight:
    """A request on its way through the cluster."""

    request: Request
    prefill: str
    num_prompt_tokens: int
    limit: int | None


class RayEngine:
    """vLLM engines on the machines of a Ray cluster; where there is none, on one of our own on this machine.

    Args:
        model: a hub id, or a folder that every machine has at the same place.
        concurrency: samples in flight in each engine.
        engine_args: `key=value`: the `address` of a running cluster (`auto`, `host:port`; default: RAY_ADDRESS),
            `accelerator_type` as Ray names it (`H100`), and vLLM's own engine arguments.
        wants: features an engine must be started for (see `teachers.engines.vllm_engine.VllmEngine`).
        tensor_parallel_size, pipeline_parallel_size: devices that share a layer; groups of layers.
        data_parallel_size: engines side by side.

    Raises:
        UserError: Ray or vLLM is not installed, an argument is refused, or the cluster is too small.
        RunError: the cluster cannot be reached, or no engine starts.
    """

    name = "ray"
    provides = frozenset({"text", "top_logprobs", "thinking_budget", "loop_stop", "feed"})

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
        data_parallel_size: int | None = None,
    ) -> None:
        ray_cluster.set_environment()
        vllm_options.set_environment()
        try:
            import ray.data
            import vllm  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"the ray backend needs Ray and vLLM ({error}): pip install 'distill[ray]' and 'distill[vllm]', here "
                "and on every machine of the cluster"
            ) from error
        pairs = list(engine_args)
        ours = engine_options([pair for pair in pairs if _key(pair) in OWN])
        given = vllm_options.user_arguments([pair for pair in pairs if _key(pair) not in OWN])
        folder = locate(model, trust_remote_code=trust_remote_code)
        self.tokenizer = load_tokenizer(model, chat_template=chat_template, trust_remote_code=trust_remote_code)
        self.config, self.end_ids = _config(folder, self.tokenizer, trust_remote_code)
        self.context = _context(given.get("max_model_len"), self.config)
        self.wants = frozenset(wants)
        self.numbers = count()  # rows are known by numbers of their own, so none is mistaken for another's
        self.awaited: set[str] = set()
        self.finished: dict[str, Row] = {}  # answers until their caller asks; two may take turns on one engine
        self.stream: Stream | None = None
        self.joined = ray_cluster.join(ours.get("address") or os.environ.get("RAY_ADDRESS"))
        atexit.register(self.close)  # what is left of a data set when Python ends would start Ray again
        try:
            accelerator = ours.get("accelerator_type")
            on_cpu = not accelerator and not ray.cluster_resources().get("GPU")
            options = vllm_options.engine_arguments(
                on_cpu=on_cpu, in_flight=concurrency or (64 if on_cpu else 256), wants=wants, tokenizer=self.tokenizer
            )
            parallel = {"tensor_parallel_size": tensor_parallel_size, "pipeline_parallel_size": pipeline_parallel_size}
            options |= {key: size for key, size in parallel.items() if size is not None}
            options |= {"trust_remote_code": trust_remote_code, "disable_log_stats": True}
            options |= {"max_model_len": self.context} if self.context else {}
            options |= given
            engines = data_parallel_size or 1
            self.in_flight = options["max_num_seqs"] * engines
            each = ray_cluster.bundle(options, engines, on_cpu)
            source = str(folder.resolve()) if Path(model).expanduser().exists() else model
            self.stream = Stream(source, options, engines=engines, each=each, accelerator=accelerator)
            self._start(model)
            machines = sum(node["Alive"] for node in ray.nodes())
        except BaseException:
            self.close()
            raise
        self.description = (
            f"Ray on {machines} machine{'s' * (machines > 1)}, {engines} vLLM engine{'s' * (engines > 1)} on "
            f"{'CPU' if on_cpu else accelerator or 'GPU'}, {self.in_flight} in flight"
        )

    def generate(
        self, requests: Iterable[Request | None], sampling: Mapping[str, Any], *, signal: SignalSpec | None = None
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield every request with its completion as it finishes (see `teachers.backend.Backend`)."""
        self._check(sampling, signal)
        flights: dict[str, _Flight] = {}
        pending = iter(requests)
        exhausted = False
        try:
            while flights or not exhausted:
                rows: list[Row] = []
                while not exhausted and len(flights) < self.in_flight:
                    request: Any = next(pending, _END)
                    if request is _END:
                        exhausted = True
                    elif request is None:
                        break
                    else:
                        text, prefill = render_prompt(self.tokenizer, request.prompt.messages)
                        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                        try:
                            limit = room(len(ids), self.context, sampling["max_completion_length"])
                        except ValueError as error:
                            self._put(rows)
                            yield request, failed(str(error), len(ids))
                            continue
                        parameters = _parameters(sampling, request.seed, limit, self.end_ids, signal)
                        rows.append(_row(str(next(self.numbers)), ids, parameters))
                        flights[rows[-1]["number"]] = _Flight(request, prefill, len(ids), limit)
                self._put(rows)
                for number, row in self._answers(flights):
                    flight = flights.pop(number)
                    yield flight.request, self._read(flight, row, sampling, signal)
        finally:
            self.awaited -= flights.keys()  # what nobody waits for any more is dropped when it comes
            for number in flights:
                self.finished.pop(number, None)

    def _check(self, sampling: Mapping[str, Any], signal: SignalSpec | None) -> None:
        if signal is not None and signal.kind != "top":
            raise UserError("vLLM keeps no whole distributions to draw from: use --top-logprobs")
        if signal is not None and signal.size > self.config.vocab_size:
            raise UserError(f"--top-logprobs {signal.size}: the model knows only {self.config.vocab_size} tokens")
        if "thinking_budget" in sampling and "thinking_budget" not in self.wants:
            raise UserError("these engines were not started for a thinking budget: open them with it in wants")

    def _read(self, flight: _Flight, row: Row, sampling: Mapping[str, Any], signal: SignalSpec | None) -> Completion:
        if row.get("__inference_error__"):
            return failed(" ".join(row["__inference_error__"].split())[:400], flight.num_prompt_tokens)
        ids = [int(token) for token in row["generated_tokens"]]
        ended = bool(ids) and ids[-1] in self.end_ids
        # Ray passes no finish reason on: vLLM looks for an end token first, then at the limit, then for a loop.
        reason = "stop" if ended else "length" if len(ids) == flight.limit else "loop"
        if reason == "loop" and "loop_stop" not in sampling:
            return failed(f"vLLM ended the request after {len(ids)} tokens", flight.num_prompt_tokens)
        return Completion(
            text=flight.prefill + decode(self.tokenizer, ids[:-1] if ended else ids),
            finish_reason=reason,
            num_prompt_tokens=flight.num_prompt_tokens,
            num_completion_tokens=len(ids),
            signal=_signal(ids, row["logprobs"], signal.size) if signal else None,
        )

    def _start(self, model: str) -> None:
        """Wait until an engine has answered one token, so that what stops it is said before the work begins."""
        parameters = {"temperature": 0.0, "max_tokens": 1, "detokenize": False}
        try:
            self._put([_row("start", [self.end_ids[0] if self.end_ids else 0], parameters)])
            [(_, row)] = self._answers({"start"})
        except RunError as error:
            if REFUSAL.search(str(error)):
                raise UserError(f"vLLM refuses {model}: {error}") from error
            raise RunError(
                f"no vLLM engine started with {model}: {error} (the engines' own messages: DISTILL_DEBUG=1)"
            ) from error
        if row.get("__inference_error__"):
            raise RunError(f"vLLM does not run {model}: {' '.join(row['__inference_error__'].split())[:400]}")

    def _put(self, rows: list[Row]) -> None:
        """Send rows on their way, and empty the list."""
        if rows and self.stream:
            self.awaited |= {row["number"] for row in rows}
            self.stream.put(rows)
            rows.clear()

    def _answers(self, numbers: Collection[str]) -> list[tuple[str, Row]]:
        """Wait for at least one answer to `numbers` and return what has come; nothing where nothing is awaited.

        Raises:
            RunError: no engine, or no cluster, is left.
        """
        assert self.stream is not None
        while numbers and self.finished.keys().isdisjoint(numbers):
            row = self.stream.next()
            if row["number"] in self.awaited:
                self.awaited.remove(row["number"])
                self.finished[row["number"]] = row
        return [(number, self.finished.pop(number)) for number in list(self.finished) if number in numbers]

    def close(self) -> None:
        """End the engines, and the cluster where it is our own."""
        atexit.unregister(self.close)
        if self.stream:
            self.stream.close()
            self.stream = None
        if self.joined:
            self.joined = False
            ray_cluster.leave()


def _key(pair: str) -> str:
    return pair.partition("=")[0].strip().replace("-", "_")


def _config(folder: Path, tokenizer: Any, trust_remote_code: bool) -> tuple[Any, list[int]]:
    """Return a model's config, and every token that ends its completions for vLLM or for us."""
    from transformers import AutoConfig, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken file raises anything
        raise UserError(f"cannot read the config of {folder}: {one_line(error)}") from error
    try:
        generation = GenerationConfig.from_pretrained(folder)
    except OSError:  # there is none
        generation = GenerationConfig.from_model_config(config)
    return config.get_text_config(), end_token_ids(generation, tokenizer)


def _context(given: Any, config: Any) -> int | None:
    """Return how many tokens a sequence may have, here and in every engine."""
    if given is None:
        return context_length(config)
    if not isinstance(given, int) or given < 1:
        raise UserError(f"--engine-arg max_model_len takes a number of tokens with the ray backend, not {given!r}")
    return given


def _parameters(
    sampling: Mapping[str, Any], seed: int, limit: int | None, end_ids: list[int], signal: SignalSpec | None
) -> dict[str, Any]:
    """Return vLLM's sampling parameters as a row carries them.

    Raises:
        UserError: settings that vLLM refuses, or would quietly change.
    """
    checked = sample_parameters(sampling, seed=seed, limit=limit, end_ids=end_ids, signal=signal)
    names = ["temperature", "top_p", "max_tokens", "seed", "stop_token_ids", "detokenize", "output_kind"]
    optional = ["logprobs", "flat_logprobs", "thinking_token_budget", "repetition_detection"]
    wanted = [name for name in optional if getattr(checked, name)]
    return {name: getattr(checked, name) for name in names + wanted}


def _row(number: str, ids: list[int], parameters: dict[str, Any]) -> Row:
    return {"number": number, "tokenized_prompt": ids, "sampling_params": parameters}


def _signal(ids: list[int], positions: list[dict[int, dict[str, Any]]], size: int) -> TokenSignal:
    """Return what Ray passes on of vLLM's log-probabilities: by position, the token that came, then the likeliest."""
    token_ids, logprobs = [], []
    for token, outcomes in zip(ids, positions, strict=True):
        likeliest = list(outcomes.items())[len(outcomes) - size :]
        token_ids += [token, *(key for key, _ in likeliest)]
        logprobs += [outcomes[token]["logprob"], *(value["logprob"] for _, value in likeliest)]
    return token_signal(ids, SimpleNamespace(token_ids=token_ids, logprobs=logprobs), size=size)
