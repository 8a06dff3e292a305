"""The keep rule: what the verdict must be, and which of a prompt's right samples stay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from distill.errors import UserError
from distill.records import Trace
from distill.tables import suggest
from teachers.filters.near_duplicates import similarity

RULES = "correct, any, best-of:N or diverse:N"


@dataclass(frozen=True, slots=True)
class KeepRule:
    """What the verdict must be, and how many samples of one prompt may stay (None: all)."""

    correct: bool
    best_of: int | None = None  # the shortest so many
    diverse: int | None = None  # so many that differ most


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sample that nothing but the rule itself could reject."""

    rank: tuple[int, int, str]  # tokens, sample_index, uid: the shortest first
    row: int = -1  # of its signature, where the rule needs one

    @property
    def uid(self) -> str:
        """The sample's uid."""
        return self.rank[2]


def parse_keep(text: str) -> KeepRule:
    """Read `correct`, `any`, `best-of:N` or `diverse:N`.

    Raises:
        UserError: anything else.
    """
    if text in ("correct", "any"):
        return KeepRule(correct=text == "correct")
    if found := re.fullmatch(r"(best-of|diverse):([1-9][0-9]*)", text):
        name, count = found[1], int(found[2])
        return KeepRule(correct=True, **{name.replace("-", "_"): count})
    known = ("correct", "any", "best-of:1", "diverse:2")
    raise UserError(f"--keep takes {RULES}, not {text!r}{suggest(text, known)}")


def verdict_reason(trace: Trace, keep: KeepRule) -> str | None:
    """Return why the verdict rejects a trace: `unverified`, `wrong` or, where it does not, None."""
    if not keep.correct or trace.score == 1.0:
        return None
    # No score is no proof: an unreadable gold or a verifier that ran out of time is never counted as correct.
    return "unverified" if trace.score is None else "wrong"


def select(keep: KeepRule, candidates: Iterable[Candidate], signatures: np.ndarray) -> list[str]:
    """Return the uids that a best-of or diverse rule chooses among one prompt's candidates."""
    ordered = sorted(candidates, key=lambda candidate: candidate.rank)
    if keep.diverse is None:
        return [candidate.uid for candidate in ordered[: keep.best_of]]
    rows = [candidate.row for candidate in ordered]
    return [ordered[place].uid for place in farthest_points(signatures[rows], keep.diverse)]


def farthest_points(signatures: np.ndarray, count: int) -> Sequence[int]:
    """Return up to `count` places, the first being 0, each the one farthest from those before it (Gonzalez 1985).

    The distance of two texts is 1 minus the estimated Jaccard similarity of their shingles; of equally far ones the
    first is taken. What is chosen is spread at least half as well as any choice of so many could be.
    """
    chosen = [0]
    distances = 1 - similarity(signatures[0], signatures)
    while len(chosen) < min(count, len(signatures)):
        distances[chosen] = -1.0  # copies of a chosen one lie at 0 and may still come
        chosen.append(int(distances.argmax()))
        distances = np.minimum(distances, 1 - similarity(signatures[chosen[-1]], signatures))
    return chosen
