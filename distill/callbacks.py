"""What a training run tells the outside while it goes on: `metrics.jsonl`, `timings.jsonl` and a progress line.

`metrics.jsonl` holds only what the recipe determines, so a resumed run writes the same bytes as an uninterrupted one;
wall-clock figures stand beside it in `timings.jsonl`, which a resumed run simply goes on appending to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from distill.progress import Meter

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"


class MetricsFile(TrainerCallback):
    """Appends one line per logging step, the last step included."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = time.perf_counter()
        self.tokens: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if not state.is_world_process_zero or "loss" not in logs:
            return
        _append(self.folder / METRICS, {"step": state.global_step, **logs})
        now = time.perf_counter()
        timing: dict[str, Any] = {"step": state.global_step, "seconds": round(now - self.clock, 3)}
        if self.tokens is not None:
            timing["tokens_per_second"] = round((logs["tokens"] - self.tokens) / (now - self.clock), 1)
        _append(self.folder / TIMINGS, timing)
        self.clock, self.tokens = now, logs["tokens"]


class Progress(TrainerCallback):
    """Shows how far the run is, on stderr.

    Args:
        by_steps: count optimizer steps; else percent of the run, by `share`, which is to be set before it begins.
    """

    def __init__(self, *, by_steps: bool = True) -> None:
        self.meter: Meter | None = None
        self.note = ""
        self.by_steps = by_steps
        self.share: Callable[[], float] = lambda: 0.0

    def _done(self, step: int) -> int:
        return step if self.by_steps else int(100 * min(self.share(), 1.0))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            done = self._done(state.global_step)
            self.meter = Meter("train", state.max_steps if self.by_steps else 100, done=done).__enter__()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self.note = f"reward {logs['reward']:.3f}" if "reward" in logs else f"loss {logs['loss']:.4f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = self._done(state.global_step)  # on all ranks: a share is agreed on
        if self.meter is not None:
            self.meter.reach(done, self.note)

    def close(self) -> None:
        """Take the bar down, however the run ended."""
        if self.meter is not None:
            self.meter.__exit__(None, None, None)
            self.meter = None


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a metrics file that come after `step`, and a torn last one, before a run is resumed."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n") and row["step"] <= step:
            kept.append(line)
    temporary = path.with_name(f".{path.name}.keep")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
