"""Experience: a student's answers to questions, what they are worth, and the batches of optimizer steps made of them.

One *sampling* serves `updates` optimizer steps, `num_iterations` times over. For it every rank asks its questions,
lets the student answer each `num_generations` times (`distill.rollouts`), has the answers rewarded, and compares each
with the others to the same question. Where a question's answers are all worth the same nothing can be learnt from it:
with `dynamic_sampling` such questions are replaced by the next ones, round by round (DAPO, arXiv 2503.14476, 3.2), each
round asking as many as the share of useful ones so far makes necessary.

A completion that cannot change the student (advantage 0, and nothing else in the loss looks at it) is left out of the
batches but not out of the mass, so the gradient is the same and costs less.

Every draw follows from the seed and the question's place in the order, so a resumed run goes on as the uninterrupted
one. Questions and tokens that are thrown away are counted. The trainer brings models and ranks (`distill.trainer`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.batch import Batch, collate
from distill.errors import UserError
from distill.reinforce.advantages import group_advantages, has_signal
from distill.reinforce.journal import RolloutJournal
from distill.reinforce.questions import Questions
from distill.reinforce.recipes import Recipe
from distill.reinforce.rewards import Answer, Reward, Scorer, totals
from distill.reinforce.rows import Row, mass, packed, policy_batch, unpacked, weigh
from distill.rollouts import Draft, Rollouts

ANSWER, SHUFFLE = 4, 5  # keep random streams of different use apart


class Written(NamedTuple):
    """One completion with what is known about it."""

    draft: Draft
    answer: Answer
    rewards: Sequence[Reward]
    total: float


class Step(NamedTuple):
    """One optimizer step on this rank: its micro-batches, its mass, and what to count (see `Tally.add`)."""

    batches: list[Batch]
    mass: float
    metrics: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]


# (batch, whether by the reference) -> (B, T) log-probability of every trained token
Read = Callable[[Batch, bool], Tensor]


@dataclass(slots=True, eq=False)
class Experience:
    """Samples, scores and cuts into steps.

    Attributes:
        questions, scorer, rollouts, recipe: what is asked, who rewards, how it is written, by which settings.
        decode: token ids without the end token to text.
        rows: completions of a micro-batch, on one rank.
        micro_batches: of an optimizer step.
        pad_id: fills rows up.
        world, rank: how many ranks share the questions, and which this is.
        alone: nothing but rewards teaches, so a completion of advantage 0 is of no use.
        rows_at_once: completions written side by side; None for all.
        journal: where some of the completions are written down; None for nowhere.
        cursor: questions this rank has asked.
        called: verdicts that have been counted.
        buffer: the rows of the sampling that is being trained on, one list per optimizer step.

    Raises:
        UserError: an optimizer step does not hold whole groups.
    """

    questions: Questions
    scorer: Scorer
    rollouts: Rollouts
    recipe: Recipe
    decode: Callable[[Sequence[int]], str]
    rows: int
    micro_batches: int
    pad_id: int
    world: int = 1
    rank: int = 0
    alone: bool = True
    rows_at_once: int | None = None
    journal: RolloutJournal | None = None
    cursor: int = 0
    buffer: list[list[Row]] = field(default_factory=list)
    called: int = 0

    def __post_init__(self) -> None:
        held, group = self.rows * self.micro_batches * self.recipe.updates, self.recipe.num_generations
        if held % group:
            raise UserError(
                f"a sampling holds {held} completions on each device (--per-device-train-batch-size {self.rows} x "
                f"--gradient-accumulation-steps {self.micro_batches} x {self.recipe.updates} optimizer steps), no "
                f"multiple of --num-generations {group}"
            )
        for question in self.questions.items:
            self.rollouts.room(len(question.ids))

    def step(self, number: int, read: Read, device: torch.device, *, reduce: Callable[[Tensor], Tensor]) -> Step:
        """Return optimizer step `number` (from 0) of the run, sampling first where one begins.

        Args:
            read: tells how likely the tokens of completions are.
            device: where batches go.
            reduce: adds a tensor up over all ranks.
        """
        recipe = self.recipe
        cycle, within = divmod(number, recipe.updates * recipe.num_iterations)
        metrics: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        if within == 0:
            metrics, counts = self._sample(cycle, number, read, device, reduce)
        rows = self.buffer[within % recipe.updates]
        kept = [row for row in rows if self._teaches(row)]
        # A step whose completions are all of no use still needs something to run through.
        pieces = np.array_split(np.arange(len(kept)), self.micro_batches)
        batches = []
        for piece in pieces:
            batch = policy_batch([kept[i] for i in piece] or rows[:1], pad_id=self.pad_id)
            if not len(piece):
                batch.weights.zero_()
            batches.append(batch.to(device))
        divisor = mass(rows, recipe.loss_type, longest=self.rollouts.max_completion_length)
        return Step(batches, divisor, metrics, counts)

    def _teaches(self, row: Row) -> bool:
        """Whether a row can change the student."""
        return not row.masked and (row.advantage != 0 or self.recipe.beta > 0 or not self.alone)

    # -- sampling

    def _sample(
        self, cycle: int, step: int, read: Read, device: torch.device, reduce: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Fill the buffer; return what the sampling was like and what it cost."""
        group, updates = self.recipe.num_generations, self.recipe.updates
        if self.rollouts.writer is not None:
            self.rollouts.writer.sync(self.rollouts.student)
        wanted = self.rows * self.micro_batches * updates // group
        useful, useless = [], []  # type: list[list[Written]], list[list[Written]]
        rounds = 0
        while len(useful) < wanted and rounds <= self.recipe.dynamic_sampling:
            missing = wanted - len(useful)
            seen = len(useful) + len(useless)
            # Ask for as many as the share that was useful makes necessary, and never more than a whole sampling.
            ask = missing if not seen else min(wanted, math.ceil(missing * (seen + 1) / (len(useful) + 1)))
            answers = self._answers(ask, device)
            worth = np.array([written.total for written in answers])
            for index, signal in enumerate(has_signal(worth, group)):
                (useful if signal else useless).append(answers[index * group : (index + 1) * group])
            rounds += 1
        chosen = (useful + useless)[:wanted]
        flat = [written for answers in chosen for written in answers]
        rewards = np.array([written.total for written in flat])
        deviation = _deviation(rewards, device, reduce) if self.recipe.scale_rewards == "batch" else None
        advantages = group_advantages(rewards, group, scale=self.recipe.scale_rewards, batch_deviation=deviation)
        rows = [self._row(written, float(value)) for written, value in zip(flat, advantages, strict=True)]
        everything = [written for answers in (*useful, *useless) for written in answers]
        scored = self._scored(rows, read, device)
        order = np.arange(len(rows))
        if updates > 1:
            order = np.random.default_rng([SHUFFLE, self.rollouts.seed, cycle, self.rank]).permutation(len(rows))
        self.buffer = [[scored[i] for i in part] for part in np.split(order, updates)]
        if self.journal is not None:
            self.journal.write(step + 1, everything, dict(zip(map(id, flat), advantages, strict=True)))
        return self._metrics(everything, len(useful), device), self._counts(everything, scored, device)

    def _answers(self, ask: int, device: torch.device) -> list[Written]:
        """Let the student answer the next `ask` questions, and have the answers rewarded."""
        group = self.recipe.num_generations
        places = [(self.cursor + n) * self.world + self.rank for n in range(ask)]
        self.cursor += ask
        jobs = [(place, self.questions.at(place), number) for place in places for number in range(group)]
        at_once = self.rows_at_once or len(jobs)
        drafts: list[Draft] = []
        for start in range(0, len(jobs), at_once):
            part = jobs[start : start + at_once]
            keys = [(ANSWER, self.rollouts.seed, place, number) for place, _, number in part]
            drafts += self.rollouts.write([question.ids for _, question, _ in part], keys, device=device)
        answers = []
        for draft, (_, question, number) in zip(drafts, jobs, strict=True):
            text = question.prefill + self.decode(draft.ids[:-1] if draft.ended else draft.ids)
            answers.append(
                Answer(question.prompt, text, draft.ids, len(draft.prompt), draft.ended, number, self.rollouts.seed)
            )
        rewards = self.scorer(answers, group=group)
        worth = totals(rewards, list(self.scorer.weights.values()))
        return [Written(*each) for each in zip(drafts, answers, rewards, worth.tolist(), strict=True)]

    def _row(self, written: Written, advantage: float) -> Row:
        example = weigh(written.draft.example(), self.recipe.loss_type)
        old = None
        if written.draft.logps is not None:
            old = np.zeros(len(example), np.float32)
            old[len(written.draft.prompt) :] = written.draft.logps
        masked = math.isnan(written.total) or (self.recipe.mask_truncated_completions and not written.draft.ended)
        return Row(example, advantage, masked, old)

    def _scored(self, rows: list[Row], read: Read, device: torch.device) -> list[Row]:
        """Note how likely the tokens were, where the student will have changed by the time they are trained on."""
        olds, references = self._asks_old(), self.recipe.beta > 0
        if not (olds or references):
            return rows
        scored = list(rows)
        places = [place for place, row in enumerate(rows) if self._teaches(row)]
        for start in range(0, len(places), self.rows):
            part = [rows[place] for place in places[start : start + self.rows]]
            batch = collate([row.example for row in part], pad_id=self.pad_id).to(device)
            old = read(batch, False).cpu().numpy() if olds else None
            reference = read(batch, True).cpu().numpy() if references else None
            for line, row in enumerate(part):
                here = (line, slice(len(row.example)))
                scored[places[start + line]] = replace(
                    row,
                    old=row.old if old is None else old[here].copy(),
                    reference=None if reference is None else reference[here].copy(),
                )
        return scored

    def _reused(self) -> bool:
        return self.recipe.updates * self.recipe.num_iterations > 1

    def _asks_old(self) -> bool:
        """Whether the student must read its completions again: it will have changed, and nobody has noted it yet."""
        return self._reused() and self.rollouts.writer is None

    # -- what is counted

    def _metrics(self, everything: Sequence[Written], useful: int, device: torch.device) -> dict[str, Tensor]:
        """Return (2,) sums and counts over all that was sampled, thrown away or not."""
        worth = np.array([written.total for written in everything])
        groups = len(everything) // self.recipe.num_generations
        known = ~np.isnan(worth).reshape(groups, -1)
        centred = group_advantages(worth, self.recipe.num_generations, scale="none").reshape(groups, -1)
        spread = np.sqrt((centred**2).sum(1) / np.maximum(known.sum(1), 1))
        pairs: dict[str, tuple[float, int]] = {
            "reward": (float(np.nansum(worth)), int(np.count_nonzero(~np.isnan(worth)))),
            "reward_std": (float(spread.sum()), int(known.any(1).sum())),
            "groups_without_signal": (groups - useful, groups),
            "completion_length": (sum(len(written.draft.ids) for written in everything), len(everything)),
            "truncated": (sum(not written.draft.ended for written in everything), len(everything)),
        }
        for column, name in enumerate(self.scorer.weights):
            values = [value for written in everything if (value := written.rewards[column].value) is not None]
            pairs[f"rewards/{name}"] = (sum(values), len(values))
        return {name: torch.tensor(pair, dtype=torch.float64, device=device) for name, pair in pairs.items()}

    def _counts(self, everything: Sequence[Written], rows: Sequence[Row], device: torch.device) -> dict[str, Tensor]:
        lengths = np.array([len(w.draft.prompt) + len(w.draft.ids) for w in everything], dtype=np.float64)
        counts = {
            "rollout_tokens": lengths.sum(),
            "rollout_squares": (lengths**2).sum(),
            "questions": float(len(everything) // self.recipe.num_generations),
            "verifier_calls": float(self.scorer.calls - self.called),
        }
        self.called = self.scorer.calls
        passes = int(self._asks_old()) + int(self.recipe.beta > 0)
        if passes:
            trained = np.array([len(row.example) for row in rows if self._teaches(row)], dtype=np.float64)
            counts |= {"read_tokens": passes * trained.sum(), "read_squares": passes * (trained**2).sum()}
        return {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in counts.items()}

    # -- what a checkpoint keeps

    def state(self) -> dict[str, Any]:
        """Return what this rank needs to go on: plain numbers and tensors."""
        return {
            "cursor": self.cursor,
            "buffer": [[packed(row) for row in rows] for rows in self.buffer] if self._reused() else [],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Undo `state`."""
        self.cursor = state["cursor"]
        self.buffer = [[unpacked(row) for row in rows] for rows in state["buffer"]]


def _deviation(rewards: np.ndarray, device: torch.device, reduce: Callable[[Tensor], Tensor]) -> float:
    """Return the standard deviation of all ranks' rewards, with n - 1 in the variance."""
    known = torch.from_numpy(rewards[~np.isnan(rewards)]).to(device)
    count, total = reduce(torch.stack([torch.tensor(float(len(known)), device=device), known.sum()]).double()).tolist()
    if count < 2:
        return 0.0
    squares = float(reduce((known - total / count).square().sum()))
    return math.sqrt(squares / (count - 1))
