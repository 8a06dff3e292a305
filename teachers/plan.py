"""What to draw next: a fixed number of samples of every prompt, or as many as it takes.

A plan is asked for one request at a time and told of every sample that is judged. What the journal holds already is
told to it first, so that resuming, a larger `-n` and more prompts all draw only the difference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from distill.records import Prompt, Trace, sample_seed, trace_uid
from teachers.backend import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Author:
    """Who writes the completions: the model as the user names it, and the identity that enters every uid."""

    name: str  # as the user names it
    location: str  # what the loaders take: a folder, hub id or .gguf file
    identity: str
    reasoning: str = "auto"  # think: reasons inside <think> tags; none: does not; auto: as most of its traces show


class Plan(Protocol):
    """What is to be drawn."""

    unit: str  # what `progress` counts

    def resume(self, journal: Iterable[Trace]) -> int:
        """Take note of what is there; return how many samples of the plan that is."""
        ...

    def next(self) -> Request | None:
        """Return the next request; None: nothing more, or nothing until a sample in flight is settled."""
        ...

    def settle(self, trace: Trace) -> None:
        """Take note of a sample that was drawn and judged."""
        ...

    @property
    def waiting(self) -> bool:
        """Whether what is in flight decides about what to draw next."""
        ...

    @property
    def progress(self) -> tuple[int, int]:
        """How many are finished, of how many."""
        ...


def request_of(prompt: Prompt, index: int, author: str, sampling: Mapping[str, Any], seed: int) -> Request:
    """Return the request for one sample of a prompt."""
    uid = trace_uid(prompt.uid, author, sampling, index)
    return Request(uid=uid, prompt=prompt, sample_index=index, seed=sample_seed(seed, uid))


class FixedPlan:
    """Every prompt `n` times, samples of one prompt next to each other (prefix caching)."""

    unit = "traces"

    def __init__(
        self, prompts: Sequence[Prompt], n: int, author: Author, sampling: Mapping[str, Any], seed: int
    ) -> None:
        self.prompts, self.n, self.author, self.sampling, self.seed = prompts, n, author, sampling, seed
        self.finished = 0
        self.done: set[str] = set()
        self.pending = self._all()

    def _all(self) -> Iterator[Request]:
        for prompt in self.prompts:
            for index in range(self.n):
                yield request_of(prompt, index, self.author.identity, self.sampling, self.seed)

    def resume(self, journal: Iterable[Trace]) -> int:
        """Leave out what the journal holds."""
        held = {trace.uid for trace in journal}
        self.done = {request.uid for request in self._all() if request.uid in held} if held else set()
        self.finished = len(self.done)
        return self.finished

    def next(self) -> Request | None:
        """Return the next sample that is missing, None at the end."""
        return next((request for request in self.pending if request.uid not in self.done), None)

    def settle(self, trace: Trace) -> None:
        """Count it."""
        self.finished += 1

    @property
    def waiting(self) -> bool:
        """Nothing ever waits for a verdict."""
        return False

    @property
    def progress(self) -> tuple[int, int]:
        """Count samples."""
        return self.finished, len(self.prompts) * self.n


@dataclass(slots=True)
class _Quest:
    """One prompt on its way to enough right samples."""

    prompt: Prompt
    open: deque[int]  # sample indices that were not tried yet
    right: int = 0
    tried: int = 0
    tokens: int = 0
    in_flight: int = 0


class AdaptivePlan:
    """Every prompt until `correct` of its samples are right or `most` were tried, and not one sample more.

    A prompt has as many samples in flight as it still lacks right ones (and `ahead` more, if asked to), so nothing is
    drawn that turns out to be superfluous, and nobody waits for a round to end: whenever a verdict shows that a prompt
    needs another sample, it is the next to be drawn. What was begun comes before what was not: hard prompts take
    longest, and started early they do not keep a whole machine at the end.
    """

    unit = "prompts"

    def __init__(
        self,
        prompts: Sequence[Prompt],
        author: Author,
        sampling: Mapping[str, Any],
        seed: int,
        *,
        correct: int,
        most: int,
        ahead: int = 0,
    ) -> None:
        self.author, self.sampling, self.seed = author, sampling, seed
        self.correct, self.most, self.ahead = correct, most, ahead
        self.quests = {prompt.uid: _Quest(prompt, deque(range(most))) for prompt in prompts}
        self.fresh: deque[_Quest] = deque(self.quests.values())
        self.begun: deque[_Quest] = deque()
        self.in_flight = self.closed = 0

    def resume(self, journal: Iterable[Trace]) -> int:
        """Count what the journal holds as tried, in whatever order it was drawn."""
        held = 0
        for trace in journal:
            quest = self.quests.get(trace.prompt_uid)
            if quest is None or trace.sample_index not in quest.open:
                continue
            if trace.uid != self._request(quest, trace.sample_index).uid:
                continue
            quest.open.remove(trace.sample_index)
            self._count(quest, trace)
            held += 1
        self.closed = sum(self._done(quest) for quest in self.quests.values())
        unfinished = [quest for quest in self.quests.values() if not self._done(quest)]
        self.begun = deque(quest for quest in unfinished if quest.tried)
        self.fresh = deque(quest for quest in unfinished if not quest.tried)
        return held

    def next(self) -> Request | None:
        """Return a sample of a prompt that lacks right ones: of one that was begun, else of the next fresh one."""
        for queue in (self.begun, self.fresh):
            while queue:
                if self._wants(queue[0]):
                    return self._draw(queue[0])
                queue.popleft()
        return None

    def settle(self, trace: Trace) -> None:
        """Count a sample and let its prompt draw again if it must."""
        quest = self.quests[trace.prompt_uid]
        quest.in_flight -= 1
        self.in_flight -= 1
        before = self._done(quest)
        self._count(quest, trace)
        self.closed += self._done(quest) and not before
        if self._wants(quest):
            self.begun.append(quest)

    @property
    def waiting(self) -> bool:
        """Samples in flight may turn out wrong and call for others."""
        return self.in_flight > 0

    @property
    def progress(self) -> tuple[int, int]:
        """Count prompts that are solved or exhausted."""
        return self.closed, len(self.quests)

    def summary(self) -> dict[str, Any]:
        """Return what this saved against `most` samples of every prompt.

        `tokens_saved` is an estimate: the samples not drawn, each at the mean length of its prompt's drawn ones.
        """
        quests = self.quests.values()
        solved = sum(quest.right >= self.correct for quest in quests)
        spared = [(self.most - quest.tried, quest.tokens / quest.tried) for quest in quests if quest.tried]
        return {
            "until_correct": self.correct,
            "max_samples": self.most,
            "solved": solved,
            "exhausted": sum(quest.tried >= self.most and quest.right < self.correct for quest in quests),
            "samples": sum(quest.tried for quest in quests),
            "tokens": sum(quest.tokens for quest in quests),
            "samples_saved": sum(count for count, _ in spared),
            "tokens_saved": round(sum(count * mean for count, mean in spared)),
        }

    def _request(self, quest: _Quest, index: int) -> Request:
        return request_of(quest.prompt, index, self.author.identity, self.sampling, self.seed)

    def _draw(self, quest: _Quest) -> Request:
        quest.in_flight += 1
        self.in_flight += 1
        return self._request(quest, quest.open.popleft())

    def _wants(self, quest: _Quest) -> bool:
        lacking = self.correct - quest.right
        return lacking > 0 and bool(quest.open) and quest.in_flight < lacking + self.ahead

    def _done(self, quest: _Quest) -> bool:
        return quest.right >= self.correct or quest.tried >= self.most

    @staticmethod
    def _count(quest: _Quest, trace: Trace) -> None:
        quest.tried += 1
        quest.right += trace.score == 1.0
        quest.tokens += trace.num_completion_tokens
