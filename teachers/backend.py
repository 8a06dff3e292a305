"""What every backend takes and gives: `Request` in, `Completion` out, in order of completion.

A backend is a class with `provides` (what it can hand over besides text), `generate` and `close`. It pulls requests
from an iterator, so that new work can be decided while it runs, and keeps as many in flight as it likes. One failed
request becomes a `Completion` with `error` set; only a dead engine raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from distill.errors import UserError
from distill.records import Completion, Prompt
from distill.tables import suggest


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sample to draw: which prompt, the how-manieth of it, and its own seed."""

    uid: str
    prompt: Prompt
    sample_index: int
    seed: int


class Backend(Protocol):
    """A program that runs one model."""

    name: str
    provides: frozenset[str]  # of {"text", "logits", "top_logprobs", "hidden_states"}
    description: str  # one line for the user: device, type, how many in flight
    config: Any  # the model's transformers config, for the FLOPs of the ledger

    def generate(
        self, requests: Iterable[Request], sampling: Mapping[str, Any]
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield every request once with its completion, in order of completion.

        Args:
            requests: pulled lazily.
            sampling: `temperature`, `top_p`, `max_completion_length` (None: what the context leaves).
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


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of generated ids without special tokens, unless the reasoning tags themselves are special."""
    keep_special = {"<think>", "</think>"} & set(tokenizer.all_special_tokens)
    return str(tokenizer.decode(ids, skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False))


def engine_options(pairs: Iterable[str], known: Iterable[str] | None = None) -> dict[str, Any]:
    """Parse `key=value` arguments; values are read as YAML, so `true`, `8` and `0.9` keep their kinds.

    Raises:
        UserError: no `=` in one, or a key outside `known`.
    """
    import yaml

    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UserError(f"--engine-arg takes key=value, not {pair!r}")
        if known is not None and key not in known:
            raise UserError(
                f"--engine-arg {key!r} is unknown here: allowed are {', '.join(known)}{suggest(key, known)}"
            )
        options[key] = yaml.safe_load(value) if value else value
    return options
