"""Data parallel: several engines of one kind side by side on this machine, fed from one queue.

Each replica is a process of its own with its share of the devices (of the processor's cores where there are none), so
that nothing is shared that could hang: engines inside one process would have to take every step together. A replica
that has room gets the next request. When one dies, the others answer what it held; what has been on two replicas that
died is given up as a failed sample, and the run ends only when no replica is left. Several machines are not covered
here (teachers/engines/ray_engine.py, teachers/engines/server.py).
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection, wait
from typing import Any

from distill.errors import RunError, UserError
from distill.models import load_tokenizer
from distill.records import Completion
from distill.token_signal import SignalSpec, TokenSignal
from distill.watchdog import child_environment, guard
from teachers.backend import Request, engine_options, failed

ATTEMPTS = 2  # replicas that a request may outlive; what killed two engines would kill the rest
GRACE_SECONDS = 10.0  # for all replicas to end by themselves
_END = object()


def open_replicas(name: str, model: str, number: int, **options: Any) -> Any:
    """Open `number` engines of the backend `name`, or the backend itself where one is enough.

    Args:
        options: as for `teachers.open_backend`; `concurrency` is each engine's own.

    Raises:
        UserError: an engine refuses its model or an option, or there are too few devices.
        RunError: an engine does not start.
    """
    if number == 1:
        from teachers import open_backend

        return open_backend(name, model, **options)
    return Replicas(name, model, _shares(number, _devices_of_one(options)), options)


def _devices_of_one(options: Mapping[str, Any]) -> int:
    given = {**options, **engine_options(options.get("engine_args", ()))}
    sizes = (given.get(f"{kind}_parallel_size") or 1 for kind in ("tensor", "pipeline"))
    tensor, pipeline = (int(size) for size in sizes)
    return tensor * pipeline


def _shares(number: int, each: int) -> list[dict[str, Any]]:
    """Return what every replica may use: `devices` for CUDA_VISIBLE_DEVICES, or processor `cores`; disjoint.

    Raises:
        UserError: fewer devices than the replicas need.
    """
    devices = _visible_devices()
    if devices:
        if len(devices) < number * each:
            raise UserError(
                f"{number} replicas of {each} device{'s' * (each > 1)} each need {number * each} devices, and "
                f"{len(devices)} are visible: lower --data-parallel-size or --tensor-parallel-size"
            )
        return [{"devices": ",".join(devices[place * each : (place + 1) * each])} for place in range(number)]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < number:
        return [{"cores": cores}] * number
    return [{"cores": cores[place::number]} for place in range(number)]


def _visible_devices() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device for device in named.split(",") if device.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


@dataclass(slots=True)
class _Job:
    """A request or an item to score, and how many replicas died of it or beside it."""

    work: Any
    deaths: int = 0


@dataclass(slots=True, eq=False)
class _Replica:
    """One engine's process as seen from here."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    room: int = 0  # requests it takes at once
    continuous: bool = False  # takes requests while it works; otherwise it gets the next when it has answered all
    held: dict[int, _Job] = field(default_factory=dict)
    last_words: str = "its process was killed"

    @property
    def free(self) -> int:
        """How many requests it takes now."""
        return self.room - len(self.held) if self.continuous or not self.held else 0

    def send(self, *message: Any) -> None:
        with contextlib.suppress(OSError):  # it died; that is seen when its pipe is read
            self.pipe.send(message)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self.pipe.close()


