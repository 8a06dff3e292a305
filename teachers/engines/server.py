"""Any OpenAI-compatible endpoint as a teacher: vLLM, SGLang, llama.cpp, a hosted API. Nothing is computed here.

Samples are drawn at `/chat/completions`, which renders the prompt: no tokenizer, no vLLM and no torch are needed. One
request is one sample with its own seed, a fixed number of them is in flight, and the next is sent when one is answered.
Answers are streamed: completions take long, and what stands between us and a server closes connections that are silent.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.identity import model_identity
from distill.progress import say
from distill.records import Completion
from distill.tables import suggest
from teachers.backend import Request
from teachers.engines.server_answer import Answer
from teachers.engines.server_connection import Endpoint, Unreached, list_models, parse_endpoints, redactor
from teachers.engines.server_queue import Patience, ServerQueue
from teachers.engines.server_wire import VLLM_LOWEST_TEMPERATURE, Denied, Refused, Trouble, body_of, parse_manner

if TYPE_CHECKING:
    from distill.signals import SignalSpec

IN_FLIGHT = 64
ASK_AGAIN = 0.2  # seconds after which a feed that had nothing to send is asked again
LISTED = 12  # models named in a message
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")  # what FLOPs are counted from
_END = object()


@dataclass(frozen=True, slots=True)
class Served:
    """A model as its servers describe it."""

    name: str  # what requests call it
    kind: str  # the program that serves it, as it calls itself; "" where it does not
    folder: Path | None  # its files, where they lie on this machine
    context: int | None  # tokens of prompt and completion together, where the server says


class ServerEngine:
    """A model behind one or several HTTP addresses.

    Args:
        model: its name there; "auto" where it is the only one.
        concurrency: requests in flight, over all addresses.
        engine_args: `key=value` for the body of every request; and `stream=false` for servers that do not stream,
            `limit_field=max_completion_tokens` for those that call the limit so.
        base_url: the addresses; several are replicas of one model.
        request_timeout: seconds for one attempt at a completion.
        retries: further attempts after a failed one.
        backoff: the longest first pause before another attempt, in seconds; doubled each time.

    Raises:
        UserError: no address, none that can be reached, no such model there, or an option that has no meaning here.
    """

    name = "server"
    provides = frozenset({"text", "top_logprobs", "thinking_budget", "loop_stop", "feed"})

    def __init__(
        self,
        model: str,
        *,
        concurrency: int | None = None,
        engine_args: Iterable[str] = (),
        chat_template: Any = None,
        trust_remote_code: bool = False,  # no code of the model's runs here
        base_url: Sequence[str] = (),
        request_timeout: float = 4 * 3600.0,
        retries: int = 8,
        backoff: float = 0.5,
    ) -> None:
        self.manner = _manner(engine_args, chat_template)
        self.endpoints = parse_endpoints(base_url)
        self.redact = redactor(self.endpoints)
        self.patience = Patience(request_timeout, retries, backoff)
        self.served = _served(self.endpoints, model, self.patience)
        self.in_flight = concurrency or IN_FLIGHT
        self.config = _config(self.served.folder)
        urls = ", ".join(endpoint.url for endpoint in self.endpoints)
        kind = f" ({self.served.kind})" if self.served.kind else ""
        self.description = self.redact(f"{self.served.name} at {urls}{kind}, {self.in_flight} in flight")

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, where its files lie on this machine; else None. Only `signal/` asks, for its name."""
        if self.served.folder is None:
            return None
        from distill.models import load_tokenizer

        return load_tokenizer(str(self.served.folder))

    @classmethod
    def identify(
        cls,
        model: str | None,
        *,
        engine_args: Iterable[str] = (),
        chat_template: Any = None,
        base_url: Sequence[str] = (),
        request_timeout: float = 4 * 3600.0,
        retries: int = 8,
        backoff: float = 0.5,
        **_: Any,
    ) -> tuple[str, str]:
        """Return the model's name at its servers, and its identity.

        The identity is that of its files where they lie on this machine, else its name; what `engine_args` adds to the
        requests shapes samples and is part of it.

        Raises:
            UserError: as the constructor does.
        """
        manner = _manner(engine_args, chat_template)
        served = _served(parse_endpoints(base_url), model, Patience(request_timeout, retries, backoff))
        identity = model_identity(str(served.folder)) if served.folder else served.name
        return served.name, identity + manner.suffix

    def generate(
        self, requests: Iterable[Request | None], sampling: Mapping[str, Any], *, signal: SignalSpec | None = None
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield every request with its completion as it comes (see `teachers.backend.Backend`).

        Raises:
            UserError: the server refuses everything, or lacks what is asked for.
            RunError: the servers are gone.
        """
        self._check(sampling, signal)
        line = ServerQueue(
            self.endpoints,
            self.patience,
            body=lambda request: body_of(
                request, self.served.name, sampling, self.manner, dialect=self.served.kind, signal=signal
            ),
            answer=lambda: Answer(size=signal.size if signal else 0),
            limit=sampling["max_completion_length"],
            redact=self.redact,
            context=self.served.context,
        )
        pending = iter(requests)
        held = 0
        exhausted = False
        try:
            while True:
                idle = False
                while not (exhausted or idle) and held < self.in_flight:
                    request = next(pending, _END)
                    if isinstance(request, Request):
                        line.send(request)
                        held += 1
                    exhausted, idle = request is _END, request is None
                if not held and exhausted:
                    return
                try:
                    found = line.answers.get(timeout=ASK_AGAIN if idle else None)
                except queue.Empty:
                    continue
                if isinstance(found, BaseException):
                    raise found
                held -= 1
                yield found
        finally:
            line.close()

    def _check(self, sampling: Mapping[str, Any], signal: SignalSpec | None) -> None:
        if signal is not None and signal.kind != "top":
            raise UserError("the server backend gives the likeliest tokens (--top-logprobs), not random draws")
        temperature = sampling["temperature"]
        if self.served.kind == "vllm" and 0 < temperature < VLLM_LOWEST_TEMPERATURE:
            raise UserError(
                f"vLLM takes no temperature between 0 and {VLLM_LOWEST_TEMPERATURE} (given {temperature}): "
                "use 0 for greedy"
            )

    def close(self) -> None:
        """Nothing stays open between two calls of `generate`."""


def _manner(engine_args: Iterable[str], chat_template: Any) -> Any:
    if importlib.util.find_spec("httpx") is None:
        raise UserError("the server backend needs httpx: pip install 'distill[server]'")
    if chat_template is not None:
        raise UserError("the server renders the prompts: give it the chat template, and leave --chat-template out here")
    return parse_manner(engine_args)


def _served(endpoints: Sequence[Endpoint], model: str | None, patience: Patience) -> Served:
    """Ask every endpoint what it serves, and find the model there.

    Raises:
        UserError: none can be reached, one does not let us in, or does not have the model.
    """
    redact = redactor(endpoints)
    missed: dict[str, str] = {}
    cards: dict[str, Mapping[str, Any]] = {}
    name = None if model in (None, "auto") else model
    for endpoint in endpoints:
        try:
            listed = _listing(endpoint, patience)
        except Unreached as error:
            missed[endpoint.url] = str(error)
            continue
        except (Trouble, Refused) as error:
            hint = "" if endpoint.headers or not isinstance(error, Denied) else " (no key: set DISTILL_API_KEY)"
            raise UserError(redact(f"{endpoint.url} does not list its models: {error}") + hint) from None
        if listed is None:
            if name is None:
                raise UserError(f"{endpoint.url} does not list its models: name one with --teacher")
            continue
        names = [card["id"] for card in listed]
        if name is None:
            if len(names) != 1:
                raise UserError(redact(f"{endpoint.url} serves {_some(names)}: name one with --teacher"))
            name = names[0]
        if name not in names:
            raise UserError(redact(f"{endpoint.url} serves {_some(names)}, not {name!r}{suggest(name, names)}"))
        cards[endpoint.url] = next(card for card in listed if card["id"] == name)
    if len(missed) == len(endpoints) or name is None:
        listed_urls = "; ".join(f"{url} ({reason})" for url, reason in missed.items())
        raise UserError(redact(f"cannot reach {listed_urls}: is the server running there?"))
    for url, reason in missed.items():
        say(redact(f"cannot reach {url} ({reason}); going on with the others"))
    kinds = {str(card.get("owned_by") or "") for card in cards.values()}
    contexts = {card.get("max_model_len") for card in cards.values()}
    context = contexts.pop() if len(contexts) == 1 else None
    return Served(
        name,
        kind=kinds.pop() if len(kinds) == 1 else "",
        folder=_folder(list(cards.values())),
        context=context if isinstance(context, int) else None,
    )


def _listing(endpoint: Endpoint, patience: Patience) -> list[dict[str, Any]] | None:
    for failures in range(1, patience.retries + 1):
        try:
            return list_models(endpoint)
        except Trouble as trouble:
            if isinstance(trouble, Denied) or trouble.wait > patience.request_timeout:
                raise
            time.sleep(trouble.wait + random.uniform(0, patience.pause(failures)))
    return list_models(endpoint)


def _folder(cards: Sequence[Mapping[str, Any]]) -> Path | None:
    """Return where the model's files lie, if here.

    Raises:
        UserError: the replicas name folders of different models.
    """
    roots = [str(card.get(key) or "") for card in cards for key in ("root", "id")]
    folders = list(dict.fromkeys(Path(root) for root in roots if root and Path(root, "config.json").is_file()))
    if len({model_identity(str(folder)) for folder in folders}) > 1:
        raise UserError(f"the servers serve different models: {', '.join(map(str, folders))}")
    return folders[0] if folders else None


def _config(folder: Path | None) -> SimpleNamespace | None:
    """Return a model's shape for the ledger, read from its config.json: transformers' own reader would load torch."""
    if folder is None:
        return None
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values = values.get("text_config") or values
    return SimpleNamespace(**values) if all(isinstance(values.get(name), int) for name in SHAPE) else None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (", ".join(names[:LISTED]) or "no model") + more
