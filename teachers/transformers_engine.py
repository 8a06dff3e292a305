"""The reference backend: transformers' own `generate`, on CPU or GPU, no vLLM needed.

Every sample owns its seed: the draw of a row depends on its seed and its logits, not on its neighbours in the batch
(up to the rounding of a differently shaped matrix product).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from distill.models import context_length, end_token_ids, load_model, load_tokenizer
from distill.records import Completion
from distill.render import render_prompt
from teachers.backend import Request, decode, engine_options, failed, room

SMALL = 10_000_000  # parameters below which a step is dominated by overhead, so that wide batches are free


class SeededSampling(LogitsProcessor):
    """Temperature, nucleus and one random stream per row, as a logits processor under greedy search.

    Adding Gumbel noise and taking the argmax draws from the softmax exactly (the Gumbel-max trick), which is how a
    batch can give every row its own generator; `generate(do_sample=True)` knows only one for all.
    """

    def __init__(self, seeds: list[int], temperature: float, top_p: float) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
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


class TransformersEngine:
    """A model in this process, sampled in batches."""

    name = "transformers"
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
        options = engine_options(engine_args, known=("dtype", "device"))
        device = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = options.get("dtype") or ("bfloat16" if device != "cpu" else "float32")
        self.tokenizer = load_tokenizer(model, chat_template=chat_template, trust_remote_code=trust_remote_code)
        self.model = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code).to(device).eval()
        self.config = self.model.config
        self.context = context_length(self.config)
        self.end_ids = end_token_ids(self.model, self.tokenizer)
        self.batch_size = concurrency or (256 if self.model.num_parameters() < SMALL else 16)
        self.description = f"transformers on {device}, {dtype}, batches of {self.batch_size}"

    def generate(
        self, requests: Iterable[Request], sampling: Mapping[str, Any]
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield every request with its completion, batch by batch (see `teachers.backend.Backend`)."""
        pending = iter(requests)
        while batch := list(islice(pending, self.batch_size)):
            ready: list[tuple[Request, list[int], str]] = []
            for request in batch:
                text, prefill = render_prompt(self.tokenizer, request.prompt.messages)
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                try:
                    room(len(ids), self.context, sampling["max_completion_length"])
                except ValueError as error:
                    yield request, failed(str(error), len(ids))
                    continue
                ready.append((request, ids, prefill))
            if ready:
                yield from self._batch(ready, sampling)

    @torch.inference_mode()
    def _batch(
        self, ready: list[tuple[Request, list[int], str]], sampling: Mapping[str, Any]
    ) -> Iterator[tuple[Request, Completion]]:
        longest = max(len(ids) for _, ids, _ in ready)
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for _, ids, _ in ready])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for _, ids, _ in ready])
        processors = LogitsProcessorList()
        if sampling["temperature"] > 0:
            seeds = [request.seed for request, _, _ in ready]
            processors.append(SeededSampling(seeds, sampling["temperature"], sampling["top_p"]))
        output = self.model.generate(
            input_ids=input_ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=room(longest, self.context, sampling["max_completion_length"]),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=processors,
            eos_token_id=self.end_ids,
            pad_token_id=pad,
        )
        for (request, ids, prefill), row in zip(ready, output[:, longest:].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in self.end_ids), None)
            kept = row if end is None else row[:end]
            yield (
                request,
                Completion(
                    text=prefill + decode(self.tokenizer, kept),
                    finish_reason="length" if end is None else "stop",
                    num_prompt_tokens=len(ids),
                    num_completion_tokens=len(row) if end is None else end + 1,
                ),
            )

    def close(self) -> None:
        """Drop the model."""
        del self.model