class Replicas:
    """A backend made of several; opened by `open_replicas`."""

    def __init__(self, name: str, model: str, shares: list[dict[str, Any]], options: Mapping[str, Any]) -> None:
        guard()
        self.busy = False
        self.run = 0  # of the calls to generate and score; answers to an earlier one, given up by its caller, are late
        self.replicas = [_start(share) for share in shares]
        try:
            for replica, share in zip(self.replicas, shares, strict=True):
                replica.send(name, model, dict(options), share.get("cores"))
            told = [self._told(replica) for replica in self.replicas]
            self.tokenizer = load_tokenizer(
                model,
                chat_template=options.get("chat_template"),
                trust_remote_code=options.get("trust_remote_code", False),
            )
        except BaseException:
            self.close()
            raise
        for replica, facts in zip(self.replicas, told, strict=True):
            replica.room, replica.continuous = facts["room"], "feed" in facts["provides"]
        first = told[0]
        self.name: str = first["name"]
        self.provides: frozenset[str] = first["provides"]
        self.config, self.context = first["config"], first["context"]
        self.in_flight = sum(replica.room for replica in self.replicas)
        self.description = f"{len(self.replicas)} times {first['description']}"

    def generate(
        self, requests: Iterable[Request | None], sampling: Mapping[str, Any], *, signal: SignalSpec | None = None
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield every request with its completion as it finishes (see `teachers.backend.Backend`).

        Raises:
            UserError: the engines refuse the sampling.
            RunError: no replica is left.
        """
        for work, answer in self._deal(requests, "generate", dict(sampling), signal):
            yield work, answer if isinstance(answer, Completion) else failed(answer)

    def score(
        self, items: Iterable[tuple[str, list[int], list[int]]], signal: SignalSpec
    ) -> Iterator[tuple[str, TokenSignal]]:
        """Yield what the model says at every position of texts that exist (see `teachers.backend.Backend`).

        Raises:
            UserError: the engines refuse an item.
            RunError: no replica is left, or one text was with two that died.
        """
        for work, answer in self._deal(items, "score", {}, signal):
            if isinstance(answer, str):
                raise RunError(f"cannot score {work[0]}: {answer}")
            yield work[0], answer

    def _deal(
        self, source: Iterable[Any], task: str, sampling: dict[str, Any], signal: SignalSpec | None
    ) -> Iterator[tuple[Any, Any]]:
        """Yield (work, answer) for all of `source`; the answer is a text where it was given up."""
        assert not self.busy, "one run at a time"
        self.busy = True
        self.run += 1
        pending, exhausted = iter(source), False
        again: list[_Job] = []  # from replicas that died
        numbers = count()
        for replica in self._living():
            replica.held.clear()
            replica.send("start", self.run, task, sampling, signal)
        try:
            while True:
                # Scores are dealt by the batch: an engine that scores has no way to hear that more may come.
                frees = {each: each.free for each in self._living() if task == "generate" or not each.held}
                batches: dict[_Replica, list[tuple[int, Any]]] = {}
                while not exhausted or again:
                    roomiest = max(frees, key=frees.__getitem__, default=None)
                    if roomiest is None or frees[roomiest] <= 0:
                        break
                    job = again.pop() if again else next(pending, _END)
                    if job is _END:
                        exhausted = True
                        continue
                    if job is None:
                        break
                    job = job if isinstance(job, _Job) else _Job(job)
                    number = next(numbers)
                    roomiest.held[number] = job
                    batches.setdefault(roomiest, []).append((number, job.work))
                    frees[roomiest] -= 1
                for replica, batch in batches.items():
                    replica.send("work", self.run, batch)
                if exhausted and not again and not any(replica.held for replica in self.replicas):
                    return
                for replica in self._ready():
                    yield from self._answers(replica, again)
        finally:
            self.busy = False
            for replica in self.replicas:
                replica.send("stop", self.run)

    def _living(self) -> list[_Replica]:
        """Return the replicas that are left.

        Raises:
            RunError: none.
        """
        living = [replica for replica in self.replicas if not replica.pipe.closed]
        if not living:
            words = "; ".join(dict.fromkeys(replica.last_words for replica in self.replicas))
            raise RunError(f"every replica of the {self.name} engine died: {words}")
        return living

    def _ready(self) -> list[_Replica]:
        by_pipe = {replica.pipe: replica for replica in self._living()}
        return [by_pipe[pipe] for pipe in wait(list(by_pipe))]  # type: ignore[index]

    def _answers(self, replica: _Replica, again: list[_Job]) -> Iterator[tuple[Any, Any]]:
        """Read one message of a replica; yield the answer in it, or what its death decides."""
        kind, *rest = self._receive(replica)
        if kind == "answer":
            run, number, answer = rest
            if run == self.run and (job := replica.held.pop(number, None)) is not None:
                yield job.work, answer
        elif kind == "refused":
            raise UserError(rest[0])
        elif kind == "dead":
            orphans = list(replica.held.values())
            replica.held.clear()
            for job in orphans:
                job.deaths += 1
                if job.deaths >= ATTEMPTS:
                    yield job.work, f"{job.deaths} replicas died while they had it; the last said: {rest[0]}"
                else:
                    again.append(job)

    def _receive(self, replica: _Replica) -> tuple[Any, ...]:
        """Return a replica's next message; its death is one too, and ends it."""
        try:
            message: tuple[Any, ...] = replica.pipe.recv()
        except (EOFError, OSError):
            message = ("dead", replica.last_words)
        if message[0] == "dead":
            replica.last_words = message[1]
            replica.kill()
        return message

    def _told(self, replica: _Replica) -> dict[str, Any]:
        """Wait until an engine has started; return what it says of itself."""
        kind, facts = self._receive(replica)
        if kind == "refused":
            raise UserError(facts)
        if kind == "dead":
            raise RunError(f"a replica did not start: {facts}")
        return dict(facts)

    def close(self) -> None:
        """End all engines' processes; each takes its own children along."""
        living = [replica for replica in self.replicas if not replica.pipe.closed]
        for replica in living:
            replica.send("close")
        limit = time.monotonic() + GRACE_SECONDS
        for replica in living:
            with contextlib.suppress(subprocess.TimeoutExpired):
                replica.process.wait(timeout=max(limit - time.monotonic(), 0.0))
            replica.kill()


def _start(share: Mapping[str, Any]) -> _Replica:
    """Start a process that waits to be told which engine to open."""
    ours, theirs = socket.socketpair()
    settings = {"CUDA_VISIBLE_DEVICES": share["devices"]} if "devices" in share else {}
    process = subprocess.Popen(
        [sys.executable, "-m", "teachers.engines.replica", str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # Ctrl-C is the parent's to handle
        env=child_environment(**settings),
    )
    theirs.close()
    return _Replica(process, Connection(ours.detach()))
