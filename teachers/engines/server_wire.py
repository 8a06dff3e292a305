"""What is sent to an OpenAI-compatible chat endpoint, and what its refusals mean.

Servers differ in small things that change samples silently; each such difference is written down here once. Answers
are read in `teachers.engines.server_answer`; connections, waiting and retries are in `teachers.engines.server_queue`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from teachers.backend import engine_options

if TYPE_CHECKING:
    from distill.signals import SignalSpec
    from teachers.backend import Request

# Fields of the body that are set here -> what sets them.
SET_HERE = {
    "model": "--teacher",
    "messages": "--prompts",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "max_tokens": "--max-completion-length",
    "max_completion_tokens": "--max-completion-length",
    "seed": "--seed",
    "n": "-n",
    "logprobs": "--top-logprobs",
    "top_logprobs": "--top-logprobs",
    "return_tokens_as_token_ids": "--top-logprobs",
    "thinking_token_budget": "--thinking-budget",
    "repetition_detection": "--loop-stop",
    "stream_options": "--engine-arg stream",
    "chat_template": "the server's own settings",
}
LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")

# `owned_by` of a model's card -> fields sent to servers of that kind. Each of them samples with more than temperature
# and top-p unless told otherwise (vLLM and SGLang take a model's generation_config, llama.cpp its own top-k 40 and
# min-p 0.05), and a sample's identity knows of none of that. Other servers refuse fields they do not know.
DIALECTS: dict[str, Mapping[str, Any]] = {
    "vllm": {
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "return_prompt_text": True,  # shows what the template opened
        "stream_interval": 32,  # tokens in a piece of the stream; one each would cost a core here
    },
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "llamacpp": {"top_k": 0, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0},
}
VLLM_LOWEST_TEMPERATURE = 0.01  # it raises smaller ones to this and goes on


class Trouble(Exception):
    """An attempt failed in a way that another one may not.

    `wait` is how many seconds the server wants to be left alone; `busy` says that it is only overloaded.
    """

    def __init__(self, reason: str, *, wait: float = 0.0, busy: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.busy = wait, busy


class Denied(Trouble):
    """The server will serve nobody like this (key, address, model), unless it has served somebody before."""


class Refused(Exception):
    """The server will never serve this request, whoever else it serves."""


class Unsuitable(Exception):
    """The server answers, but leaves out something without which its answers are of no use."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How a server is to be spoken to: `--engine-arg`, sorted out. `extra` goes into the body of every request."""

    stream: bool
    limit_field: str
    extra: Mapping[str, Any]

    @property
    def suffix(self) -> str:
        """What `extra` adds to the identity of the author: other fields, other samples."""
        pairs = [f"{key}={json.dumps(value, sort_keys=True)}" for key, value in sorted(self.extra.items())]
        return "?" + "&".join(pairs) if pairs else ""


def parse_manner(engine_args: Iterable[str]) -> Manner:
    """Sort out `--engine-arg`.

    Raises:
        UserError: a field that another option sets, or a value that JSON does not have.
    """
    extra = engine_options(engine_args)
    stream, limit_field = extra.pop("stream", True), extra.pop("limit_field", LIMIT_FIELDS[0])
    if not isinstance(stream, bool):
        raise UserError(f"--engine-arg stream is true or false, not {stream!r}")
    if limit_field not in LIMIT_FIELDS:
        raise UserError(f"--engine-arg limit_field is {' or '.join(LIMIT_FIELDS)}, not {limit_field!r}")
    for key, value in extra.items():
        if key in SET_HERE:
            raise UserError(f"--engine-arg {key} is not taken by the server backend: {SET_HERE[key]} sets it")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"--engine-arg {key}={value!r} cannot be sent as JSON: {error}") from None
    return Manner(stream, limit_field, extra)


def body_of(
    request: Request,
    model: str,
    sampling: Mapping[str, Any],
    manner: Manner,
    dialect: str,
    signal: SignalSpec | None,
) -> dict[str, Any]:
    """Return the JSON body that asks for one sample."""
    body = {**DIALECTS.get(dialect, {}), **manner.extra}
    body |= {"model": model, "messages": list(request.prompt.messages), "stream": manner.stream}
    body |= {"temperature": sampling["temperature"], "top_p": sampling["top_p"]}
    if manner.stream:
        body["stream_options"] = {"include_usage": True}
    else:
        body.pop("stream_interval", None)
    if sampling["temperature"] > 0:
        body["seed"] = request.seed
    if sampling["max_completion_length"] is not None:
        body[manner.limit_field] = sampling["max_completion_length"]
    if "thinking_budget" in sampling:
        body["thinking_token_budget"] = sampling["thinking_budget"]
    if "loop_stop" in sampling:
        size, count = sampling["loop_stop"]
        body["repetition_detection"] = {"max_pattern_size": size, "min_pattern_size": 1, "min_count": count}
    if signal is not None:
        # vLLM puts the drawn token first and cuts the list after it, so of K the K-th likeliest would be missing
        # wherever an unlikely token was drawn: of K + 1 the K likeliest are always there.
        body |= {"logprobs": True, "top_logprobs": signal.size + 1, "return_tokens_as_token_ids": True}
    return body


def fault_of(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> Exception:
    """Return what a server's error means, as an exception to raise."""
    reason = f"{status}: {error_text(body) or 'no reason given'}"
    if status in (400, 413, 422):
        return Refused(reason)
    if status in (408, 409, 425, 429) or (status >= 500 and status not in (501, 505)):
        return Trouble(reason, wait=_retry_after(headers or {}), busy=status == 429)
    return Denied(reason)


def error_text(body: bytes) -> str:
    """Return the message in an error's body on one line; of any length, and not yet redacted."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = re.sub(r"<[^<>]*>", " ", text)  # a proxy's page
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail") if found.get(key)), "")
    return " ".join(str(found).split())


def status_in(error: Any) -> int:
    """Return the status of an error inside a stream; one without a status came up while serving."""
    code = str(error.get("code") if isinstance(error, dict) else None)
    return int(code) if code.isascii() and code.isdecimal() and len(code) == 3 else 500


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that `Retry-After` asks for, given as such or as a date; 0 without one."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
