"""Progress people like to watch: a live bar on a terminal, a plain line every few seconds otherwise. On stderr.

Results go to stdout, so that `--json` stays parseable.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
BAR_SECONDS = 0.1  # between two updates of a bar: a line a sample costs more than a short sample


def console() -> Console:
    """Return a console on the current stderr (looked up at each call: tests and notebooks swap it)."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


def say(message: str) -> None:
    """Print one line for the user on stderr; markup in model or file names stays text."""
    print(message, file=sys.stderr, flush=True)


class Meter:
    """Counts finished items out of a total and shows rates beside them; use as a context manager.

    Args:
        unit: what is counted, for the rate.
        line_seconds: between two plain lines where stderr is no terminal.
    """

    def __init__(
        self, title: str, total: int, *, done: int = 0, unit: str = "", line_seconds: float = LINE_SECONDS
    ) -> None:
        self.title, self.total, self.done = title, total, done
        self.note: str | Callable[[], str] = ""
        self.unit = f" {unit}" if unit else ""
        self.line_seconds = line_seconds
        self.began = self.last_line = time.monotonic()
        self.first = done
        self.bar: Progress | None = None

    def __enter__(self) -> Meter:
        if sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console(),
                transient=True,
            )
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, rate="", note="")
            self.bar.start()
        return self

    def advance(self, note: str = "") -> None:
        """One more item is finished; `note` is what to show beside the bar."""
        self.reach(self.done + 1, note)

    def reach(self, done: int, note: str | Callable[[], str] = "") -> None:
        """So many items are finished now; `note` is what to show beside the bar, or makes it when it is shown."""
        self.done, self.note = done, note
        since = time.monotonic() - self.last_line
        if self.bar and since >= BAR_SECONDS:
            self.last_line = time.monotonic()
            self.bar.update(self.task, completed=self.done, rate=f"{self.rate:.1f}{self.unit}/s", note=self._noted())
        elif not self.bar and since >= self.line_seconds:
            self.line()

    def _noted(self) -> str:
        return self.note if isinstance(self.note, str) else self.note()

    @property
    def rate(self) -> float:
        """Items per second of this run."""
        return (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)

    def line(self) -> None:
        """Print the plain line now."""
        self.last_line, rate = time.monotonic(), self.rate
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate > 0 else ""
        noted = self._noted()
        note = f", {noted}" if noted else ""
        say(f"{self.title}: {self.done}/{self.total}, {rate:.1f}{self.unit}/s{left}{note}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
        elif self.done > self.first:
            self.line()
