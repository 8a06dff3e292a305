"""The process one replica's engine runs in: `python -m teachers.engines.replica FD`.

Messages come and go as pickles over a socket that the parent (replicas.py) made; nobody else can reach it.
First comes which engine to open; the answer is what it says of itself. Then work comes in and answers go out, until
the parent says stop, or is gone. An engine that dies takes this process with it.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from distill.errors import UserError

BATCH = 16  # requests at once for an engine that does not say


class _Over(Exception):
    """The parent has given the run up."""


class _Inbox:
    """The parent's messages. A thread takes them in, so that the parent never waits for a busy engine to listen."""

    def __init__(self, pipe: Connection) -> None:
        self.messages: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.pipe = pipe
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                self.messages.put(self.pipe.recv())
        except (EOFError, OSError):
            os._exit(1)  # the parent is gone, whatever the engine is at

    def take(self, run: int, wait: bool) -> list[tuple[int, Any]] | None:
        """Return the next work of a run; None where there is none yet and `wait` is not set.

        Raises:
            _Over: there will be none.
        """
        while True:
            try:
                message = self.messages.get(block=wait)
            except queue.Empty:
                return None
            if message[0] == "close":
                self.messages.put(message)
                raise _Over
            if message[:2] == ("stop", run):
                raise _Over
            if message[:2] == ("work", run):
                return list(message[2])


def open_engine(pipe: Connection) -> Any:
    """Open what the parent names and tell it what that is."""
    name, model, options, cores = pipe.recv()
    if cores:
        os.sched_setaffinity(0, cores)  # before torch counts them
    from teachers import open_backend

    engine = open_backend(name, model, **options)
    facts = {name: getattr(engine, name, None) for name in ("name", "provides", "description", "context")}
    facts["config"] = _plain(engine.config)
    rooms = (getattr(engine, name, None) for name in ("room", "in_flight", "batch_size"))
    facts["room"] = next((room for room in rooms if room), BATCH)
    pipe.send(("ready", facts))
    return engine


def _plain(config: Any) -> Any:
    """Return a config that another process can read: a class shipped inside a model folder exists in this one only."""
    if config is None or type(config).__module__.startswith("transformers."):
        return config
    from transformers import PretrainedConfig

    named = {name: getattr(config, name) for name in getattr(config, "attribute_map", {}) if hasattr(config, name)}
    return PretrainedConfig.from_dict({**config.to_dict(), **named})


def stream(engine: Any, inbox: _Inbox, run: int, sampling: Any, signal: Any) -> Iterator[tuple[int, Any]]:
    """Yield (number, completion), taking more requests whenever the engine has room."""
    held: dict[int, tuple[int, Any]] = {}  # by identity: a request's own names need not be unique

    def feed() -> Iterator[Any]:
        while True:
            batch = inbox.take(run, wait=not held)
            if batch is None:
                yield None
            for number, request in batch or ():
                held[id(request)] = (number, request)
                yield request

    for request, completion in engine.generate(feed(), sampling, signal=signal):
        yield held.pop(id(request))[0], completion


def batches(engine: Any, inbox: _Inbox, run: int, sampling: Any, signal: Any) -> Iterator[tuple[int, Any]]:
    """Yield (number, completion), one batch after another."""
    while True:
        batch = inbox.take(run, wait=True) or []
        numbers = {id(request): number for number, request in batch}
        for request, completion in engine.generate((request for _, request in batch), sampling, signal=signal):
            yield numbers[id(request)], completion


def scores(engine: Any, inbox: _Inbox, run: int, signal: Any) -> Iterator[tuple[int, Any]]:
    """Yield (number, TokenSignal), one batch after another."""
    while True:
        batch = inbox.take(run, wait=True) or []
        for number, numbers in engine.score(((str(number), *item[1:]) for number, item in batch), signal):
            yield int(number), numbers


def work(engine: Any, inbox: _Inbox, run: int, task: str, sampling: Any, signal: Any) -> Iterator[tuple[int, Any]]:
    """Return the answers to one run's work.

    Raises:
        _Over: when the parent stops the run; this is how it ends.
        UserError: the engine refuses what is asked.
    """
    if task == "score":
        return scores(engine, inbox, run, signal)
    kind = stream if "feed" in engine.provides else batches
    return kind(engine, inbox, run, sampling, signal)


def main() -> None:
    """Serve until the parent ends it."""
    pipe = Connection(int(sys.argv[1]))
    os.set_inheritable(pipe.fileno(), False)  # held by a child of ours, it would hide our death from the parent
    os.dup2(2, 1)  # stdout is the parent's to write to
    try:
        engine = open_engine(pipe)
        inbox = _Inbox(pipe)
        while True:
            kind, *rest = inbox.messages.get()
            if kind == "close":
                engine.close()
                os._exit(0)  # the parent waits, and an interpreter that has loaded torch takes seconds to leave
            if kind == "start":
                try:
                    for number, answer in work(engine, inbox, *rest):
                        pipe.send(("answer", rest[0], number, answer))
                except _Over:
                    continue
                except UserError as error:
                    pipe.send(("refused", str(error)))
    except UserError as error:
        pipe.send(("refused", str(error)))
    except Exception as error:  # whatever it was, this engine is of no use any more, and the parent has others
        if os.environ.get("DISTILL_DEBUG"):
            traceback.print_exc()
        pipe.send(("dead", " ".join(str(error).split())[:400] or type(error).__name__))


if __name__ == "__main__":
    main()
