"""What every backend takes and gives: `Request` in, `Completion` out, in order of completion.

A backend is a class with `provides` (what it can do besides text), `generate` and `close`. It pulls requests from an
iterator, so that new work can be decided while it runs, and keeps as many in flight as it likes. One failed request
becomes a `Completion` with `error` set; only a dead engine raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from distill.config import key_values
from distill.records import Completion, Prompt

if TYPE_CHECKING:
    from distill.signals import SignalSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sample to draw: which prompt, the how-manieth of it, and its own seed."""

    uid: str
    prompt: Prompt
    sample_index: int
    seed: int


# What a backend may provide -> the option that asks for it.
FEATURES = {
    "text": "",
    "top_logprobs": "--top-logprobs",
    "sample_logprobs": "--sample-logprobs",
    "score": "distill score",
    "thinking_budget": "--thinking-budget",
    "loop_stop": "--loop-stop",
    "feed": "",  # takes new requests while others run; without it, between batches
}


class Backend(Protocol):
    """A program that runs one model.

    A class may also have `identify(model, **options) -> (name, identity)`, where its model is not a folder or hub id
    whose files say who it is; and, with "score" in `provides`, `score(items, signal)`, which yields (uid, TokenSignal)
    for (uid, prompt ids, completion ids) of texts that exist.
    """

    name: str
    provides: frozenset[str]  # of `FEATURES`; an attribute of the class, so that it can be asked before a start
    description: str  # one line for the user: device, type, how many in flight
    config: Any  # the model's transformers config, for the FLOPs of the ledger; None where it is not known

    def generate(
        self, requests: Iterable[Request | None], sampling: Mapping[str, Any], *, signal: SignalSpec | None = None
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield every request once with its completion, in order of completion.

        Args:
            requests: pulled lazily. A None says: nothing to send now, perhaps when some of what you hold is answered.
                It never comes while the engine holds nothing.
            sampling: `temperature`, `top_p`, `max_completion_length` (None: what the context leaves), and where asked
                for `thinking_budget` (tokens) and `loop_stop` ([size, count]: end a completion once a pattern of at
                most `size` tokens came `count` times in a row).
            signal: the log-probabilities to put into `Completion.signal`.
        """
        ...

    def close(self) -> None:
        """Free the engine."""
        ...


def failed(reason: str, num_prompt_tokens: int = 0) -> Completion:
    """Return the completion of a request that could not be served."""
    return Completion(
        text="", finish_reason="error", num_prompt_tokens=num_prompt_tokens, num_completion_tokens=0, error=reason
    )


def room(num_prompt_tokens: int, context: int | None, limit: int | None) -> int | None:
    """Return how many tokens may be generated, None when nothing bounds them.

    Raises:
        ValueError: the prompt alone fills the context, or does not leave what was asked for.
    """
    if context is None:
        return limit
    left = context - num_prompt_tokens
    if left < (limit or 1):
        asked = f"{limit} more were asked for" if limit else "none is left to answer"
        raise ValueError(f"the prompt has {num_prompt_tokens} tokens, the context {context}: {asked}")
    return limit or left


def engine_options(pairs: Iterable[str], known: Iterable[str] | None = None) -> dict[str, Any]:
    """Parse `--engine-arg key=value` arguments; see `distill.config.key_values`."""
    return key_values(pairs, "--engine-arg", known)
