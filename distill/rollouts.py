"""Rollouts: the student writes its own completions of a batch's prompts, to be trained on (GKD, arXiv 2306.13649).

Every draw follows from the run's seed, the optimizer step and the row's number within that step, and from nothing else:
not from the rows beside it, not from how the step is split over micro-batches and ranks, not from the global random
state, which is neither read nor moved. A resumed run therefore writes what the uninterrupted one would have written
(up to rounding, where a differently shaped matrix product moves a probability across the drawn number).

The ids are trained as they were drawn; they are never decoded and tokenised again. `transformers`' own `generate` does
the work, so it is right for any model and slow for large ones. What is made of a rollout is a loss mode's matter
(`distill.losses.on_policy`), and so is what it is worth (`distill.reinforce`). Not here: packed batches, and students
whose weights are sharded over devices.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from distill.batch import Batch, collate
from distill.errors import UserError
from distill.forward import at_rest
from distill.render import Example

COIN, ROW = 0, 1  # what a random stream is for; keeps streams of different use apart
BITS = 60  # a probability becomes an integer below 2^BITS: their sums are exact, and fit int64 for any vocabulary


class Completed(NamedTuple):
    """A completion by another engine: its tokens, whether it ended by itself, and what each was drawn with, in nats."""

    ids: list[int]
    ended: bool
    logps: list[float]


class Writer(Protocol):
    """An engine that writes completions with weights it is given."""

    def sync(self, student: Any) -> None:
        """Take the student's present weights."""
        ...

    def write(
        self, prompts: Sequence[Sequence[int]], *, rooms: Sequence[int], seeds: Sequence[int], temperature: float
    ) -> list[Completed]:
        """Return a completion of each prompt, of at most so many tokens, in order."""
        ...


