"""A loopback server that speaks the OpenAI chat API and misbehaves by script.

It answers deterministically from messages and seed, one word one token, so that an answer that came late must be equal
to one that came at once. Nothing of ours is imported: it is the other side.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What becomes of one request, by its body and by how often the same one came before: the name of a fault, or None.
Script = Callable[[Mapping[str, Any], int], "str | None"]
WORDS = [
    "so",
    "we",
    "add",
    "two",
    "and",
    "carry",
    "one",
    "then",
    "half",
    "of",
    "it",
    "is",
    "nine",
    "which",
    "is",
    "even",
]
RECOVERABLE = ["429", "429:0.02", "500", "502", "503", "504", "529", "drop", "torn", "cut", "garbage", "empty"]
RECOVERABLE += ["cut-late", "error-event", "abort"]


def answer_of(body: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return reasoning and answer, as words, that this server gives."""
    asked = json.dumps([body["messages"], body.get("seed"), body["temperature"]], sort_keys=True)
    digest = hashlib.sha256(asked.encode()).digest()
    words = [WORDS[byte % len(WORDS)] for byte in digest]
    return words[: 4 + digest[0] % 8], [*words[-3:], f"\\boxed{{{digest[1]}}}"]


@dataclass
class ScriptedServer:
    """A server; use it as a context manager.

    Attributes:
        script: what goes wrong when. Names: a status, `STATUS:SECONDS` with Retry-After, `drop` (closed before an
            answer), `torn` (closed in the middle), `cut` (ended in the middle, in good order), `cut-late` (ended before
            the token counts), `garbage`, `empty`, `hang`, `slow:SECONDS`, `error-event:STATUS`, `no-usage`, `short` and
            `ignore-limit` (less or more than was asked), `echo:STATUS` (the error quotes the Authorization header), or
            any finish_reason.
        reasoning: `tags` in the text, `open` (the template opened the tag), or the field that carries it.
        key: what must come as a bearer token.
        listing: the status of /models.
        limit_field: the only name of the limit that this server knows.
    """

    script: Script = lambda body, times: None
    reasoning: str = "tags"
    models: Sequence[Mapping[str, Any]] = ({"id": "scripted", "owned_by": "script"},)
    key: str | None = None
    listing: int = 200
    limit_field: str = "max_tokens"
    token_ids: bool = True
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)  # seconds of the monotonic clock
    in_flight: int = 0
    most: int = 0

    def __enter__(self) -> ScriptedServer:
        self.times: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.connections: set[socket.socket] = set()
        handler = type("Handler", (_Handler,), {"scripted": self})
        self.server = _Server(("127.0.0.1", self.port), handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close every connection and refuse new ones; entering again starts at the same port."""
        if not self.stopping.is_set():
            self.stopping.set()
            self.server.shutdown()
            self.server.server_close()
            for connection in list(self.connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    def seen(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> int:
        """Note a request and return how often the same one came before."""
        asked = json.dumps([body["messages"], body.get("seed")], sort_keys=True)
        with self.lock:
            self.arrivals.append(time.monotonic())
            self.bodies.append(dict(body))
            self.headers.append({name.lower(): value for name, value in headers.items()})
            self.times[asked] += 1
            return self.times[asked] - 1

    @contextlib.contextmanager
    def flight(self) -> Iterator[None]:
        """Count a request while it is being answered."""
        with self.lock:
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
        try:
            yield
        finally:
            with self.lock:
                self.in_flight -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error here."""


class _Broken(Exception):
    """The connection is to be closed as it is."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    scripted: ScriptedServer

    def setup(self) -> None:
        super().setup()
        self.scripted.connections.add(self.connection)

    def finish(self) -> None:
        self.scripted.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        if self._allowed():
            self._json(self.scripted.listing, {"object": "list", "data": list(self.scripted.models)})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            return self._json(404, {"detail": "Not Found"})
        times = self.scripted.seen(body, self.headers)
        try:
            with self.scripted.flight():
                if self._allowed():
                    self._answer(body, self.scripted.script(body, times))
        except _Broken:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _allowed(self) -> bool:
        given = self.headers.get("Authorization")
        if self.scripted.key is None or given == f"Bearer {self.scripted.key}":
            return True
        self._json(401, {"error": {"message": f"Incorrect API key provided: {given}", "code": "invalid_api_key"}})
        return False

    def _answer(self, body: Mapping[str, Any], fault: str | None) -> None:
        name, _, argument = (fault or "").partition(":")
        if name.isdecimal():
            headers = {"Retry-After": argument} if argument else {}
            return self._json(int(name), {"error": {"message": f"scripted {name}", "code": int(name)}}, headers)
        if name == "echo":
            said = "\n".join(f"{key}: {value}" for key, value in self.headers.items())
            return self._json(int(argument or 401), {"error": {"message": f"not with\n{said}"}})
        if name == "drop":
            raise _Broken
        if name == "hang":
            self.scripted.stopping.wait(30)
            raise _Broken
        if name == "slow":
            self.scripted.stopping.wait(float(argument))
        if body["stream"]:
            self._stream(body, name, argument)
        else:
            self._whole(body, name, argument)

    def _whole(self, body: Mapping[str, Any], name: str, argument: str) -> None:
        if name == "error-event":
            return self._json(int(argument or 500), {"error": {"message": "scripted error"}})
        if name in ("garbage", "empty"):
            return self._send(200, b"<html>busy</html>" if name == "garbage" else b"", "text/html")
        said: dict[str, str] = {}
        entries: list[Any] = []
        *deltas, reason = self._said(body, name)
        for key, text, number in deltas:
            said[key] = said.get(key, "") + text
            entries.append(self._logprobs(body, number) if body.get("logprobs") else None)
        choice = {"index": 0, "message": {"role": "assistant", **said}, "finish_reason": reason}
        choice["logprobs"] = {"content": entries} if body.get("logprobs") else None
        answer = {"choices": [choice], **({} if name == "no-usage" else {"usage": self._usage(body, len(deltas))})}
        data = json.dumps(answer, ensure_ascii=False).encode()
        if name in ("torn", "cut", "cut-late"):
            self._send(200, data, "application/json", length=len(data) + 10 if name == "torn" else None, cut=True)
        else:
            self._send(200, data, "application/json")

    def _stream(self, body: Mapping[str, Any], name: str, argument: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        *deltas, reason = self._said(body, name)
        if name == "error-event":
            self._event({"error": {"message": "scripted error", "code": int(argument or 500)}})
        elif name == "garbage":
            self._event("{no json")
        elif name != "empty":
            self._chunk(b": a comment keeps the connection awake\r\n\r\n")
            self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "usage": None})
            for place, (key, text, number) in enumerate(deltas):
                if name in ("torn", "cut") and place == 2:
                    break
                choice = {"index": 0, "delta": {key: text}, "finish_reason": None}
                choice["logprobs"] = {"content": [self._logprobs(body, number)]} if body.get("logprobs") else None
                self._event({"choices": [choice], "usage": None})
            if name == "torn":
                raise _Broken
            if name != "cut":
                self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
                if name == "cut-late":
                    return self._chunk(b"")
                if name != "no-usage" and (body.get("stream_options") or {}).get("include_usage"):
                    self._event({"choices": [], "usage": self._usage(body, len(deltas))})
                self._event("[DONE]")
        self._chunk(b"")

    def _said(self, body: Mapping[str, Any], name: str) -> list[Any]:
        """Return (field, text, token) for every token, and the finish_reason at the end."""
        reasoning, answer = answer_of(body)
        where = self.scripted.reasoning
        separate = where if where in ("reasoning", "reasoning_content") else "content"
        tagged = {"tags": ["<think>", "</think>"], "open": ["", "</think>"]}.get(where, ["", ""])
        tokens = [(separate, f"{tagged[0]} {reasoning[0]}" if tagged[0] else reasoning[0])]
        tokens += [(separate, f" {word}") for word in reasoning[1:]]
        tokens += [("content", tagged[1] + answer[0]), *(("content", f" {word}") for word in answer[1:])]
        reason = name if name in ("content_filter", "tool_calls", "abort", "repetition", "eos", "weird") else "stop"
        limit = None if name == "ignore-limit" else body.get(self.scripted.limit_field)
        if name == "short":
            limit = 2
        if limit is not None and limit < len(tokens):
            tokens, reason = tokens[:limit], "length"
        return [*((key, text, place) for place, (key, text) in enumerate(tokens)), reason]

    def _logprobs(self, body: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The third likeliest token is drawn at every third position, and like vLLM it comes first in the list."""

        def outcome(rank: int) -> dict[str, Any]:
            token = f"token_id:{100 * number + rank}" if self.scripted.token_ids else f" word{rank}"
            return {"token": token, "logprob": -0.5 - rank, "bytes": [116]}

        drawn = 2 if number % 3 == 0 else 0
        ranks = [drawn, *(rank for rank in range(body["top_logprobs"]) if rank != drawn)][: body["top_logprobs"]]
        return {**outcome(drawn), "top_logprobs": [outcome(rank) for rank in ranks]}

    def _usage(self, body: Mapping[str, Any], drawn: int) -> dict[str, int]:
        prompt = sum(len(message["content"].split()) for message in body["messages"])
        return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}

    def _event(self, value: Any) -> None:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        self._chunk(f"data: {text}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        try:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            self.wfile.flush()
        except OSError:
            raise _Broken from None

    def _json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers or {})

    def _send(
        self,
        status: int,
        data: bytes,
        kind: str,
        headers: Mapping[str, str] | None = None,
        *,
        length: int | None = None,
        cut: bool = False,
    ) -> None:
        data = data[: len(data) // 2] if cut else data
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)
        if length is not None:
            raise _Broken
