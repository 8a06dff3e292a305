"""`rollouts.jsonl`: some of what the student wrote, with its rewards, in the form of a trace store's journal.

The lines are traces (docs/trace_format.md), one verdict per reward function, so that whatever shows a store shows them;
`meta` adds the optimizer step, the weighted reward and the advantage (null where the completion was thrown away).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.reinforce.experience import Written

ROLLOUTS = "rollouts.jsonl"
OPEN, CLOSE = "<think>", "</think>"


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

    def write(self, step: int, written: Sequence[Written], advantages: Mapping[int, float]) -> None:
        """Append; `advantages` by the identity of what was kept."""
        if not self.most:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            for each in written[: self.most]:
                stream.write(json.dumps(self._line(step, each, advantages.get(id(each)))) + "\n")

    def _line(self, step: int, written: Written, advantage: float | None) -> dict[str, Any]:
        answer = written.answer
        prompt = answer.question
        before, closed, after = answer.text.rpartition(CLOSE)
        return {
            "step": step,
            "uid": f"{prompt.uid}-{step}-{answer.number}",
            "prompt_uid": prompt.uid,
            "messages": list(prompt.messages),
            "completion": answer.text,
            "reasoning": before.partition(OPEN)[2].strip() if closed else "",
            "answer": after.strip() if closed else answer.text,
            "finish_reason": "stop" if answer.ended else "length",
            "num_prompt_tokens": answer.num_prompt_tokens,
            "num_completion_tokens": len(answer.ids),
            "sample_index": answer.number,
            "seed": answer.seed,
            "teacher": self.author,
            "backend": "rollouts",
            "gold": prompt.gold,
            "source": prompt.source,
            "verdicts": [
                {"verifier": name, "version": "", "score": reward.value, "reason": reward.reason}
                for name, reward in zip(self.names, written.rewards, strict=True)
            ],
            "meta": {
                **prompt.meta,
                "step": step,
                "reward": None if math.isnan(written.total) else written.total,
                "advantage": advantage,
            },
        }
