"""A pool of killable verifier processes: every verdict comes within a wall-clock limit, whatever the text.

Threads and signals cannot stop a computer-algebra system that runs away; a process can be killed. A worker that
overruns is killed and replaced, and its trace gets a verdict without a score and the reason `timeout`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from distill.errors import RunError, UserError
from distill.records import Trace, Verdict
from distill.store import dump_line
from distill.watchdog import child_environment, guard

START_SECONDS = 120.0  # importing a computer-algebra system on a busy machine
MEMORY_BYTES = 4 << 30


class _Worker:
    """One process, what it is judging, and until when."""

    def __init__(self, name: str) -> None:
        # A file, because a pipe that nobody reads would stop a talkative verifier; closed by `kill`.
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "teachers.verifiers.worker", name, str(MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,  # Ctrl-C is the parent's to handle
            env=child_environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
        )
        self.buffer = b""
        self.job: tuple[Any, Trace] | None = None
        self.ready = False
        self.deadline = time.monotonic() + START_SECONDS

    def last_words(self) -> str:
        """Return the last line the process wrote to stderr."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no message")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()


class VerifierPool:
    """Verdicts for traces, out of order; use as a context manager.

    Args:
        name: a name in `VERIFIERS` or `pkg.mod:function`.
        workers: processes; 1 is enough beside a busy CPU engine.
        limit_seconds: wall-clock limit of one verdict.
    """

    def __init__(self, name: str, *, workers: int = 1, limit_seconds: float = 10.0) -> None:
        self.name = name
        self.limit_seconds = limit_seconds
        self.waiting: deque[tuple[Any, Trace]] = deque()
        self.finished: deque[tuple[Any, Trace, Verdict]] = deque()
        self.selector = selectors.DefaultSelector()
        self.workers: list[_Worker] = []
        guard()
        for _ in range(workers):
            self._start()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self.workers):
            self._stop(worker)
        self.selector.close()

    @property
    def outstanding(self) -> int:
        """Traces submitted and not yet collected."""
        return len(self.waiting) + len(self.finished) + sum(worker.job is not None for worker in self.workers)

    def submit(self, key: Any, trace: Trace) -> None:
        """Queue a trace; `key` comes back with its verdict."""
        self.waiting.append((key, trace))
        self._assign()

    def collect(self, wait: bool = False) -> list[tuple[Any, Trace, Verdict]]:
        """Return the verdicts that are there; with `wait`, at least one as long as any is outstanding."""
        self._poll(0.0)
        while wait and not self.finished and self.outstanding:
            self._poll(0.2)
        done = list(self.finished)
        self.finished.clear()
        return done

    def judge_all(self, traces: Iterable[tuple[Any, Trace]]) -> Iterator[tuple[Any, Trace, Verdict]]:
        """Yield every trace with its verdict, out of order, holding few in memory at once."""
        for key, trace in traces:
            self.submit(key, trace)
            if self.outstanding > 4 * len(self.workers):
                yield from self.collect(wait=True)
        while self.outstanding:
            yield from self.collect(wait=True)

    def _start(self) -> None:
        worker = _Worker(self.name)
        assert worker.process.stdout is not None
        os.set_blocking(worker.process.stdout.fileno(), False)
        self.selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        self.workers.append(worker)

    def _stop(self, worker: _Worker) -> None:
        self.selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
        worker.kill()
        self.workers.remove(worker)

    def _assign(self) -> None:
        for worker in list(self.workers):
            if not self.waiting:
                return
            if worker.ready and worker.job is None:
                worker.job = self.waiting.popleft()
                worker.deadline = time.monotonic() + self.limit_seconds
                try:
                    worker.process.stdin.write(dump_line(worker.job[1].to_json()).encode())  # type: ignore[union-attr]
                    worker.process.stdin.flush()  # type: ignore[union-attr]
                except OSError:
                    self._give_up(worker, "the verifier's process died")

    def _poll(self, seconds: float) -> None:
        for key, _ in self.selector.select(seconds):
            worker: _Worker = key.data
            assert worker.process.stdout is not None
            chunk = worker.process.stdout.read()
            if not chunk:
                self._give_up(worker, "the verifier's process died")
                continue
            worker.buffer += chunk
            while b"\n" in worker.buffer:
                line, worker.buffer = worker.buffer.split(b"\n", 1)
                self._reply(worker, json.loads(line))
        now = time.monotonic()
        for worker in list(self.workers):
            if (worker.job is not None or not worker.ready) and now > worker.deadline:
                self._give_up(worker, "timeout")
        self._assign()

    def _reply(self, worker: _Worker, reply: dict[str, Any]) -> None:
        if "refused" in reply:
            raise UserError(reply["refused"])
        if not worker.ready:
            worker.ready = True
            return
        assert worker.job is not None
        key, trace = worker.job
        worker.job = None
        self.finished.append((key, trace, Verdict(**reply)))

    def _give_up(self, worker: _Worker, reason: str) -> None:
        job, was_ready, words = worker.job, worker.ready, worker.last_words()
        self._stop(worker)
        if not was_ready:
            raise RunError(f"the verifier {self.name!r} does not start ({reason}: {words})")
        if job is not None:
            verdict = Verdict(verifier=self.name, version="", score=None, reason=reason)
            self.finished.append((*job, verdict))
        self._start()
