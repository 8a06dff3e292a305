"""A pool of killable verifier processes: every verdict comes within a wall-clock limit, whatever the text.

Threads and signals cannot stop a computer-algebra system that runs away; a process can be killed. A worker that
overruns is killed and replaced, and its trace gets a verdict without a score and the reason `timeout`. A worker that
dies before it has read a job takes no verdict with it: another gets the job.

Waking a process costs more than a short verdict, and on a small machine it costs the engine. So a worker is handed
several traces at once, and nobody is woken for one trace before `GATHER_SECONDS` have passed, unless somebody waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.errors import RunError, UserError
from distill.records import Trace, Verdict
from distill.store import dump_line
from distill.watchdog import child_environment, guard

START_SECONDS = 120.0  # importing a computer-algebra system on a busy machine
MEMORY_BYTES = 4 << 30
DIED = "the verifier's process died"
AT_ONCE = 16  # jobs handed to a worker together
GATHER_SECONDS = 0.05  # how long a job may wait for others to go with, where nobody waits for its verdict
GROUP_LIMITS = 4  # single limits a group may take at most: among many samples one that hangs must not cost minutes


@dataclass(slots=True)
class _Job:
    key: Any
    traces: tuple[Trace, ...]
    since: float  # when it was submitted, on the monotonic clock
    read: bool = False  # a worker has it, so what happens to that worker is this job's doing
    deaths: int = 0  # of workers whose next job it was


class _Worker:
    """One process, the jobs it was handed (it judges the first), and until when that one may take."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        # A file, because a pipe that nobody reads would stop a talkative verifier; closed by `kill`.
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "teachers.verifiers.worker", name, str(MEMORY_BYTES), json.dumps(dict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            process_group=0,  # Ctrl-C is the parent's to handle
            env=child_environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
        )
        self.buffer = b""
        self.jobs: deque[_Job] = deque()
        self.room = _pipe_room(self.process)
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


def _pipe_room(process: subprocess.Popen[bytes]) -> int:
    """Return the bytes that can be written to a process that reads nothing at the moment, without waiting for it."""
    assert process.stdin is not None
    query = getattr(fcntl, "F_GETPIPE_SZ", None)  # Linux
    return fcntl.fcntl(process.stdin, query) if query else select.PIPE_BUF


