"""An answer of an OpenAI-compatible chat endpoint, whole or streamed, as a `Completion`.

What was lost on the way is an error and never guessed: a stream without its end, token counts that did not come,
log-probabilities of texts instead of tokens.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distill.reasoning import CLOSE, OPEN
from distill.records import Completion
from teachers.backend import failed
from teachers.engines.server_wire import Refused, Trouble, Unsuitable, fault_of, status_in

if TYPE_CHECKING:
    from distill.signals import TokenSignal

STOPS = {"stop": "stop", "eos": "stop", "end_turn": "stop", "length": "length", "repetition": "loop"}
TOKEN_ID = re.compile(r"token_id:(\d+)")
NO_LOGPROB = -9999.0  # what vLLM sends for minus infinity, which JSON does not have


@dataclass(slots=True)
class Answer:
    """An answer as it comes in, whole or in pieces. `size` is how many outcomes to keep at each position; 0: none."""

    size: int = 0
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    num_completion_tokens: int | None = None
    prompt_text: str | None = None  # as the server rendered it, where it says
    _reasoning: list[str] = field(default_factory=list)
    _content: list[str] = field(default_factory=list)
    # Flat, because a long completion has hundreds of thousands of these numbers and many are in flight.
    _token_ids: array[int] = field(default_factory=lambda: array("i"))
    _token_logprobs: array[float] = field(default_factory=lambda: array("f"))
    _ids: array[int] = field(default_factory=lambda: array("i"))
    _logprobs: array[float] = field(default_factory=lambda: array("f"))

    def add(self, data: bytes) -> None:
        """Take in a JSON object: a whole answer, or a piece of a stream.

        Raises:
            Trouble: it is no such object, or it is the server's error.
            Refused, Denied: it is the server's error.
            Unsuitable: log-probabilities without token ids.
        """
        try:
            piece = json.loads(data)
            if error := piece.get("error"):
                raise fault_of(status_in(error), data)
            self._take(piece)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise Trouble(f"the answer is not in the OpenAI format ({type(error).__name__}: {error})") from None

    def _take(self, piece: Mapping[str, Any]) -> None:
        self.prompt_text = piece.get("prompt_text") or self.prompt_text
        if usage := piece.get("usage"):
            self.num_prompt_tokens = int(usage["prompt_tokens"])
            self.num_completion_tokens = int(usage["completion_tokens"])
        for choice in piece.get("choices") or ():
            said = choice.get("delta") or choice.get("message") or {}
            # vLLM renamed `reasoning_content` to `reasoning`; some servers send both, with the same text.
            for parts, text in (
                (self._reasoning, said.get("reasoning") or said.get("reasoning_content")),
                (self._content, said.get("content")),
            ):
                if not isinstance(text, str | None):
                    raise Refused(f"the server's text is a {type(text).__name__}, not a string")
                parts.append(text or "")
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if self.size:
                for position in (choice.get("logprobs") or {}).get("content") or ():
                    self._note(position)

    def _note(self, position: Mapping[str, Any]) -> None:
        self._token_ids.append(_token_id(position))
        self._token_logprobs.append(_logprob(position))
        outcomes = [(_logprob(outcome), _token_id(outcome)) for outcome in position["top_logprobs"]]
        likeliest = sorted((-logprob, token) for logprob, token in outcomes if logprob > -math.inf)[: self.size]
        missing = self.size - len(likeliest)
        self._ids.extend([token for _, token in likeliest] + [-1] * missing)
        self._logprobs.extend([-surprise for surprise, _ in likeliest] + [-math.inf] * missing)

    def completion(self, limit: int | None) -> Completion:
        """Return the finished answer, or why there is none, as a completion.

        Args:
            limit: the most tokens that were asked for.

        Raises:
            Trouble: the answer is not whole.
            Unsuitable: no token counts, or no log-probabilities where they were asked for.
        """
        if self.finish_reason is None:
            raise Trouble("the answer broke off (no finish_reason)")
        if self.finish_reason in ("abort", "error"):
            raise Trouble(f"the server gave up on it (finish_reason {self.finish_reason})")
        if self.finish_reason not in STOPS:
            return failed(f"finish_reason {self.finish_reason!r}", self.num_prompt_tokens or 0)
        if self.num_prompt_tokens is None or self.num_completion_tokens is None:
            # Pieces of a stream are not tokens, and no tokenizer is here to count them: a guess would enter the ledger.
            raise Unsuitable("the server does not say how many tokens its answers have (usage)")
        prompt, drawn = self.num_prompt_tokens, self.num_completion_tokens
        if limit is not None and drawn > limit:
            return failed(f"the server ignores the limit: {drawn} tokens of {limit} (see limit_field)", prompt)
        if limit is not None and self.finish_reason == "length" and drawn < limit:
            # vLLM lowers a limit that the context does not hold, without a word; the other backends refuse it.
            why = f"the prompt has {prompt} tokens, the context {prompt + drawn}: {limit} more were asked for"
            return failed(why, prompt)
        if self.size and not self._token_ids and drawn:
            raise Unsuitable("the server sends no log-probabilities")
        if self.size and len(self._token_ids) != drawn:
            return failed(f"log-probabilities of {len(self._token_ids)} tokens came for {drawn}", prompt)
        try:
            numbers = self._signal() if self.size else None
        except ValueError as error:
            return failed(f"the server's log-probabilities are {error}", prompt)
        return Completion(
            text=join_reasoning("".join(self._reasoning), "".join(self._content), self._opened()),
            finish_reason=STOPS[self.finish_reason],
            num_prompt_tokens=prompt,
            num_completion_tokens=drawn,
            signal=numbers,
        )

    def _opened(self) -> str | None:
        """Return the reasoning tag that the template opened, None where the server does not show the prompt."""
        from distill.render import OPENED

        if self.prompt_text is None:
            return None
        opened = OPENED.search(self.prompt_text)
        return opened.group() if opened else ""

    def _signal(self) -> TokenSignal:
        import numpy as np

        from distill.signals import TokenSignal

        return TokenSignal(
            token_ids=np.array(self._token_ids, np.int32),
            token_logprobs=np.array(self._token_logprobs, np.float32),
            ids=np.array(self._ids, np.int32).reshape(-1, self.size),
            logprobs=np.array(self._logprobs, np.float32).reshape(-1, self.size),
            counts=None,
        )


def join_reasoning(reasoning: str, content: str, opened: str | None) -> str:
    """Return the text as the model wrote it, from what the server made of it.

    Reasoning without an answer is left open: nobody saw it end.

    Args:
        opened: what the template had opened, "" for nothing. None where the server does not show its prompt: then a
            closing tag without an opening one tells as much, and white space around the tags, which such servers often
            strip, is put back as reasoning models write it.
    """
    if reasoning:
        reasoning = reasoning.removeprefix(OPEN)  # vLLM's older parsers leave it in, in a piece of several tokens
        if opened is not None:
            text = (opened if opened and CLOSE not in opened else OPEN) + reasoning
            return text + CLOSE + content if content else text
        text = OPEN + ("" if reasoning.startswith("\n") else "\n") + reasoning
        if not content:
            return text
        return text + ("" if text.endswith("\n") else "\n") + CLOSE + ("" if content[0] == "\n" else "\n\n") + content
    if opened is None:
        before, closed, _ = content.partition(CLOSE)
        opened = OPEN + ("" if content.startswith("\n") else "\n") if closed and OPEN not in before else ""
    return opened + content


def _token_id(outcome: Mapping[str, Any]) -> int:
    found = TOKEN_ID.fullmatch(outcome["token"])
    if not found:
        raise Unsuitable("this server gives texts, not token ids, with its log-probabilities: vLLM gives ids")
    return int(found.group(1))


def _logprob(outcome: Mapping[str, Any]) -> float:
    value = float(outcome["logprob"])
    return value if value > NO_LOGPROB else -math.inf
