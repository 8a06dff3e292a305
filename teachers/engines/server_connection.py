"""Addresses, keys and connections of OpenAI-compatible servers: one request, once.

Keys come from the environment and from nowhere else. Whatever a server says may contain one (some echo the header they
refuse), so every message passes through `redactor` before anybody sees it. What is tried again, and when, is in
`teachers.engines.server_queue`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from distill.errors import UserError
from teachers.engines.server_answer import Answer
from teachers.engines.server_wire import Trouble, fault_of

if TYPE_CHECKING:
    import httpx

KEYS = ("DISTILL_API_KEY", "OPENAI_API_KEY")
CONNECT_SECONDS = 10.0
LISTING_SECONDS = 60.0
LONGEST_MESSAGE = 400
# A machine that vanished closes no connection, and a request may wait for hours without a byte: let the system ask.
KEEP_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), seconds)
        for name, seconds in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 5))
        if hasattr(socket, name)
    ),
]


class Unreached(Exception):
    """There was no connection, so nothing was sent."""


class TimedOut(Trouble):
    """An attempt took all the time that a request may take."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address under which a model is served, without credentials: those are in `headers`."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)


def parse_endpoints(base_url: Sequence[str]) -> list[Endpoint]:
    """Return the addresses given with `--base-url`; one without a path gets `/v1`, where such servers listen.

    A user and password inside an address go to that server as basic authentication; else the key of `DISTILL_API_KEY`
    or `OPENAI_API_KEY` does, if there is one.

    Raises:
        UserError: none is given, one is no http address, or the key cannot be sent.
    """
    if not base_url:
        raise UserError("the server backend asks a running server: name it with --base-url http://HOST:PORT/v1")
    name = next((name for name in KEYS if os.environ.get(name, "").strip()), "")
    key = os.environ.get(name, "").strip()
    if any(not "!" <= character <= "~" for character in key):
        raise UserError(f"{name} holds characters that no HTTP header can carry")
    return [_endpoint(url, key) for url in base_url]


def _endpoint(given: str, key: str) -> Endpoint:
    try:
        parts = urlsplit(given.strip())
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and given.isascii() and parts.port != 0
        fits = fits and not parts.query and not parts.fragment and "@" not in parts.path
    except ValueError:  # a port that is no number, an address in broken brackets
        fits = False
    if not fits:
        _, at, host = given.partition("?")[0].rpartition("@")
        shown = f"***@{host}" if at else host  # what precedes an @ and follows a ? may be a secret
        raise UserError(f"--base-url takes http://HOST:PORT/v1 or https://..., not {shown!r}")
    userinfo, _, host = parts.netloc.rpartition("@")
    url = f"{parts.scheme}://{host}{parts.path.rstrip('/') or '/v1'}"
    if userinfo:
        user, _, password = (unquote(part) for part in userinfo.partition(":"))
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        return Endpoint(url, {"Authorization": f"Basic {token}"}, (token, userinfo, f"{user}:{password}", password))
    return Endpoint(url, {"Authorization": f"Bearer {key}"} if key else {}, (key,))


def redactor(endpoints: Sequence[Endpoint]) -> Callable[[str], str]:
    """Return what makes a message fit to be shown: without any endpoint's secrets, on one line, not too long."""
    secrets = {secret for endpoint in endpoints for secret in endpoint.secrets if secret}
    forms = {form for secret in secrets for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1])}
    longest_first = sorted(forms, key=len, reverse=True)

    def redact(message: str) -> str:
        for secret in longest_first:
            message = message.replace(secret, "***")
        line = " ".join(message.split())  # only now shortened, or half a secret might stay
        return line if len(line) <= LONGEST_MESSAGE else line[: LONGEST_MESSAGE - 1] + "…"

    return redact


def list_models(endpoint: Endpoint) -> list[dict[str, Any]] | None:
    """Return the cards of the models that a server lists; None when it has no such list.

    Raises:
        Unreached, Trouble, Refused: it cannot be had.
    """
    import httpx

    try:
        timeout = httpx.Timeout(LISTING_SECONDS, connect=CONNECT_SECONDS)
        headers, verify = dict(endpoint.headers), endpoint.url.startswith("https:")
        response = httpx.get(f"{endpoint.url}/models", headers=headers, timeout=timeout, verify=verify)
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
        raise Unreached(str(error) or type(error).__name__) from None
    except httpx.RequestError as error:
        raise Trouble(f"the connection broke: {error or type(error).__name__}") from None
    if response.status_code in (404, 405, 501):
        return None
    if response.status_code != 200:
        raise fault_of(response.status_code, response.content, response.headers)
    try:
        cards = json.loads(response.content)["data"]
        return [{**card, "id": str(card["id"])} for card in cards]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Trouble("its list of models is not in the OpenAI format") from None


def open_client(endpoint: Endpoint) -> httpx.AsyncClient:
    """Return a client for one endpoint; except for connecting, time limits and the number of requests are ours."""
    import httpx

    parts = urlsplit(endpoint.url)
    proxies = {} if proxy_bypass(parts.hostname or "") else getproxies()
    transport = httpx.AsyncHTTPTransport(
        verify=parts.scheme == "https",  # reading the certificates takes a while; without TLS nobody asks for them
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=3.0),
        socket_options=KEEP_ALIVE,
        proxy=proxies.get(parts.scheme) or proxies.get("all"),
    )
    return httpx.AsyncClient(
        base_url=endpoint.url,
        headers={"content-type": "application/json", **endpoint.headers},
        timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
        transport=transport,
    )


async def ask(
    client: httpx.AsyncClient,
    body: Mapping[str, Any],
    answer: Answer,
    *,
    seconds: float,
    connected: Callable[[], None],
    whole: bool = True,
) -> None:
    """Send a request once and read its whole answer into `answer`.

    Args:
        seconds: for the whole of it.
        connected: called when the server answers at all.
        whole: False to see only whether the server takes the request: some refuse it by the first piece of a stream.

    Raises:
        Unreached, Trouble, Refused, Unsuitable: what became of it instead.
    """
    import httpx

    # All ASCII: a prompt may hold lone surrogates, which UTF-8 does not have and JSON's escapes do.
    content = json.dumps(body).encode("ascii")
    try:
        async with asyncio.timeout(seconds), client.stream("POST", "chat/completions", content=content) as response:
            connected()
            if response.status_code != 200:
                raise fault_of(response.status_code, await response.aread(), response.headers)
            if "text/event-stream" in response.headers.get("content-type", ""):
                await _read_stream(response, answer, whole)
            else:
                answer.add(await response.aread())
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
        raise Unreached(str(error) or type(error).__name__) from None
    except TimeoutError:
        raise TimedOut(f"no answer within {seconds:g} s") from None
    except (httpx.RequestError, OSError) as error:
        raise Trouble(f"the connection broke: {error or type(error).__name__}") from None


async def _read_stream(response: httpx.Response, answer: Answer, whole: bool) -> None:
    async for line in _lines(response.aiter_bytes()):
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            answer.add(data)
            if not whole:
                return
    if answer.num_completion_tokens is None:  # it comes last
        raise Trouble("the stream broke off")


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the lines of a byte stream. httpx would also break them at U+2028 and U+0085, inside a JSON string."""
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line
    if rest:
        yield rest