class VerifierPool:
    """Verdicts for traces, out of order; use as a context manager.

    Args:
        name: a name in `VERIFIERS` or `pkg.mod:function`.
        options: the verifier's keyword-only arguments, JSON-able.
        workers: processes; 1 is enough beside a busy CPU engine.
        limit_seconds: wall-clock limit of one trace's verdict; a group has that for each of its traces, four
            times at most. An option
            `seconds`, a verifier's own limit, is added to it.
    """

    def __init__(
        self,
        name: str,
        *,
        options: Mapping[str, Any] | None = None,
        workers: int = 1,
        limit_seconds: float = 10.0,
    ) -> None:
        self.name = name
        self.options = dict(options or {})
        own = self.options.get("seconds", 0.0)
        self.limit_seconds = limit_seconds + (own if isinstance(own, (int, float)) else 0.0)
        self.waiting: deque[_Job] = deque()
        self.finished: deque[tuple[Any, tuple[Trace, ...], tuple[Verdict, ...]]] = deque()
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
        """Traces and groups submitted and not yet collected."""
        return len(self.waiting) + len(self.finished) + sum(len(worker.jobs) for worker in self.workers)

    def submit(self, key: Any, trace: Trace) -> None:
        """Queue a trace; `key` comes back with its verdict."""
        self.submit_group(key, (trace,))

    def submit_group(self, key: Any, traces: Sequence[Trace]) -> None:
        """Queue the samples of one prompt, to be judged together by a verifier whose unit is the prompt."""
        self.waiting.append(_Job(key, tuple(traces), time.monotonic()))
        if len(self.waiting) >= AT_ONCE:
            self._assign()

    def collect(self, wait: bool = False) -> list[tuple[Any, Trace, Verdict]]:
        """Return the verdicts that are there; with `wait`, at least one as long as any is outstanding.

        A group's come one by one, next to each other, each with the group's key.
        """
        return [
            (key, trace, verdict)
            for key, traces, verdicts in self.collect_groups(wait)
            for trace, verdict in zip(traces, verdicts, strict=True)
        ]

    def collect_groups(self, wait: bool = False) -> list[tuple[Any, tuple[Trace, ...], tuple[Verdict, ...]]]:
        """Return what is there as it was submitted: key, traces, and their verdicts in the same order."""
        if self.waiting or any(worker.jobs for worker in self.workers):
            self._poll(0.0)
        while wait and not self.finished and self.outstanding:
            self._assign(now=True)
            self._poll(0.2)
        done = list(self.finished)
        self.finished.clear()
        return done

    def judge_all(self, traces: Iterable[tuple[Any, Trace]]) -> Iterator[tuple[Any, Trace, Verdict]]:
        """Yield every trace with its verdict, out of order, holding few in memory at once."""
        for key, trace in traces:
            self.submit(key, trace)
            if self.outstanding > 2 * AT_ONCE * len(self.workers):
                yield from self.collect(wait=True)
        while self.outstanding:
            yield from self.collect(wait=True)

    def judge_groups(
        self, groups: Iterable[tuple[Any, Sequence[Trace]]]
    ) -> Iterator[tuple[Any, tuple[Trace, ...], tuple[Verdict, ...]]]:
        """Yield every group with its verdicts, out of order, holding few in memory at once."""
        for key, traces in groups:
            self.submit_group(key, traces)
            if self.outstanding > 2 * len(self.workers):
                yield from self.collect_groups(wait=True)
        while self.outstanding:
            yield from self.collect_groups(wait=True)

    def _start(self) -> None:
        worker = _Worker(self.name, self.options)
        assert worker.process.stdout is not None
        os.set_blocking(worker.process.stdout.fileno(), False)
        self.selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        self.workers.append(worker)

    def _stop(self, worker: _Worker) -> None:
        self.selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
        worker.kill()
        self.workers.remove(worker)

    def _assign(self, now: bool = False) -> None:
        """Hand jobs to the workers that have none; with `now`, or once they have waited, however few there are."""
        idle = deque(worker for worker in self.workers if worker.ready and not worker.jobs)
        while idle and self.waiting:
            aged = time.monotonic() - self.waiting[0].since >= GATHER_SECONDS
            if not (now or aged or len(self.waiting) >= AT_ONCE):
                return
            share = -(-len(self.waiting) // len(idle))  # of what there is, so that no worker idles beside a busy one
            self._hand_over(idle.popleft(), min(share, AT_ONCE))

    def _hand_over(self, worker: _Worker, most: int) -> None:
        """Give a worker the next jobs, as many as can be written before it reads: it may never come to the second."""
        lines: list[bytes] = []
        while self.waiting and len(lines) < most:
            line = dump_line({"traces": [trace.to_json() for trace in self.waiting[0].traces]}).encode()
            if lines and sum(map(len, lines)) + len(line) > worker.room:
                break
            lines.append(line)
            worker.jobs.append(self.waiting.popleft())
        self._set_deadline(worker)
        try:
            worker.process.stdin.write(b"".join(lines))  # type: ignore[union-attr]
            worker.process.stdin.flush()  # type: ignore[union-attr]
        except OSError:
            self._give_up(worker, DIED)

    def _set_deadline(self, worker: _Worker) -> None:
        traces = len(worker.jobs[0].traces) if worker.jobs else 0
        worker.deadline = time.monotonic() + self.limit_seconds * min(max(traces, 1), GROUP_LIMITS)

    def _poll(self, seconds: float) -> None:
        for key, _ in self.selector.select(seconds):
            worker: _Worker = key.data
            assert worker.process.stdout is not None
            chunk = worker.process.stdout.read()
            if not chunk:
                self._give_up(worker, DIED)
                continue
            worker.buffer += chunk
            while b"\n" in worker.buffer:
                line, worker.buffer = worker.buffer.split(b"\n", 1)
                self._reply(worker, json.loads(line))
        now = time.monotonic()
        for worker in list(self.workers):
            if (worker.jobs or not worker.ready) and now > worker.deadline:
                self._give_up(worker, "timeout")
        self._assign()

    def _reply(self, worker: _Worker, reply: dict[str, Any]) -> None:
        if "refused" in reply:
            raise UserError(reply["refused"])
        if not worker.ready:
            worker.ready = True
            return
        if "read" in reply:
            worker.jobs[0].read = True
            return
        job = worker.jobs.popleft()
        self._set_deadline(worker)
        self.finished.append((job.key, job.traces, tuple(Verdict(**verdict) for verdict in reply["verdicts"])))

    def _give_up(self, worker: _Worker, reason: str) -> None:
        jobs, was_ready, words = worker.jobs, worker.ready, worker.last_words()
        self._stop(worker)
        if not was_ready:
            raise RunError(f"the verifier {self.name!r} does not start ({reason}: {words})")
        if jobs:
            job = jobs[0]
            job.deaths += 1
            if reason != DIED or job.read or job.deaths > 1:
                verdict = Verdict(verifier=self.name, version="", score=None, reason=reason)
                self.finished.append((job.key, job.traces, (verdict,) * len(job.traces)))
                jobs.popleft()
        self.waiting.extendleft(reversed(jobs))  # nothing of these has begun
        self._start()
