"""The reference backend: transformers' own `generate`, on CPU or GPU, no vLLM needed.

Every sample owns its seed: the draw of a row depends on its seed and its logits, not on its neighbours in the batch
(up to the rounding of a differently shaped matrix product). What the model says about each token can be captured while
it is drawn, or scored for texts that exist; only the outcomes asked for are kept, never (tokens, vocabulary).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from distill.batch import Batch
from distill.errors import UserError
from distill.forward import read_head, run
from distill.head import Head
from distill.models import context_length, end_token_ids, load_model, load_tokenizer
from distill.records import Completion
from distill.render import decode, render_prompt
from distill.signals import SignalSpec, TokenSignal, signal_stream
from teachers.backend import Request, engine_options, failed, room
from teachers.engines.outcomes import Outcomes, keep, stack

SMALL = 10_000_000  # parameters below which a step is dominated by overhead, so that wide batches are free
BLOCK_BYTES = 64 * 2**20  # of the largest (positions, vocabulary) tensor of `score`
SCORE_TOKENS = 16_384  # of one forward pass of `score`, padding included; a longer sequence is one pass of its own
WINDOW = 8  # batches whose items `score` sorts by length

Item = tuple[str, list[int], list[int]]  # uid, prompt ids, completion ids


class SeededSampling(LogitsProcessor):
    """Temperature, nucleus and one random stream per row, as a logits processor under greedy search.

    Adding Gumbel noise and taking the argmax draws from the softmax exactly (the Gumbel-max trick), which is how a
    batch can give every row its own generator; `generate(do_sample=True)` knows only one for all.
    """

    def __init__(self, generators: list[torch.Generator], temperature: float, top_p: float) -> None:
        self.generators = generators
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return noisy scores (B, V) whose argmax is a draw from the warped distribution."""
        warped = self.warpers(input_ids, scores.float())
        exponential = torch.empty(warped.shape, dtype=torch.float32)
        for row, generator in zip(exponential, self.generators, strict=True):
            row.exponential_(generator=generator)
        return warped - exponential.to(warped.device).log()


