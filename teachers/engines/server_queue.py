"""Requests in flight at one or several servers of the same model: who is asked, what is tried again, when to give up.

A thread of its own runs the connections, so that they flow while the caller judges and writes. What may fail:

- A sample fails alone when the server refuses it (400), or when `retries` further attempts did not help.
- A replica that cannot be reached is set aside and knocked at again, ever more rarely, by one request at a time; the
  others serve. That costs no sample an attempt. When every replica was out of reach more than `retries` times in a row,
  the run ends (RunError): what was in flight is no error of its samples, and the same command goes on from there.
- When `IN_VAIN` samples in a row used up their attempts and nothing was served meanwhile, the run ends too.
- Where nothing was ever served, a refusal of the key, the address, the model or the settings is the user's (UserError).
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill.errors import RunError, UserError
from distill.records import Completion
from teachers.backend import failed
from teachers.engines.server_answer import Answer
from teachers.engines.server_connection import Endpoint, TimedOut, Unreached, ask, open_client
from teachers.engines.server_wire import Denied, Refused, Trouble, Unsuitable

if TYPE_CHECKING:
    import httpx

    from teachers.backend import Request

LONGEST_PAUSE = 60.0  # seconds between two attempts, unless the server asks for more
TIMEOUTS = 2  # of a whole request: hours each, so a second one is the last
IN_VAIN = 8
POLL_SECONDS = 0.2  # while no replica can be reached
CLOSING_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long and how often a request is tried: seconds of one attempt, attempts after the first, first pause."""

    request_timeout: float
    retries: int
    backoff: float

    def pause(self, failures: int) -> float:
        """Return the longest pause after so many failures (at least 1), in seconds: doubled each time."""
        return min(LONGEST_PAUSE, self.backoff * 2.0 ** min(failures - 1, 60))


@dataclass(slots=True, eq=False)
class Replica:
    """An endpoint in use."""

    url: str
    client: httpx.AsyncClient
    in_flight: int = 0
    troubles: int = 0  # in a row
    rest_until: float = 0.0  # others are preferred until then
    unreached: int = 0  # attempts in a row without a connection
    knock_at: float = 0.0  # when it is tried again, while unreached
    knocking: bool = False

    def reached(self) -> None:
        """Take it back."""
        self.unreached = 0

    def missed(self, patience: Patience) -> None:
        """Set it aside. Of several requests that were on their way to it, the first counts."""
        now = time.monotonic()
        if now >= self.knock_at:
            self.unreached += 1
            self.knock_at = now + patience.pause(self.unreached)

    def stumbled(self, patience: Patience) -> None:
        """Prefer others for a while: a replica that fails fast would otherwise have the fewest in flight."""
        self.troubles += 1
        self.rest_until = time.monotonic() + patience.pause(self.troubles)

    def served(self) -> None:
        """Forget its troubles."""
        self.troubles, self.rest_until = 0, 0.0


