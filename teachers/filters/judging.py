"""Keep or reject, with counted reasons: the filters and the keep rule put to every trace of a store.

`teachers.filters.census` looks over the store once; after that any trace can be judged by itself, in any order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from distill.records import Judgement, Trace
from distill.tables import lookup
from teachers.filters.census import look_over
from teachers.filters.contamination import Contamination, EvaluationIndex
from teachers.filters.keep import KeepRule, verdict_reason
from teachers.filters.options import FilterOptions
from teachers.filters.siblings import Siblings
from teachers.filters.structure import structure_of
from teachers.filters.table import DESCRIPTIVE, FILTERS, Filter, dropping

OVERLAP = "overlap"  # the flag of a prompt that shares a shorter run of words with an evaluation question


def with_flags(trace: Trace, *, reasoning: str) -> Trace:
    """Return the trace with its reasoning and answer split, and what is wrong or peculiar about them flagged.

    Args:
        reasoning: whether the tags are required: see `teachers.filters.structure.structure_of`.
    """
    thoughts, answer, flags = structure_of(trace, reasoning=reasoning)
    alone = Siblings()
    flags += [name for name in DESCRIPTIVE if FILTERS[name](trace, alone)]
    return replace(trace, reasoning=thoughts, answer=answer, flags=tuple(flags))


def first_reason(
    trace: Trace,
    drop: Iterable[str],
    *,
    keep: KeepRule | None = None,
    options: FilterOptions | None = None,
) -> str | None:
    """Return why a trace will be rejected as far as it shows by itself, or None: for a line of progress.

    Args:
        drop: the filters that reject.
        keep: default: only what is right.
    """
    alone = Siblings(options=options or FilterOptions())
    fired = (name for name in drop if lookup(FILTERS, name, "filter")(trace, alone))
    return next(fired, None) or verdict_reason(trace, keep or KeepRule(correct=True))


class Judge:
    """Gives each trace of a store its reasons to be rejected, none meaning keep, and its flags."""

    def __init__(self, filters: dict[str, Filter], siblings: Siblings, keep: KeepRule) -> None:
        """Judge by the dropping filters, in their order, and the keep rule."""
        self.filters, self.siblings, self.keep = filters, siblings, keep

    def __call__(self, trace: Trace) -> Judgement:
        """Return the reasons, the first being what the funnel counts, and every finding, whether it drops or not."""
        fired = [name for name, found in {**self.filters, **FILTERS}.items() if found(trace, self.siblings)]
        reasons = [name for name in fired if name in self.filters]
        if reason := verdict_reason(trace, self.keep):
            reasons.append(reason)
        if not reasons and self.siblings.selected is not None and trace.uid not in self.siblings.selected:
            reasons = ["not_selected"]
        # What a filter noted when the trace was made is found anew, so that every store is told by the same measure.
        details = [flag for flag in trace.flags if flag not in FILTERS]
        told = {detail.partition(": ")[0] for detail in details}
        flags = details + [name for name in FILTERS if name in fired and name not in told]
        flags += [name for name in fired if name not in FILTERS]
        if self.siblings.contamination is not None and self.siblings.contamination.level(trace) == "flag":
            flags.append(OVERLAP)
        return Judgement(reasons=tuple(reasons), flags=tuple(flags))

    def contamination(self) -> list[dict[str, str]]:
        """Return every evaluation question met in the store, for contamination.json; empty without evaluation files."""
        return self.siblings.contamination.rows() if self.siblings.contamination else []


def make_judge(
    traces: Iterable[Trace],
    *,
    keep: KeepRule,
    drop: list[str],
    options: FilterOptions | None = None,
    index: EvaluationIndex | None = None,
) -> Judge:
    """Look over a whole store once and return what judges each of its traces.

    Of samples that are equal, or nearly, the one stays that nothing else rejects, then the lowest sample index, then
    the lowest uid; so the order of the journal decides nothing.

    Args:
        traces: every trace once, in any order.
        drop: names in `FILTERS`.
        index: the evaluation questions that must not be learnt.

    Raises:
        UserError: a filter in `drop` lacks its option.
    """
    options = options or FilterOptions()
    names = dropping(drop, options, index=index is not None)
    filters = {name: lookup(FILTERS, name, "filter") for name in names}
    contamination = Contamination(index, completions=options.seek_in_completions) if index else None
    siblings = Siblings(options=options, contamination=contamination)
    look_over(traces, filters, siblings, keep)
    return Judge(filters, siblings, keep)
