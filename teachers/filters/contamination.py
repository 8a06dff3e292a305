"""Contamination: training prompts that are, or contain, questions of an evaluation.

Three rules, on words with case, punctuation and white space folded (numbers stay):

- 8 words in a row in common: `flag`. On mathematics this is mostly boilerplate ("what is the value of x if").
- `drop`: 13 words in a row in common; or an evaluation question of fewer than 13 words found whole (word n-grams alone
  never see those); or a question at least 95 % alike by characters (InDel similarity, as rapidfuzz's `ratio`) that has
  the same numbers and signs: with other numbers it is another problem.

n-gram rules are those of GPT-3 (13, arXiv 2005.14165), open-r1 and s1 (8). A question that was reworded throughout, or
translated, is not found.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import UserError
from distill.records import Message, Trace
from teachers.filters.shingles import grams, is_sign, marks, words
from teachers.prompts import read_prompts

FLAG_WORDS, DROP_WORDS = 8, 13
FUZZY = 95.0  # percent
CANDIDATE_WORDS = 3  # texts are compared by characters only if they share enough runs of so many words:
CANDIDATE_SHARE = 0.4  # of the question's runs, or all but those that one changed word breaks


@dataclass(frozen=True, slots=True)
class Hit:
    """One evaluation question met in a text, by the strongest rule that met it."""

    file: str  # the evaluation file
    item: str  # where the question stands in it: `test.jsonl:12`
    kind: str  # whole | 13-gram | fuzzy | 8-gram
    level: str  # drop | flag
    text: str  # what both have, words folded; for fuzzy the question


@dataclass(frozen=True, slots=True)
class _Item:
    file: str
    source: str
    words: str  # joined by single spaces
    marks: str
    count: int  # words


class _Postings:
    """Which items hold a gram: two parallel arrays, sorted by gram."""

    def __init__(self, pairs: Iterable[tuple[np.ndarray, int]]) -> None:
        kept = [(np.unique(named), number) for named, number in pairs]
        named = np.concatenate([np.zeros(0, dtype=np.uint64), *(each for each, _ in kept)])
        numbers = np.repeat([number for _, number in kept], [len(each) for each, _ in kept]).astype(np.int32)
        order = np.argsort(named, kind="stable")
        self.named, self.numbers = named[order], numbers[order]

    def find(self, named: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (place in `named`, the items that hold that gram) for each gram that any item holds."""
        first, last = np.searchsorted(self.named, named, "left"), np.searchsorted(self.named, named, "right")
        for place in np.flatnonzero(last > first):
            yield int(place), self.numbers[first[place] : last[place]]