class Rolled(NamedTuple):
    """A batch, and what writing it was like.

    Attributes:
        batch: prompts and completions; the batch that was given, where the student was not asked.
        metrics: `completion_length` (tokens, the end token included) and `truncated`, (2,) a sum and the number of
            rows. Empty where the student was not asked; all ranks are asked at the same steps.
        counts: `rollout_tokens`, `rollout_squares`, () the sum of the lengths of prompt and completion, and of their
            squares: what the FLOPs follow from, every token passing through the student once.
    """

    batch: Batch
    metrics: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Rollouts:
    """How a student completes prompts while it is being trained.

    Attributes:
        student: the causal language model itself, not its wrapper for data parallelism.
        end_ids: token ids that end a completion (`distill.models.end_token_ids`).
        pad_id: fills rows up; masked everywhere.
        num_outcomes: tokens of the vocabulary; logits beyond are padding and never drawn.
        max_length: tokens a sequence may have, prompt included: at most the student's context.
        seed: of the run.
        max_completion_length: most tokens of a completion; None is what `max_length` leaves, prompt by prompt.
        temperature: divides the logits when drawing; 0 is greedy. Not the temperature of a divergence.
        top_p: nucleus mass kept when drawing.
        writer: an engine that writes in the student's place, with its weights; None is transformers' `generate`.
        student_share: share of the optimizer steps whose completions the student writes, GKD's lambda; the others keep
            the batch's own. Decided by seed and step, for all micro-batches and ranks alike.

    Raises:
        UserError: a setting out of its range.
    """

    student: Any
    _: KW_ONLY
    end_ids: Collection[int]
    pad_id: int
    num_outcomes: int
    max_length: int | None
    seed: int
    max_completion_length: int | None = 512
    temperature: float = 1.0
    top_p: float = 1.0
    student_share: float = 1.0
    writer: Writer | None = None

    def __post_init__(self) -> None:
        assert self.end_ids, "a student that cannot stop cannot be trained to"
        limit = self.max_completion_length
        for name, right, allowed in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("student_share", 0 <= self.student_share <= 1, "from 0 to 1"),
            ("max_completion_length", limit is None or limit >= 1, "1 or more"),
        ):
            if not right:
                raise UserError(f"rollouts: {name} must be {allowed}, not {getattr(self, name)}")
        if self.writer is not None and self.top_p != 1.0:
            raise UserError(
                f"rollouts: vLLM writes them from the whole distribution: top_p must be 1, not {self.top_p}"
            )
        if limit is None and self.max_length is None:
            raise UserError(
                "the student's config does not say how long its context is: give max_completion_length for its rollouts"
            )

    def writes(self, step: int) -> bool:
        """Return whether the student writes the completions of optimizer step `step`."""
        return bool(np.random.default_rng([COIN, self.seed, step]).random() < self.student_share)

    def check(self, examples: Iterable[Example]) -> None:
        """Refuse, before anything is trained, prompts that leave too little room.

        Raises:
            UserError: see `room`.
        """
        if self.student_share > 0:
            self.room(max((_prompt_length(example.weights) for example in examples), default=1))

    def room(self, prompt_length: int) -> int:
        """Return how many tokens a prompt's completion may have.

        Raises:
            UserError: prompt and completion together may exceed `max_length`, or nothing is left for a completion.
        """
        if self.max_length is None:
            assert self.max_completion_length is not None
            return self.max_completion_length
        left = self.max_length - prompt_length
        if left < (self.max_completion_length or 1):
            wanted = self.max_completion_length or "at least one"
            raise UserError(
                f"rollouts: a prompt of {prompt_length} tokens and a completion of {wanted} exceed the "
                f"{self.max_length} of a sequence: lower max_completion_length or leave out long prompts"
            )
        return self.max_completion_length or left

    def roll(self, batch: Batch, *, step: int, first_row: int) -> Rolled:
        """Replace each row's completion by one that the student writes now.

        A row's prompt is all that comes before its first trained token. The completion's tokens have weight 1, its end
        token included; one that was cut at its limit has no end token, and is counted. The student is in evaluation
        mode meanwhile, so that it keeps a cache and drops nothing out, and as it was afterwards. Call this in an
        autocast context of its own, if any: casts made without gradients must not be reused with them.

        Args:
            batch: one sequence to a row.
            step: optimizer steps done.
            first_row: number of the batch's first row within the step, over micro-batches and ranks.

        Raises:
            UserError: packed rows, a sharded student, or too little room (`room`).
        """
        if batch.position_ids is not None:
            raise UserError("rollouts need one sequence to a row: switch packing off")
        if not self.writes(step):
            return Rolled(batch, {}, {})
        device = batch.input_ids.device
        ids, weights = batch.input_ids.tolist(), batch.weights.cpu().numpy()
        prompts = [tokens[: _prompt_length(weight)] for tokens, weight in zip(ids, weights, strict=True)]
        keys = [(ROW, self.seed, step, first_row + row) for row in range(len(prompts))]
        if self.writer is not None:
            self.writer.sync(self.student)
        drafts = self.write(prompts, keys, device=device)
        rolled = collate([draft.example() for draft in drafts], pad_id=self.pad_id).to(device)
        lengths = rolled.lengths().to(torch.float64)
        metrics = {
            "completion_length": lengths.new_tensor([sum(len(draft.ids) for draft in drafts), len(drafts)]),
            "truncated": lengths.new_tensor([sum(not draft.ended for draft in drafts), len(drafts)]),
        }
        return Rolled(rolled, metrics, {"rollout_tokens": lengths.sum(), "rollout_squares": lengths.square().sum()})

    def write(
        self, prompts: Sequence[list[int]], keys: Sequence[tuple[int, ...]], *, device: torch.device
    ) -> list[Draft]:
        """Return a completion of each prompt.

        Args:
            keys: whole numbers from which alone a completion's draws follow.

        Raises:
            UserError: a sharded student, or too little room (`room`).
        """
        if any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in self.student.parameters()):
            raise UserError(
                "the student cannot write rollouts while its weights are sharded (FSDP, ZeRO-3, tensor parallel): "
                "train it with DDP, or ZeRO stage 1 or 2"
            )
        rooms = [self.room(len(prompt)) for prompt in prompts]
        if self.writer is not None:
            seeds = [int(_draws(key, 1)[0]) for key in keys]
            written = self.writer.write(prompts, rooms=rooms, seeds=seeds, temperature=self.temperature)
            return [Draft(prompt, *each) for prompt, each in zip(prompts, written, strict=True)]
        drafts = [
            Draft(prompt, draws=_draws(key, room)) for prompt, key, room in zip(prompts, keys, rooms, strict=True)
        ]
        with _generating(self.student):
            self._complete(list(drafts), device)
        return drafts

    def _complete(self, drafts: list[Draft], device: torch.device) -> None:
        """Let all go as far as the fullest sequence allows, then those that may and want go on."""
        while drafts:
            steps = min(draft.left for draft in drafts)
            draws = torch.tensor(np.stack([draft.draws[len(draft.ids) :][:steps] for draft in drafts]), device=device)
            written = extend(
                self.student,
                [draft.prompt + draft.ids for draft in drafts],
                steps,
                choose=Choice(draws, self.num_outcomes, temperature=self.temperature, top_p=self.top_p),
                end_ids=self.end_ids,
                pad_id=self.pad_id,
                device=device,
            )
            for draft, new in zip(drafts, written, strict=True):
                draft.ids += new
                draft.ended = draft.ids[-1] in self.end_ids
            drafts = [draft for draft in drafts if draft.left and not draft.ended]


