"""What a store keeps: the settings of `generate` and `filter` as one object that makes the views.

Prompts that stand in an evaluation are found here before any teacher time is spent on them. What the filters do is
teachers/filters/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.config import Curation
from distill.records import Prompt, Trace
from distill.store import latest, write_json, write_views
from teachers.filters import (
    EvaluationIndex,
    FilterOptions,
    dropping,
    first_reason,
    make_judge,
    parse_band,
    parse_drop,
    parse_keep,
)
from teachers.filters.contamination import question_text

CONTAMINATION = "contamination.json"


class Curator:
    """Keep rule, filters and evaluation files, checked.

    Raises:
        UserError: an unknown rule or filter, a filter without its option, a band that is none, or an evaluation file
            that cannot be read.
    """

    def __init__(self, config: Curation) -> None:
        self.keep, self.drop = parse_keep(config.keep), parse_drop(config.drop)
        self.rules = {"keep": config.keep, "drop": config.drop}
        self.options = FilterOptions(
            length=parse_band(config.length, "length") if config.length else None,
            pass_rate=parse_band(config.pass_rate, "pass-rate") if config.pass_rate else None,
            near_duplicate=config.near_duplicate,
            seek_in_completions=config.seek_in_completions,
        )
        self.index = EvaluationIndex.read(config.decontaminate) if config.decontaminate else None
        self.drop = dropping(self.drop, self.options, index=self.index is not None)
        self.met: list[dict[str, str]] = []  # evaluation questions met in prompts

    def clean(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[tuple[Prompt, str]]]:
        """Return the prompts to ask, and those that stand in an evaluation with the reason, where such are dropped."""
        if self.index is None:
            return list(prompts), []
        good: list[Prompt] = []
        aside: list[tuple[Prompt, str]] = []
        for prompt in prompts:
            hits = self.index.hits(question_text(prompt.messages))
            self.met += [{"source": prompt.source, "prompt_uid": prompt.uid, "uid": "", **asdict(hit)} for hit in hits]
            worst = next((hit for hit in hits if hit.level == "drop"), None)
            if worst is None or "contaminated" not in self.drop:
                good.append(prompt)
            else:
                aside.append((prompt, f"contaminated: {worst.kind} of {worst.item}"))
        return good, aside

    def reason(self, trace: Trace) -> str | None:
        """Return why a trace will be rejected, as far as it shows by itself."""
        return first_reason(trace, self.drop, keep=self.keep, options=self.options)

    def write(self, store: Path, out: Path, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Make the views of a store in `out`, and contamination.json where evaluation files were given.

        Returns:
            The funnel, with the rules and `facts` in it.
        """
        judge = make_judge(latest(store), keep=self.keep, drop=self.drop, options=self.options, index=self.index)
        funnel = write_views(store, out, judge, {**self.rules, **(facts or {})})
        if self.index is not None:
            rows = {tuple(row.values()): row for row in [*self.met, *judge.contamination()]}
            write_json(out / CONTAMINATION, list(rows.values()))
        return funnel