class EvaluationIndex:
    """The questions of evaluation files, ready to be sought in any text."""

    def __init__(self, questions: Iterable[tuple[str, str, str]]) -> None:
        """Index (file, source, question) triples.

        Raises:
            UserError: a question without any word or number: it could never be found.
        """
        self.items: list[_Item] = []
        tokens: list[list[str]] = []
        for file, source, question in questions:
            tokens.append(words(question))
            if not tokens[-1]:
                raise UserError(f"--decontaminate {file}: {source} has no word that could be sought; take it out")
            joined = " ".join(tokens[-1])
            self.items.append(_Item(file, source, joined, " ".join(marks(question)), len(tokens[-1])))
        self._runs = {
            size: _Postings((grams(each, size), number) for number, each in enumerate(tokens) if len(each) >= size)
            for size in (DROP_WORDS, FLAG_WORDS, CANDIDATE_WORDS)
        }
        self._whole = {  # number of words -> items that have just so many
            size: _Postings((grams(each, size), number) for number, each in enumerate(tokens) if len(each) == size)
            for size in sorted({len(each) for each in tokens if len(each) < DROP_WORDS})
        }
        self._candidate_grams = Counter(self._runs[CANDIDATE_WORDS].numbers.tolist())  # distinct ones of each item

    @classmethod
    def read(cls, paths: Sequence[Path | str]) -> EvaluationIndex:
        """Read the questions of evaluation files: whatever `teachers.prompts` reads.

        Raises:
            UserError: a file cannot be read, or has a row that is no question: it would not be protected.
        """

        def questions() -> Iterator[tuple[str, str, str]]:
            for path in paths:
                try:
                    prompts, bad = read_prompts(str(path), split="heldout")
                except UserError as error:
                    raise UserError(f"--decontaminate: {error}") from error
                if bad:
                    raise UserError(
                        f"--decontaminate {path}: {len(bad)} rows have no question that could be sought; the first is "
                        f"{bad[0].source}: {bad[0].reason}"
                    )
                for prompt in prompts:
                    yield str(path), prompt.source, question_text(prompt.messages)

        return cls(questions())

    def hits(self, text: str) -> list[Hit]:
        """Return every evaluation question met in a text, in the order of the files."""
        tokens = words(text)
        joined, strict = f" {' '.join(tokens)} ", marks(text)
        strict_joined = f" {' '.join(strict)} "
        found: dict[int, tuple[str, str, str]] = {}
        for size, postings in self._whole.items():
            for _, numbers in postings.find(np.unique(grams(tokens, size))):
                for number in numbers.tolist():
                    if f" {self.items[number].marks} " in strict_joined:
                        found[number] = ("whole", "drop", self.items[number].words)
        self._find_runs(tokens, joined, DROP_WORDS, "drop", found)
        for number in self._alike(tokens, strict, found):
            found[number] = ("fuzzy", "drop", self.items[number].words)
        self._find_runs(tokens, joined, FLAG_WORDS, "flag", found)
        return [Hit(self.items[n].file, self.items[n].source, *found[n]) for n in sorted(found)]

    def _find_runs(
        self, tokens: list[str], joined: str, size: int, level: str, found: dict[int, tuple[str, str, str]]
    ) -> None:
        """Add the items that have `size` words in a row in common with a text to `found`, unless they are there."""
        for place, numbers in self._runs[size].find(grams(tokens, size)):
            run = " ".join(tokens[place : place + size])
            for number in numbers.tolist():
                if number not in found and f" {run} " in f" {self.items[number].words} ":
                    found[number] = (f"{size}-gram", level, run)

    def _alike(self, tokens: list[str], strict: list[str], found: dict[int, Any]) -> list[int]:
        """Return the items, not found yet, that a part of the text repeats but for 5 % of its characters."""
        named = grams(tokens, CANDIDATE_WORDS)
        met = [numbers for _, numbers in self._runs[CANDIDATE_WORDS].find(np.unique(named))]
        if not met:
            return []
        shared = np.bincount(np.concatenate(met), minlength=len(self.items))
        alike = []
        place_of_word = [place for place, mark in enumerate(strict) if not is_sign(mark)]
        for number in np.flatnonzero(shared).tolist():
            item, total = self.items[number], self._candidate_grams[number]
            if number in found or shared[number] < min(CANDIDATE_SHARE * total, max(1, total - CANDIDATE_WORDS)):
                continue
            window = self._window(named, item)
            begin, end = place_of_word[window.start], place_of_word[min(window.stop, len(tokens)) - 1] + 1
            if _is_alike(item.marks, " ".join(strict[begin:end])):
                alike.append(number)
        return alike

    def _window(self, named: np.ndarray, item: _Item) -> range:
        """Return which words of a text have most of an item's runs, with a little room on both sides."""
        own = grams(item.words.split(" "), CANDIDATE_WORDS)
        places = np.flatnonzero(np.isin(named, own))
        within = np.searchsorted(places, places + item.count) - np.arange(len(places))
        start, room = int(places[within.argmax()]), item.count // 4 + CANDIDATE_WORDS
        return range(max(0, start - room), start + item.count + room)


def _is_alike(item: str, part: str) -> bool:
    """Return whether a part of a text says an item but for 5 % of its characters, with the same numbers and signs.

    A text shorter than the item is compared as a whole, a longer one where it fits best: any short text would fit
    somewhere into the item.
    """
    from rapidfuzz import fuzz

    if len(part) <= len(item):
        return fuzz.ratio(item, part, score_cutoff=FUZZY) >= FUZZY and _figures(item) == _figures(part)
    best = fuzz.partial_ratio_alignment(item, part, score_cutoff=FUZZY)
    if best is None:
        return False
    begin = part.rfind(" ", 0, best.dest_start + 1) + 1  # whole words: half a number is another one
    end = part.find(" ", max(begin, best.dest_end - 1))
    return _figures(item) == _figures(part[begin : end if end >= 0 else len(part)])


def _figures(folded: str) -> list[str]:
    return [mark for mark in folded.split(" ") if is_sign(mark) or mark[:1].isdigit()]


class Contamination:
    """The hits of a store's traces; each text is looked up once."""

    def __init__(self, index: EvaluationIndex, *, completions: bool = False) -> None:
        """Seek in the questions, and in the completions too if asked."""
        self.index = index
        self.completions = completions
        self._levels: dict[bytes, str] = {}
        self._rows: list[dict[str, str]] = []

    def level(self, trace: Trace) -> str:
        """Return `drop`, `flag` or, where nothing was met, an empty string."""
        levels = {self._look(trace, question_text(trace.messages), "")}
        if self.completions:
            levels.add(self._look(trace, trace.completion, trace.uid))
        return "drop" if "drop" in levels else max(levels)

    def rows(self) -> list[dict[str, str]]:
        """Return every hit so far, for contamination.json; `uid` is empty where the question itself was met."""
        return sorted(self._rows, key=lambda row: tuple(row.values()))

    def _look(self, trace: Trace, text: str, uid: str) -> str:
        key = hashlib.blake2b(
            f"{trace.prompt_uid}\0{uid}\0{text}".encode(errors="surrogatepass"), digest_size=16
        ).digest()
        if key not in self._levels:
            hits = self.index.hits(text)
            levels = {hit.level for hit in hits}
            self._levels[key] = "drop" if "drop" in levels else "flag" if levels else ""
            where = {"source": trace.source, "prompt_uid": trace.prompt_uid, "uid": uid}
            self._rows += [{**where, **asdict(hit)} for hit in hits]
        return self._levels[key]


def question_text(messages: Sequence[Message]) -> str:
    """Return what the user says in a conversation, turn by turn."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")
