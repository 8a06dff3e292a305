"""What the whole store, the evaluation files and the user's settings say about a trace, and the filters that ask.

`teachers.filters.judging` fills `Siblings` in one pass over the store; the filters here only look up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from distill.records import Trace
from teachers.filters.contamination import Contamination
from teachers.filters.options import Band, FilterOptions


@dataclass(slots=True)
class Siblings:
    """What a single trace cannot know: which samples of the whole store repeat or outdo others, and the settings."""

    options: FilterOptions = field(default_factory=FilterOptions)
    contamination: Contamination | None = None  # None: no evaluation files were given
    duplicates: set[str] = field(default_factory=set)  # uids that repeat another sample of their prompt
    near_duplicates: set[str] = field(default_factory=set)  # uids that nearly repeat another sample of the store
    pass_rates: dict[str, float] = field(default_factory=dict)  # prompt_uid -> share of right samples, where judged
    selected: set[str] | None = None  # uids that best-of or diverse chose; None: no such rule
    tagged: bool = False  # most complete traces of the store reason inside <think> tags


def duplicate(trace: Trace, siblings: Siblings) -> bool:
    """Another sample of the same prompt, which stays, says the same up to white space."""
    return trace.uid in siblings.duplicates


def near_duplicate(trace: Trace, siblings: Siblings) -> bool:
    """Another trace of the store, which stays, has nearly the same words in the same order."""
    return trace.uid in siblings.near_duplicates


def contaminated(trace: Trace, siblings: Siblings) -> bool:
    """The prompt is, or contains, a question of one of the evaluation files."""
    return siblings.contamination is not None and siblings.contamination.level(trace) == "drop"


def length(trace: Trace, siblings: Siblings) -> bool:
    """The completion has fewer or more tokens than the band `--length` lets through."""
    return outside(trace.num_completion_tokens, siblings.options.length)


def pass_rate(trace: Trace, siblings: Siblings) -> bool:
    """The share of the prompt's judged samples that are right lies outside the band of `--pass-rate`."""
    return outside(siblings.pass_rates.get(trace.prompt_uid), siblings.options.pass_rate)


def outside(value: float | None, band: Band | None) -> bool:
    """Return whether a known value is not let through by a band that was given."""
    return band is not None and value is not None and not band[0] <= value <= band[1]
