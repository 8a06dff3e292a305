"""`truncated` and `malformed`: completions that are not whole."""

from __future__ import annotations

from distill.reasoning import CLOSE, OPEN, split_reasoning
from distill.records import Trace
from teachers.filters.siblings import Siblings

UNTAGGED = "no <think>"  # the flag of a trace without reasoning tags whose teacher may or may not use them


def truncated(trace: Trace, siblings: Siblings) -> bool:
    """The completion was cut at its length limit, so its answer was never given."""
    return trace.finish_reason == "length"


def malformed(trace: Trace, siblings: Siblings) -> bool:
    """The reasoning tags are missing where they belong, doubled or unclosed, the answer is empty, or it is no text."""
    # Told from the flags: only whoever drew the sample knows whether the tags were required.
    return any(flag.startswith("malformed") for flag in trace.flags) or (siblings.tagged and UNTAGGED in trace.flags)


def is_tagged(trace: Trace) -> bool:
    """Return whether there is any reasoning tag in the completion."""
    return OPEN in trace.completion or CLOSE in trace.completion


def structure_of(trace: Trace, *, reasoning: str) -> tuple[str, str, list[str]]:
    """Return reasoning, answer, and a flag for each thing that is wrong with them.

    Args:
        reasoning: `think`: the tags are required; `none`: they are not; `auto`: their absence is noted, and is a fault
            where most of the teacher's traces have them. (A chat template that mentions the tags proves little: many
            do so only to switch reasoning off.)
    """
    parts = split_reasoning(trace.completion, required=reasoning == "think")
    flags = [f"malformed: {parts.fault}"] if parts.fault else []
    if reasoning == "auto" and not is_tagged(trace):
        flags.append(UNTAGGED)
    try:
        trace.completion.encode("utf-8")
    except UnicodeEncodeError:  # no tokenizer takes it, and no reader of kept.jsonl
        flags.append("malformed: a lone surrogate")
    if not parts.answer and not parts.fault:
        flags.append("malformed: empty answer")
    return parts.reasoning, parts.answer, flags