class Recorder(LogitsProcessor):
    """Keeps what the raw model says at every step, then lets `inner` shape the choice, which greedy search takes."""

    def __init__(self, signal: SignalSpec, streams: list[np.random.Generator], inner: LogitsProcessorList) -> None:
        self.signal, self.streams, self.inner = signal, streams, inner
        self.steps: list[Outcomes] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return the shaped scores (B, V)."""
        shaped = self.inner(input_ids, scores)
        uniforms = None
        if self.signal.kind == "sampled":
            uniforms = np.stack([stream.random(self.signal.size) for stream in self.streams])
        self.steps.append(keep(scores, shaped.argmax(-1), self.signal, uniforms))
        return shaped


@dataclass(slots=True)
class _Draft:
    """A sample being drawn."""

    request: Request
    prompt_ids: list[int]
    prefill: str
    left: int  # tokens it may still get
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)  # drawn so far, the end token included
    ended: bool = False
    stream: np.random.Generator | None = None  # of a signal's random draws
    kept: list[Outcomes] = field(default_factory=list)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch compute with so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TransformersEngine:
    """A model in this process, sampled in batches."""

    name = "transformers"
    provides = frozenset({"text", "top_logprobs", "sample_logprobs", "score"})

    def __init__(
        self,
        model: str,
        *,
        concurrency: int | None = None,
        engine_args: Iterable[str] = (),
        chat_template: Any = None,
        trust_remote_code: bool = False,
    ) -> None:
        options = engine_options(engine_args, known=("dtype", "device"))
        device = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = options.get("dtype") or ("bfloat16" if device != "cpu" else "float32")
        self.tokenizer = load_tokenizer(model, chat_template=chat_template, trust_remote_code=trust_remote_code)
        self.model = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code).to(device).eval()
        self.config = self.model.config
        self.context = context_length(self.config)
        self.end_ids = end_token_ids(self.model, self.tokenizer)
        # A folder's generation_config may penalise repetition or keep the top k; a sample's identity knows of neither.
        self.model.generation_config = GenerationConfig()
        self.head: Head | None = None
        small = self.model.num_parameters() < SMALL
        self.batch_size = concurrency or (256 if small else 16)
        # Threads that wait for each other at every one of a small model's many short products cost more than they give,
        # ten times more where another process wants the core.
        self.threads = 1 if small else torch.get_num_threads()
        self.description = f"transformers on {device}, {dtype}, batches of {self.batch_size}"

    def generate(
        self, requests: Iterable[Request | None], sampling: Mapping[str, Any], *, signal: SignalSpec | None = None
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield every request with its completion, batch by batch (see `teachers.backend.Backend`)."""
        pending = iter(requests)
        while batch := self._pull(pending):
            drafts: list[_Draft] = []
            for request in batch:
                text, prefill = render_prompt(self.tokenizer, request.prompt.messages)
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                try:
                    left = room(len(ids), self.context, sampling["max_completion_length"])
                except ValueError as error:
                    yield request, failed(str(error), len(ids))
                    continue
                if left is None:
                    raise UserError(
                        "the model's config does not say how long its context is: give --max-completion-length"
                    )
                draft = _Draft(request, ids, prefill, left, torch.Generator().manual_seed(request.seed))
                if signal is not None:
                    draft.stream = signal_stream(request.uid)
                drafts.append(draft)
            yield from self._batch(drafts, sampling, signal)

    def _pull(self, pending: Iterator[Request | None]) -> list[Request]:
        """Return a full batch, or what there is when nothing more can be sent now; nothing at the end."""
        batch: list[Request] = []
        for request in islice(pending, self.batch_size):
            if request is None:
                assert batch, "nothing is held that could be waited for"
                break
            batch.append(request)
        return batch

    def _batch(
        self, drafts: list[_Draft], sampling: Mapping[str, Any], signal: SignalSpec | None
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield a batch's completions: all go as far as the fullest context allows, then who has room left goes on."""
        while drafts:
            self._extend(drafts, min(draft.left for draft in drafts), sampling, signal)
            for draft in drafts:
                if draft.ended or not draft.left:
                    yield draft.request, self._completion(draft)
            drafts = [draft for draft in drafts if not draft.ended and draft.left]

    @torch.inference_mode()
    def _extend(self, drafts: list[_Draft], steps: int, sampling: Mapping[str, Any], signal: SignalSpec | None) -> None:
        """Draw up to `steps` more tokens of every draft, until its end token."""
        contexts = [draft.prompt_ids + draft.ids for draft in drafts]
        longest, pad = max(map(len, contexts)), self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in contexts])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in contexts])
        processors = LogitsProcessorList()
        if sampling["temperature"] > 0:
            streams = [draft.generator for draft in drafts]
            processors.append(SeededSampling(streams, sampling["temperature"], sampling["top_p"]))
        recorder = None
        if signal is not None:
            recorder = Recorder(signal, [draft.stream for draft in drafts if draft.stream], processors)
            processors = LogitsProcessorList([recorder])
        with _threads(self.threads):
            output = self.model.generate(
                input_ids=input_ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=steps,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                logits_processor=processors,
                eos_token_id=self.end_ids,
                pad_token_id=pad,
            )
        recorded = stack(recorder.steps) if recorder else None
        for place, (draft, row) in enumerate(zip(drafts, output[:, longest:].tolist(), strict=True)):
            end = next((at for at, token in enumerate(row) if token in self.end_ids), None)
            taken = row if end is None else row[: end + 1]
            draft.ids += taken
            draft.ended = end is not None
            draft.left -= len(row)
            if recorded is not None:
                draft.kept.append(recorded.rows(slice(place, len(taken) * len(drafts), len(drafts))))

    def _completion(self, draft: _Draft) -> Completion:
        return Completion(
            text=draft.prefill + decode(self.tokenizer, draft.ids[:-1] if draft.ended else draft.ids),
            finish_reason="stop" if draft.ended else "length",
            num_prompt_tokens=len(draft.prompt_ids),
            num_completion_tokens=len(draft.ids),
            signal=stack(draft.kept).signal() if draft.kept else None,
        )

    def score(self, items: Iterable[Item], signal: SignalSpec) -> Iterator[tuple[str, TokenSignal]]:
        """Yield what the model says at every position of completions that exist, as batches are done.

        Items are pulled a few batches at a time and sorted by length in between, so that little is padded.

        Raises:
            ValueError: a sequence beyond the context, or whose prompt or completion is empty.
            UserError: the model's head is of an unknown kind.
        """
        self.head = self.head or read_head(self.model, "teacher")
        pending = iter(items)
        while window := list(islice(pending, WINDOW * self.batch_size)):
            batch: list[Item] = []
            for item in sorted(window, key=_length):
                _check(item, self.context)
                if batch and (len(batch) == self.batch_size or _length(item) * (len(batch) + 1) > SCORE_TOKENS):
                    yield from self._score(batch, self.head, signal)
                    batch = []
                batch.append(item)
            yield from self._score(batch, self.head, signal)

    @torch.inference_mode()
    def _score(self, batch: list[Item], head: Head, signal: SignalSpec) -> list[tuple[str, TokenSignal]]:
        device, longest = self.model.device, max(map(_length, batch))
        rows = [prompt + completion for _, prompt, completion in batch]
        input_ids = torch.tensor([ids + [self.tokenizer.pad_token_id] * (longest - len(ids)) for ids in rows])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows])
        hidden = run(self.model, head, Batch(input_ids.to(device), mask.to(device), torch.zeros(mask.shape))).hidden
        return [(item[0], self._read(item, row, head, signal)) for item, row in zip(batch, hidden, strict=True)]

    def _read(self, item: Item, hidden: torch.Tensor, head: Head, signal: SignalSpec) -> TokenSignal:
        """Project one sequence's hidden states (T, D) where its completion is predicted, a block at a time."""
        uid, prompt, completion = item
        positions = hidden[len(prompt) - 1 : len(prompt) + len(completion) - 1]
        tokens = torch.tensor(completion, device=hidden.device)
        width = 8 if signal.kind == "sampled" else 4  # bytes: draws sum probabilities in float64
        block = max(1, BLOCK_BYTES // (width * self.config.get_text_config().vocab_size))
        stream = signal_stream(uid)
        parts = []
        for start in range(0, len(completion), block):
            piece = slice(start, start + block)
            uniforms = stream.random((len(tokens[piece]), signal.size)) if signal.kind == "sampled" else None
            parts.append(keep(head(positions[piece]), tokens[piece], signal, uniforms))
        return stack(parts).signal()

    def close(self) -> None:
        """Drop the model."""
        del self.model


def _length(item: Item) -> int:
    return len(item[1]) + len(item[2])


def _check(item: Item, context: int | None) -> None:
    uid, prompt, completion = item
    if not prompt or not completion or _length(item) > (context or _length(item)):
        raise ValueError(
            f"{uid} cannot be scored: {len(prompt)} prompt and {len(completion)} completion tokens, context {context}"
        )
