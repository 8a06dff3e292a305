"""Keep or reject, with a counted reason. Filters look at a trace; the keep rule looks at its verdict and siblings.

Published ablations found that most filters on *answers* do not beat a random choice of the same size (OpenThoughts,
arXiv 2506.04178), so only what is broken is dropped by default; every other finding is a flag on the trace.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from distill.errors import UserError
from distill.records import Trace
from distill.tables import lookup, suggest
from teachers.reasoning import CLOSE, OPEN, split_reasoning

UNTAGGED = "no <think>"  # the flag of a trace without reasoning tags whose teacher may or may not use them


@dataclass(slots=True)
class Siblings:
    """What a single trace cannot know: which samples of the whole store repeat or outdo others."""

    duplicates: set[str] = field(default_factory=set)  # uids that repeat an earlier sample of their prompt
    selected: set[str] | None = None  # uids a best-of rule chose; None: no such rule
    tagged: bool = False  # most complete traces of the store reason inside <think> tags


def truncated(trace: Trace, siblings: Siblings) -> bool:
    """The completion was cut at its length limit, so its answer was never given."""
    return trace.finish_reason == "length"


def malformed(trace: Trace, siblings: Siblings) -> bool:
    """The reasoning tags are missing where they belong, doubled or unclosed, the answer is empty, or it is no text."""
    return any(flag.startswith("malformed") for flag in trace.flags) or (siblings.tagged and UNTAGGED in trace.flags)


def duplicate(trace: Trace, siblings: Siblings) -> bool:
    """An earlier sample of the same prompt says the same, up to white space."""
    return trace.uid in siblings.duplicates


FILTERS: dict[str, Callable[[Trace, Siblings], bool]] = {
    "truncated": truncated,
    "malformed": malformed,
    "duplicate": duplicate,
}


def with_flags(trace: Trace, *, reasoning: str) -> Trace:
    """Return the trace with its reasoning and answer split and what is wrong with them flagged.

    Args:
        reasoning: `think`: the tags are required; `none`: they are not; `auto`: their absence is noted, and is a fault
            where most of the teacher's traces have them. (A chat template that mentions the tags proves little: many
            do so only to switch reasoning off.)
    """
    parts = split_reasoning(trace.completion, required=reasoning == "think")
    flags = [f"malformed: {parts.fault}"] if parts.fault else []
    if reasoning == "auto" and OPEN not in trace.completion and CLOSE not in trace.completion:
        flags.append(UNTAGGED)
    try:
        trace.completion.encode("utf-8")
    except UnicodeEncodeError:  # no tokenizer takes it, and no reader of kept.jsonl
        flags.append("malformed: a lone surrogate")
    if not parts.answer and not parts.fault:
        flags.append("malformed: empty answer")
    return replace(trace, reasoning=parts.reasoning, answer=parts.answer, flags=tuple(flags))


@dataclass(frozen=True, slots=True)
class KeepRule:
    """What the verdict must be, and how many samples of one prompt may stay (None: all)."""

    correct: bool
    best_of: int | None = None


def parse_keep(text: str) -> KeepRule:
    """Read `correct`, `any` or `best-of:N`.

    Raises:
        UserError: anything else.
    """
    if text in ("correct", "any"):
        return KeepRule(correct=text == "correct")
    if found := re.fullmatch(r"best-of:([1-9]\d*)", text):
        return KeepRule(correct=True, best_of=int(found[1]))
    raise UserError(
        f"--keep takes correct, any or best-of:N, not {text!r}{suggest(text, ('correct', 'any', 'best-of:1'))}"
    )


def parse_drop(text: str) -> list[str]:
    """Read a comma-separated list of filters; `none` is the empty list.

    Raises:
        UserError: an unknown name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    names = [] if names == ["none"] else names
    for name in names:
        lookup(FILTERS, name, "filter")
    return names


def make_judge(traces: Iterable[Trace], *, keep: KeepRule, drop: list[str]) -> Callable[[Trace], tuple[str, ...]]:
    """Look over a whole store once and return the function that gives each trace its reasons to be rejected.

    Args:
        traces: every trace once, in any order; only a few numbers of each are held.
        drop: names in `FILTERS`.

    Returns:
        A function from a trace to its reasons, the first being what the funnel counts; empty means keep.
    """
    siblings = Siblings()
    first: dict[tuple[str, bytes], tuple[int, str]] = {}
    lengths: dict[str, list[tuple[int, int, str, bool]]] = {}
    complete = tagged = 0
    filters = {name: lookup(FILTERS, name, "filter") for name in drop}
    for trace in traces:
        if trace.error is not None:
            continue
        if trace.finish_reason == "stop":
            complete += 1
            tagged += OPEN in trace.completion or CLOSE in trace.completion
        if "duplicate" in drop:
            key = (
                trace.prompt_uid,
                hashlib.blake2b(" ".join(trace.completion.split()).encode(errors="surrogatepass")).digest(),
            )
            here = (trace.sample_index, trace.uid)
            known = first.setdefault(key, here)
            if here != known:
                siblings.duplicates.add(max(here, known)[1])
                first[key] = min(here, known)
        if keep.best_of and not _faults(trace, siblings, filters, keep):
            ranked = (trace.num_completion_tokens, trace.sample_index, trace.uid, UNTAGGED in trace.flags)
            lengths.setdefault(trace.prompt_uid, []).append(ranked)
    siblings.tagged = 2 * tagged > complete
    if keep.best_of:
        siblings.selected = set()
        for ranks in lengths.values():
            # What only the whole store shows was not known when the candidates were noted.
            sound = [
                uid
                for _, _, uid, untagged in sorted(ranks)
                if uid not in siblings.duplicates and not (untagged and siblings.tagged and "malformed" in filters)
            ]
            siblings.selected.update(sound[: keep.best_of])

    def judge(trace: Trace) -> tuple[str, ...]:
        reasons = _faults(trace, siblings, filters, keep)
        if not reasons and siblings.selected is not None and trace.uid not in siblings.selected:
            reasons = ["not_selected"]
        return tuple(reasons)

    return judge


def _faults(
    trace: Trace, siblings: Siblings, filters: dict[str, Callable[[Trace, Siblings], bool]], keep: KeepRule
) -> list[str]:
    reasons = [name for name, found in filters.items() if found(trace, siblings)]
    if keep.correct and trace.score != 1.0:
        # No score is no proof: an unreadable gold or a verifier that ran out of time is never counted as correct.
        reasons.append("unverified" if trace.score is None else "wrong")
    return reasons
