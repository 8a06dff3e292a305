"""Training data on disk to `Example`s: what `distill train --data` accepts.

A trace store's folder (its `kept.jsonl`), or a .jsonl file whose lines carry `messages` ending in the assistant's turn,
or `prompt` and `completion` as strings or as message lists, with the meaning TRL gives them. A bad line is refused by
its number; overlong sequences are counted and refused or dropped as told, never cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distill.errors import UserError
from distill.progress import Meter
from distill.records import Message
from distill.render import Example, answer_only, render, render_plain
from distill.store import read_lines

ACCEPTED = "'messages' (the assistant's turn last), or 'prompt' and 'completion'"


@dataclass(frozen=True, slots=True)
class Dataset:
    """Tokenised sequences, and `dropped`: how many were left out for their length."""

    examples: list[Example]
    dropped: int

    @property
    def trained_share(self) -> float:
        """The share of all tokens that are trained on."""
        trained = sum(int((example.weights > 0).sum()) for example in self.examples)
        return trained / sum(len(example) for example in self.examples)


def data_file(data: Path) -> Path:
    """Return the file that holds the training rows: a store's `kept.jsonl`, or `data` itself.

    Raises:
        UserError: it does not exist.
    """
    path = data / "kept.jsonl" if data.is_dir() else data
    if not path.is_file():
        what = (
            f"the folder {data} has no kept.jsonl: it is not a trace store"
            if data.is_dir()
            else f"no such file: {data}"
        )
        raise UserError(f"--data: {what}")
    return path


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_examples(
    data: Path,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    overlong: Literal["refuse", "drop"] = "refuse",
    target: Literal["trace", "answer"] = "trace",
    limit: int | None = None,
    stop_ids: Collection[int] | None = None,
) -> Dataset:
    """Read and tokenise the training rows.

    Args:
        max_length: most tokens of a sequence; None for any.
        overlong: what happens to a longer one.
        target: train the whole completion, or only its final answer.
        limit: use only the first rows.
        stop_ids: token ids that end generation, beside the tokenizer's eos.

    Raises:
        UserError: a malformed line or row (named by number), no row at all, or sequences that are too long.
    """
    path = data_file(data)
    examples: list[Example] = []
    too_long: list[tuple[int, int]] = []  # line number, tokens
    with path.open("rb") as stream:
        total = sum(1 for _ in stream)
    with Meter("tokenise", total if limit is None else min(limit, total)) as meter:
        for number, row in _first(read_lines(path), limit):
            try:
                example = _example(row, tokenizer, target, stop_ids)
            except UserError as error:
                raise UserError(f"{path} line {number}: {error}") from error
            if max_length is not None and len(example) > max_length:
                too_long.append((number, len(example)))
            else:
                examples.append(example)
            meter.advance()
    if not examples and not too_long:
        raise UserError(f"{path} holds no training rows")
    if too_long and (overlong == "refuse" or not examples):
        longest = max(length for _, length in too_long)
        raise UserError(
            f"{path}: {len(too_long)} of {len(examples) + len(too_long)} sequences are longer than {max_length} tokens "
            f"(the longest has {longest}; the first is line {too_long[0][0]}): raise --max-length"
            + (", or leave them out with --overlong drop" if examples else "")
        )
    return Dataset(examples, len(too_long))


def conversation(row: Mapping[str, Any]) -> list[Message] | tuple[str, str]:
    """Return a row's messages, the assistant's turn last, or a (prompt, completion) pair of plain strings.

    Raises:
        UserError: the columns are missing or hold something else; they are named.
    """
    prompt = row.get("messages", row.get("prompt"))
    completion = row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str) and "messages" not in row:
        return prompt, completion
    if prompt is None:
        columns = ", ".join(row) or "none"
        raise UserError(f"needs the columns {ACCEPTED}; it has: {columns}")
    is_text = isinstance(prompt, str) and "messages" not in row
    messages = [{"role": "user", "content": prompt}] if is_text else prompt
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    messages = [*messages, *(completion or [])] if isinstance(messages, list) else messages
    name = "messages" if "messages" in row else "prompt and completion"
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise UserError(f'{name} must be a list of {{"role": ..., "content": text}}')
    if not messages or messages[-1]["role"] != "assistant":
        missing = "" if completion or "messages" in row else "; the column 'completion' is missing"
        raise UserError(f"{name} must end with the assistant's turn{missing}")
    return messages


def _example(row: Mapping[str, Any], tokenizer: Any, target: str, stop_ids: Collection[int] | None) -> Example:
    found = conversation(row)
    text = found[1] if isinstance(found, tuple) else found[-1]["content"]
    if target == "answer":
        text = answer_only(text, predicted=row.get("predicted"), gold=row.get("gold"))
    if isinstance(found, tuple):
        return render_plain(tokenizer, found[0], text)
    return render(tokenizer, [*found[:-1], {**found[-1], "content": text}], stop_ids=stop_ids)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _first(rows: Iterable[tuple[int, dict[str, Any]]], limit: int | None) -> Iterable[tuple[int, dict[str, Any]]]:
    for count, item in enumerate(rows):
        if limit is not None and count >= limit:
            return
        yield item
