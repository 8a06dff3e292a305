"""The reference backend: transformers' own `generate`, on CPU or GPU, no vLLM needed.

Every sample owns its seed: the draw of a row depends on its seed and its logits, not on its neighbours in the batch
(up to the rounding of a differently shaped matrix product).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from distill.errors import UserError
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
        # A folder's generation_config may penalise repetition or keep the top k; a sample's identity knows of neither.
        self.model.generation_config = GenerationConfig()
        self.batch_size = concurrency or (256 if self.model.num_parameters() < SMALL else 16)
        self.description = f"transformers on {device}, {dtype}, batches of {self.batch_size}"

    def generate(
        self, requests: Iterable[Request], sampling: Mapping[str, Any]
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield every request with its completion, batch by batch (see `teachers.backend.Backend`)."""
        pending = iter(requests)
        while batch := list(islice(pending, self.batch_size)):
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
                stream = torch.Generator().manual_seed(request.seed)
                drafts.append(_Draft(request, ids, prefill, left, stream))
            yield from self._batch(drafts, sampling)

    def _batch(self, drafts: list[_Draft], sampling: Mapping[str, Any]) -> Iterator[tuple[Request, Completion]]:
        """Yield a batch's completions: all go as far as the fullest context allows, then who has room left goes on."""
        while drafts:
            self._extend(drafts, min(draft.left for draft in drafts), sampling)
            for draft in drafts:
                if draft.ended or not draft.left:
                    yield draft.request, self._completion(draft)
            drafts = [draft for draft in drafts if not draft.ended and draft.left]

    @torch.inference_mode()
    def _extend(self, drafts: list[_Draft], steps: int, sampling: Mapping[str, Any]) -> None:
        """Draw up to `steps` more tokens of every draft, until its end token."""
        contexts = [draft.prompt_ids + draft.ids for draft in drafts]
        longest, pad = max(map(len, contexts)), self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in contexts])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in contexts])
        processors = LogitsProcessorList()
        if sampling["temperature"] > 0:
            streams = [draft.generator for draft in drafts]
            processors.append(SeededSampling(streams, sampling["temperature"], sampling["top_p"]))
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
        for draft, row in zip(drafts, output[:, longest:].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in self.end_ids), None)
            draft.ids += row if end is None else row[: end + 1]
            draft.ended = end is not None
            draft.left -= len(row)

    def _completion(self, draft: _Draft) -> Completion:
        return Completion(
            text=draft.prefill + decode(self.tokenizer, draft.ids[:-1] if draft.ended else draft.ids),
            finish_reason="stop" if draft.ended else "length",
            num_prompt_tokens=len(draft.prompt_ids),
            num_completion_tokens=len(draft.ids),
        )

    def close(self) -> None:
        """Drop the model."""
        del self.model
