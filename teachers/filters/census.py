"""One pass over a store: what must be known of all traces before one can be judged.

Texts are not held: a trace takes about 400 bytes, and 512 more where near-duplicates or the most diverse are sought.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from sys import intern

import numpy as np

from distill.records import Trace
from teachers.filters.keep import Candidate, KeepRule, select, verdict_reason
from teachers.filters.near_duplicates import PERMUTATIONS, near_duplicates, signature
from teachers.filters.siblings import Siblings, outside
from teachers.filters.structure import UNTAGGED, is_tagged
from teachers.filters.table import Filter


def look_over(traces: Iterable[Trace], filters: dict[str, Filter], siblings: Siblings, keep: KeepRule) -> None:
    """Fill `siblings` with what the traces say together; failed samples (`error` set) say nothing.

    Args:
        traces: every trace once, in any order: what is found does not depend on it.
        filters: those that reject, by name.
    """
    census = _Census(filters, siblings, keep)
    for trace in traces:
        if trace.error is None:
            census.note(trace)
    census.conclude()


@dataclass(slots=True)
class _Note:
    """What is remembered of a trace."""

    uid: str
    prompt: str
    sample_index: int
    tokens: int
    content: bytes  # hash of prompt and completion, white space folded
    sound: bool  # neither a filter nor the verdict rejects it; duplicates and the keep rule's choice apart
    untagged: bool
    row: int  # of its signature; -1: it has none

    @property
    def rank(self) -> tuple[bool, int, str]:
        """Among equals the lowest stays: nothing is lost for the sake of a copy that is rejected anyway."""
        return not self.sound, self.sample_index, self.uid


@dataclass
class _Census:
    filters: dict[str, Filter]
    siblings: Siblings
    keep: KeepRule
    notes: list[_Note] = field(default_factory=list)
    signatures: bytearray = field(default_factory=bytearray)  # rows of PERMUTATIONS x uint32
    judged: dict[str, list[int]] = field(default_factory=dict)  # prompt -> samples with a score, right ones
    complete: int = 0
    tagged: int = 0

    def __post_init__(self) -> None:
        self.selects = self.keep.best_of is not None or self.keep.diverse is not None
        # What rejects a trace matters here only where traces compete with each other.
        self.compete = self.selects or not {"duplicate", "near_duplicate"}.isdisjoint(self.filters)

    def note(self, trace: Trace) -> None:
        """Remember a trace."""
        if trace.finish_reason == "stop":
            self.complete += 1
            self.tagged += is_tagged(trace)
        prompt = intern(trace.prompt_uid)
        if trace.score is not None:
            samples = self.judged.setdefault(prompt, [0, 0])
            samples[0] += 1
            samples[1] += trace.score == 1.0
        if self.siblings.contamination is not None:
            self.siblings.contamination.level(trace)  # every trace's hits are listed, whatever becomes of it
        sound = not self.compete or not self._rejected(trace)
        folded = f"{prompt}\0{' '.join(trace.completion.split())}".encode(errors="surrogatepass")
        self.notes.append(
            _Note(
                uid=trace.uid,
                prompt=prompt,
                sample_index=trace.sample_index,
                tokens=trace.num_completion_tokens,
                content=hashlib.blake2b(folded, digest_size=16).digest(),
                sound=sound,
                untagged=UNTAGGED in trace.flags,
                row=self._signed(trace, sound),
            )
        )

    def _rejected(self, trace: Trace) -> bool:
        """Return whether the trace by itself is rejected: `siblings` is still empty."""
        verdict = verdict_reason(trace, self.keep)
        return verdict is not None or any(found(trace, self.siblings) for found in self.filters.values())

    def _signed(self, trace: Trace, sound: bool) -> int:
        if "near_duplicate" not in self.filters and (self.keep.diverse is None or not sound):
            return -1
        self.signatures += signature(trace.completion).tobytes()
        return len(self.signatures) // (4 * PERMUTATIONS) - 1

    def conclude(self) -> None:
        """Fill the siblings; each step rests on those before it."""
        siblings = self.siblings
        siblings.tagged = 2 * self.tagged > self.complete
        siblings.pass_rates = {prompt: right / judged for prompt, (judged, right) in self.judged.items()}
        for note in self.notes:
            note.sound = note.sound and not self._rejected_late(note)
        siblings.duplicates = self._duplicates()
        signatures = np.frombuffer(self.signatures, dtype=np.uint32).reshape(-1, PERMUTATIONS)
        if "near_duplicate" in self.filters:
            ranks = [note.rank for note in self.notes]
            left_out = near_duplicates(signatures, ranks, siblings.options.near_duplicate)
            siblings.near_duplicates = {self.notes[row].uid for row in left_out}
        if self.selects:
            siblings.selected = self._selected(signatures)

    def _rejected_late(self, note: _Note) -> bool:
        """Return whether what only the whole store shows rejects a trace."""
        untagged = note.untagged and self.siblings.tagged and "malformed" in self.filters
        return untagged or outside(self.siblings.pass_rates.get(note.prompt), self.siblings.options.pass_rate)

    def _duplicates(self) -> set[str]:
        staying: dict[bytes, _Note] = {}
        for note in self.notes:
            known = staying.setdefault(note.content, note)
            staying[note.content] = min(known, note, key=lambda each: each.rank)
        return {note.uid for note in self.notes if staying[note.content].uid != note.uid}

    def _selected(self, signatures: np.ndarray) -> set[str]:
        repeated = self.siblings.near_duplicates | (self.siblings.duplicates if "duplicate" in self.filters else set())
        candidates: dict[str, list[Candidate]] = {}
        for note in self.notes:
            if note.sound and note.uid not in repeated:
                candidate = Candidate((note.tokens, note.sample_index, note.uid), note.row)
                candidates.setdefault(note.prompt, []).append(candidate)
        return {uid for each in candidates.values() for uid in select(self.keep, each, signatures)}
