"""`rollouts.jsonl`: some of what the student wrote, with its rewards, in the form of a trace store's journal.

The lines are traces (docs/trace_format.md), one verdict per reward function, so that whatever shows a store shows them;
`meta` adds the optimizer step, the weighted reward and the advantage (null where the completion was thrown away).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.records import Verdict
from distill.reinforce.rewards import trace_of

if TYPE_CHECKING:
    from distill.reinforce.experience import Written

ROLLOUTS = "rollouts.jsonl"
RIGHT = "accuracy"  # the reward that says whether an answer is right


class RolloutJournal:
    """Appends the first completions of every sampling.

    Args:
        folder: of the run.
        most: completions of a sampling that are written.
        names: of the rewards, in order.
        author: who writes them.
    """

    def __init__(self, folder: Path, *, most: int, names: Sequence[str], author: str) -> None:
        self.path = folder / ROLLOUTS
        self.most, self.names, self.author = most, list(names), author
        # A trace's last verdict is its score: whether it is right, where that is asked.
        self.order = sorted(range(len(self.names)), key=lambda column: self.names[column] == RIGHT)

    def write(self, step: int, written: Sequence[Written], advantages: Mapping[int, float]) -> None:
        """Append; `advantages` by the identity of what was kept."""
        if not self.most:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            for each in written[: self.most]:
                stream.write(json.dumps(self._line(step, each, advantages.get(id(each)))) + "\n")

    def _line(self, step: int, written: Written, advantage: float | None) -> dict[str, Any]:
        rewards = [(self.names[column], written.rewards[column]) for column in self.order]
        verdicts = [Verdict(verifier=name, version="", score=each.value, reason=each.reason) for name, each in rewards]
        trace = trace_of(written.answer, author=self.author)
        earned = {
            "step": step,
            "reward": None if math.isnan(written.total) else written.total,
            "advantage": advantage,
        }
        # The same question is answered again in later steps: its step tells the answers apart.
        named = replace(trace, uid=f"{trace.uid}-{step}", verdicts=tuple(verdicts), meta={**trace.meta, **earned})
        return {"step": step, **named.to_json()}