@dataclass(slots=True)
class Draft:
    """A completion being written: as many tokens as there are draws, at most.

    `ids` hold its end token, and `logps` what each token was drawn with, where an engine of another kind drew it.
    """

    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    ended: bool = False
    logps: list[float] | None = None
    draws: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def left(self) -> int:
        return len(self.draws) - len(self.ids)

    def example(self) -> Example:
        weights = np.zeros(len(self.prompt) + len(self.ids), dtype=np.float32)
        weights[len(self.prompt) :] = 1.0
        return Example(np.array(self.prompt + self.ids, dtype=np.int32), weights)


class Choice(LogitsProcessor):
    """Draws each row's token with a number of its own, as a logits processor under greedy search.

    `generate(do_sample=True)` knows one random stream for all rows. Here the numbers are given, and a row's token is
    the first whose cumulated probability exceeds its number. The sum is over integers: exact, so independent of the
    order in which a device adds, and an outcome of probability 0 is never met.
    """

    def __init__(self, draws: Tensor, num_outcomes: int, *, temperature: float, top_p: float) -> None:
        """`draws` (B, steps) int64, uniform below 2^BITS."""
        self.draws = draws
        self.num_outcomes = num_outcomes
        self.temperature = temperature
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.step = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return scores (B, V) whose argmax is the draw."""
        scores = scores.clone()
        scores[:, self.num_outcomes :] = float("-inf")
        if self.temperature == 0:
            return scores
        warped = scores / self.temperature
        if self.nucleus is not None:
            warped = self.nucleus(input_ids, warped)
        cumulated = warped.double().softmax(-1).mul_(2.0**BITS).long().cumsum(-1)
        # Rounding may leave the whole a little short of 2^BITS.
        drawn = torch.minimum(self.draws[:, self.step, None], cumulated[:, -1:] - 1)
        self.step += 1
        # The index is only ever too large for a row of NaN, which the trainer will find and name.
        token = torch.searchsorted(cumulated, drawn, right=True).clamp_(max=scores.shape[1] - 1)
        return scores.fill_(float("-inf")).scatter_(1, token, 0.0)


@torch.no_grad()
def extend(
    model: Any,
    contexts: Sequence[list[int]],
    steps: int,
    *,
    choose: LogitsProcessor,
    end_ids: Collection[int],
    pad_id: int,
    device: torch.device,
) -> list[list[int]]:
    """Return up to `steps` further tokens of each context, up to and including its first end token.

    The contexts are padded on the left, where nothing attends to, and share one cache.
    """
    longest = max(map(len, contexts))
    output = model.generate(
        input_ids=torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in contexts], device=device),
        attention_mask=torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in contexts], device=device),
        max_new_tokens=steps,
        do_sample=False,
        use_cache=True,
        logits_processor=LogitsProcessorList([choose]),
        eos_token_id=list(end_ids),
        pad_token_id=pad_id,
    )
    written = output[:, longest:].tolist()
    ends = [next((at + 1 for at, token in enumerate(row) if token in end_ids), len(row)) for row in written]
    return [row[:end] for row, end in zip(written, ends, strict=True)]


@contextmanager
def _generating(model: Any) -> Iterator[None]:
    """Put a model in evaluation mode (where checkpointing rests, too), with no generation settings of its own.

    A folder's generation_config may penalise repetition or keep the top k, and `generate` would obey it unasked.
    """
    modules = list(model.modules())
    settings = {module: vars(module)["generation_config"] for module in modules if "generation_config" in vars(module)}
    for module in settings:
        module.generation_config = GenerationConfig()
    try:
        with at_rest(model):
            yield
    finally:
        for module, before in settings.items():
            module.generation_config = before


def _draws(key: Sequence[int], size: int) -> np.ndarray:
    """Return `size` uniform integers below 2^BITS, of 52 random bits each."""
    return np.random.default_rng(key).integers(2**52, size=size, dtype=np.int64) << (BITS - 52)


def _prompt_length(weights: np.ndarray) -> int:
    trained = np.flatnonzero(weights)
    if len(trained) == 0:
        raise ValueError("a sequence without a trained token: nothing says where its prompt ends")
    return int(trained[0])
