"""Command lines as processes, as many side by side as asked, each after what it needs; a finished one leaves a mark.

Shared by `distill run` and `distill demo`. What a command leaves unfinished it resumes itself. A step that fails stops
what has not begun; what runs may finish. Ctrl-C, and a scheduler's SIGTERM, end what runs as well. A SIGKILL takes the
processes with it (`distill.watchdog`).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import RunError
from distill.progress import say
from distill.store import write_json
from distill.watchdog import guard


@dataclass(frozen=True, slots=True)
class Step:
    """One command line, and the steps that must be finished before it.

    Args:
        name: also the name of its log and mark, with - for spaces.
        arguments: what stands after `distill`; among them `--out`.
        key: what makes it the same step in a later run; default: its command line.
        locks: a folder that no other step with the same may use meanwhile.
        launch: what the process is started with in place of Python, such as `accelerate launch`.
        anew: its folder is thrown away before it starts: it does not go on with what it left unfinished.
    """

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    key: str = ""
    locks: str = ""
    launch: tuple[str, ...] = ()
    anew: bool = False

    @property
    def folder(self) -> Path:
        """Its `--out`."""
        return Path(self.arguments[self.arguments.index("--out") + 1])

    def seconds(self, logs: Path) -> float | None:
        """Return how long it took when it was finished, None where it is not (or its folder is gone)."""
        try:
            mark = json.loads(self._mark(logs).read_text(encoding="utf-8"))
            return float(mark["seconds"]) if mark["key"] == self._key and self.folder.exists() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def finish(self, logs: Path, seconds: float) -> None:
        """Leave the mark that it is finished."""
        write_json(self._mark(logs), {"key": self._key, "seconds": round(seconds, 3), "arguments": self.arguments})

    def log(self, logs: Path) -> Path:
        """Return where its output goes."""
        return logs / f"{self.name.replace(' ', '-')}.log"

    def _mark(self, logs: Path) -> Path:
        return self.log(logs).with_suffix(".done")

    @property
    def _key(self) -> str:
        return self.key or json.dumps(self.arguments)


def run_steps(
    steps: Sequence[Step],
    command: Sequence[str],
    *,
    logs: Path,
    jobs: int,
    threads: int | None = None,
    after: Callable[[Step, float], None] = lambda step, seconds: None,
) -> None:
    """Run the steps that are not finished.

    Args:
        command: how to start `distill`, such as `[python, cli.py]`; a step's `launch` takes the place of `python`.
        logs: where logs and marks go; made here.
        jobs: steps side by side.
        threads: OMP_NUM_THREADS of each, where the environment does not say; None leaves it alone.
        after: called with each step that ends well, in this thread.

    Raises:
        RunError: a step failed; its log and last line are named.
    """
    guard()
    logs.mkdir(parents=True, exist_ok=True)
    waiting = {step.name: step for step in steps if step.seconds(logs) is None}
    finished = {step.name for step in steps} - waiting.keys()
    running: dict[Future[float], Step] = {}
    processes = _Processes(command, logs, threads)
    total = len(steps)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            while waiting or running:
                for step in list(waiting.values()):
                    held = {each.locks for each in running.values()} - {""}
                    if len(running) < jobs and finished.issuperset(step.needs) and step.locks not in held:
                        running[pool.submit(processes.run, step)] = waiting.pop(step.name)
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    step = running.pop(future)
                    seconds = future.result()
                    finished.add(step.name)
                    say(f"  [{len(finished)}/{total}] {step.name}: {seconds:.0f} s")
                    after(step, seconds)
        except RunError:
            if running:
                say(f"a step failed; waiting for {', '.join(step.name for step in running.values())}")
            raise
        except BaseException:
            processes.stop()
            raise


class _Processes:
    """The processes that run, so that they can be stopped together."""

    def __init__(self, command: Sequence[str], logs: Path, threads: int | None) -> None:
        self.command, self.logs = tuple(command), logs
        # Settings that only fill gaps: what the user exports holds.
        settings: Mapping[str, str] = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        self.environment: dict[str, Any] = {"TOKENIZERS_PARALLELISM": "false", **settings, **os.environ}
        self.lock, self.stopped = threading.Lock(), False
        self.alive: set[subprocess.Popen[bytes]] = set()

    def run(self, step: Step) -> float:
        """Run one command line to its end; return its seconds."""
        line = f"distill {shlex.join(step.arguments)}"
        command = [*step.launch, *self.command[1:]] if step.launch else list(self.command)
        began, log = time.monotonic(), step.log(self.logs)
        with log.open("ab") as stream:
            before = stream.tell()
            with self.lock:
                if self.stopped:
                    return 0.0
                if step.anew:
                    shutil.rmtree(step.folder, ignore_errors=True)
                say(f"$ {shlex.join([*step.launch, line]) if step.launch else line}")
                # A session of its own: a terminal's Ctrl-C reaches us alone, and each process is stopped once.
                process = subprocess.Popen(
                    [*command, *step.arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    env=self.environment,
                    start_new_session=True,
                )
                self.alive.add(process)
        code = process.wait()
        with self.lock:
            self.alive.discard(process)
        if code:
            raise RunError(f"the step `{line}` failed ({log}): {_last_line(log, before)}")
        step.finish(self.logs, time.monotonic() - began)
        return time.monotonic() - began

    def stop(self) -> None:
        """Start nothing more, and ask what runs to end; a command of ours keeps what it has finished.

        Only the command itself is told: a verifier that died of it would look like one that a trace has brought down.
        """
        with self.lock:
            self.stopped = True
            for process in self.alive:
                process.terminate()


def _last_line(log: Path, start: int) -> str:
    """Return the last line that this attempt wrote; earlier attempts stand above it."""
    with log.open("rb") as stream:
        stream.seek(start)
        lines = [line for line in stream.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"