class ServerQueue:
    """Takes requests from one thread, and gives that thread (request, completion), or what ended the run.

    Args:
        body: makes what is sent for a request.
        answer: makes an empty answer, to be filled.
        limit: the most tokens of a completion.
        redact: makes a message fit to be shown.
        context: tokens that a prompt and its completion may have together, where known.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        patience: Patience,
        *,
        body: Callable[[Request], dict[str, Any]],
        answer: Callable[[], Answer],
        limit: int | None,
        redact: Callable[[str], str],
        context: int | None = None,
    ) -> None:
        self.endpoints, self.patience = endpoints, patience
        self.body, self.answer, self.limit, self.redact = body, answer, limit, redact
        # Most refusals are of prompts that are too long, and not every server says so (vLLM: "max_tokens ... got 0").
        self.hint = f"; the context is {context} tokens" if context else ""
        self.replicas: list[Replica] = []
        self.served = 0
        self.in_vain = 0  # samples in a row that used up their attempts
        self.settings_stand = False  # the server took these settings for another prompt
        self.settings_lock = asyncio.Lock()
        self.answers: queue.SimpleQueue[tuple[Request, Completion] | BaseException] = queue.SimpleQueue()
        self.inbox: asyncio.Queue[Request | None] = asyncio.Queue()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="server-queue", daemon=True)
        self.thread.start()

    def send(self, request: Request) -> None:
        """Put a request in flight."""
        # The loop is closed only after something ended the run; that lies in `answers` and is about to be read.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.inbox.put_nowait, request)

    def close(self) -> None:
        """Cancel what is in flight and close all connections."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.inbox.put_nowait, None)
        self.thread.join(CLOSING_SECONDS)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
                runner.run(self._serve())
        except BaseException as error:  # nobody else would tell the thread that waits
            self.answers.put(error)

    async def _serve(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        async with contextlib.AsyncExitStack() as stack:
            for endpoint in self.endpoints:
                client = await stack.enter_async_context(open_client(endpoint))
                self.replicas.append(Replica(endpoint.url, client))
            while (request := await self.inbox.get()) is not None:
                task = asyncio.create_task(self._settle(request))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _settle(self, request: Request) -> None:
        try:
            self.answers.put((request, await self._complete(request)))
        except Exception as error:  # it ends the run, in the thread that waits
            self.answers.put(error)

    async def _complete(self, request: Request) -> Completion:
        """Return the sample, or why there is none, after as many attempts as it takes."""
        body = self.body(request)
        attempts = failures = timeouts = 0
        while True:
            before = self.served
            replica = await self._choose()
            try:
                completion = (await self._ask(replica, body)).completion(self.limit)
            except Unreached as error:
                replica.missed(self.patience)
                self._check_reach(str(error))
            except Refused as refusal:
                await self._check_settings(replica, body)
                return failed(self.redact(str(refusal)) + self.hint)
            except Unsuitable as shortcoming:
                if not self.served:
                    raise UserError(self.redact(f"{replica.url}: {shortcoming}")) from None
                return failed(self.redact(str(shortcoming)))
            except Trouble as trouble:
                if isinstance(trouble, Denied) and not self.served:
                    raise UserError(self.redact(f"{replica.url} serves nothing: {trouble}")) from None
                replica.stumbled(self.patience)
                attempts += 1
                # To be told to come back later is no failure while others are served: the server has a full queue.
                failures += not (trouble.busy and self.served > before)
                timeouts += isinstance(trouble, TimedOut)
                # A server that wants to be left alone for longer than a request may take will not be asked again:
                # to wait for less would be of no use.
                patient = trouble.wait <= self.patience.request_timeout
                if failures > self.patience.retries or timeouts >= TIMEOUTS or not patient:
                    return self._give_up(replica, attempts, trouble)
                # Full jitter, on top of what the server asks for, so that those who were sent away together do not
                # return together ("Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
                await asyncio.sleep(trouble.wait + random.uniform(0, self.patience.pause(attempts)))
            else:
                replica.served()
                self.served += 1
                self.in_vain = 0
                return completion

    async def _ask(self, replica: Replica, body: dict[str, Any], *, whole: bool = True) -> Answer:
        answer = self.answer()
        replica.in_flight += 1
        try:
            await ask(
                replica.client,
                body,
                answer,
                seconds=self.patience.request_timeout,
                connected=replica.reached,
                whole=whole,
            )
        finally:
            replica.in_flight -= 1
            replica.knocking = False
        return answer

    async def _choose(self) -> Replica:
        """Return the replica to ask next: of those that are well, the one with the fewest in flight."""
        while True:
            now = time.monotonic()
            for replica in self.replicas:
                if replica.unreached and not replica.knocking and now >= replica.knock_at:
                    replica.knocking = True
                    return replica
            if reached := [replica for replica in self.replicas if not replica.unreached]:
                well = [replica for replica in reached if now >= replica.rest_until]
                return min(well or reached, key=lambda replica: replica.in_flight)
            waits = [replica.knock_at - now for replica in self.replicas if not replica.knocking]
            await asyncio.sleep(max(0.01, min([*waits, POLL_SECONDS])))

    def _check_reach(self, reason: str) -> None:
        if all(replica.unreached > self.patience.retries for replica in self.replicas):
            urls = ", ".join(replica.url for replica in self.replicas)
            raise RunError(
                self.redact(f"cannot reach {urls} any more ({reason}): what is finished is kept; once a server is")
                + " there again, the same command goes on"
            )

    async def _check_settings(self, replica: Replica, body: dict[str, Any]) -> None:
        """Find out, once and before anything was served, whether a refusal is due to the prompt or to the settings.

        Raises:
            UserError: another prompt is refused too, so all would be.
        """
        async with self.settings_lock:
            if self.settings_stand or self.served:
                return
            try:
                await self._ask(replica, {**body, "messages": [{"role": "user", "content": "Hi"}]}, whole=False)
                self.settings_stand = True
            except Refused as refusal:
                raise UserError(self.redact(f"{replica.url} refuses these settings: {refusal}")) from None
            except (Trouble, Unreached):
                return  # that says nothing about the settings

    def _give_up(self, replica: Replica, attempts: int, trouble: Trouble) -> Completion:
        self.in_vain += 1
        reason = self.redact(f"{trouble} (attempt {attempts} was the last)")
        if self.in_vain >= IN_VAIN:
            raise RunError(f"{self.in_vain} samples in a row failed at {replica.url}: {reason}")
        return failed(reason)
