"""Training data on disk to `Example`s: what `distill train --data` accepts.

A trace store's folder (its `kept.jsonl`), or a .jsonl file whose lines carry `messages` ending in the assistant's turn,
or `prompt` and `completion` as strings or as message lists, with the meaning TRL gives them. A bad line is refused by
its number; overlong sequences are counted and refused, dropped or cut as told.

Where a teacher's stored numbers are learnt, examples hold the very tokens that these speak of, and a trace without such
numbers is counted and refused or dropped as told. The numbers themselves are `distill.signal_data`. Where the teacher
has another tokenizer, an alignment gives every example the teacher's tokens (`Example.other`); no torch here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill.errors import UserError
from distill.progress import Meter
from distill.records import Message
from distill.render import Example, Other, answer_only, render, render_plain, render_sampled
from distill.store import read_lines

if TYPE_CHECKING:
    from distill.alignment import Alignment
    from distill.signal_data import SignalData

ACCEPTED = "'messages' (the assistant's turn last), or 'prompt' and 'completion'"


@dataclass(frozen=True, slots=True)
class Dataset:
    """Tokenised sequences, and how many are not what the file says.

    Attributes:
        dropped: left out for their length.
        cut: shortened to the most tokens allowed: they lost their end, and are not taught to stop there.
        unmatched: left out because no stored numbers speak of their tokens.
        unaligned: left out because the teacher's tokenizer reads other text in their place.
        in_part: kept, though the teacher says nothing of some of their trained tokens.
    """

    examples: list[Example]
    dropped: int = 0
    cut: int = 0
    unmatched: int = 0
    unaligned: int = 0
    in_part: int = 0

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
    overlong: Literal["refuse", "drop", "cut"] = "refuse",
    target: Literal["trace", "answer"] = "trace",
    limit: int | None = None,
    stop_ids: Collection[int] | None = None,
    signals: SignalData | None = None,
    unmatched: Literal["refuse", "drop"] = "refuse",
    alignment: Alignment | None = None,
    teacher_length: int | None = None,
) -> Dataset:
    """Read and tokenise the training rows.

    Args:
        max_length: most tokens of a sequence; None for any.
        overlong: what happens to a longer one. "cut" keeps its beginning, untrained to stop; one whose prompt alone
            fills the length has nothing to keep and is dropped.
        target: train the whole completion, or only its final answer.
        limit: use only the first rows.
        stop_ids: token ids that end generation, beside the tokenizer's eos.
        signals: what a teacher said of the traces' tokens: the examples then hold these tokens, and name the trace.
        unmatched: what happens to a trace that has no numbers there, or numbers of other tokens; and to one that the
            teacher's tokenizer changes.
        alignment: gives the examples the tokens of a teacher with another tokenizer; `signals` are then of those.
        teacher_length: most of these tokens; a sequence with more is overlong, too.

    Raises:
        UserError: a malformed line or row (named by number), no row at all, sequences that are too long, traces
            without numbers, or numbers asked for a target other than the trace.
    """
    path = data_file(data)
    if signals is not None and target != "trace":
        raise UserError(f"--target {target} cannot be learnt from stored numbers: they speak of the whole trace")
    rows = _Rows(path, tokenizer, max_length, overlong, target, stop_ids, signals, unmatched, alignment, teacher_length)
    with path.open("rb") as stream:
        total = sum(1 for _ in stream)
    with Meter("tokenise", total if limit is None else min(limit, total)) as meter:
        for number, row in _first(read_lines(path), limit):
            try:
                rows.take(number, row)
            except UserError as error:
                raise UserError(f"{path} line {number}: {error}") from error
            meter.advance()
    rows.check()
    unmatched_rows = len(rows.unscored) + len(rows.mismatched)
    in_part = sum(example.other is not None and _is_partial(example, example.other) for example in rows.examples)
    return Dataset(rows.examples, len(rows.too_long), rows.cut, unmatched_rows, len(rows.unaligned), in_part)


@dataclass(slots=True)
class _Rows:
    """What became of the rows read so far; lines are kept by number."""

    path: Path
    tokenizer: Any
    max_length: int | None
    overlong: str
    target: str
    stop_ids: Collection[int] | None
    signals: SignalData | None
    unmatched: str
    alignment: Alignment | None
    teacher_length: int | None
    examples: list[Example] = field(default_factory=list)
    too_long: list[tuple[int, int, int]] = field(default_factory=list)  # line, tokens, most allowed
    cut: int = 0
    unscored: list[int] = field(default_factory=list)  # no numbers
    mismatched: list[int] = field(default_factory=list)  # numbers of other tokens
    unaligned: list[int] = field(default_factory=list)  # other text for the teacher

    def take(self, number: int, row: Mapping[str, Any]) -> None:
        """Tokenise a row and put it where it belongs."""
        if self.alignment is not None:
            example = self._paired(number, row, self.alignment)
        else:
            example = self._sampled(number, row) if self.signals is not None else self._rendered(row)
        if example is None:
            return
        other, limit = example.other, self.teacher_length
        lengths = [(len(example), example.begin, self.max_length)]
        if other is not None:
            lengths.append((len(other.input_ids), other.begin, limit))
        above = [(length, begin, most) for length, begin, most in lengths if most is not None and length > most]
        if above and (self.overlong != "cut" or any(begin >= most for _, begin, most in above)):
            self.too_long.append((number, above[0][0], above[0][2]))
            return
        if above:
            kept = slice(self.max_length)
            other = None if other is None else other.cut(student=self.max_length, teacher=limit)
            example = replace(
                example, input_ids=example.input_ids[kept].copy(), weights=example.weights[kept].copy(), other=other
            )
            self.cut += 1
        self.examples.append(example)

    def _paired(self, number: int, row: Mapping[str, Any], alignment: Alignment) -> Example | None:
        sampled = None
        if self.signals is not None:
            sampled = self.signals.tokens(_uid(row))
            if sampled is None:
                self.unscored.append(number)
                return None
        example = alignment.pair(self._rendered(row), conversation(row), sampled=sampled)
        if example is None:
            (self.unaligned if sampled is None else self.mismatched).append(number)
            return None
        return example if sampled is None else replace(example, uid=_uid(row))

    def _rendered(self, row: Mapping[str, Any]) -> Example:
        found = conversation(row)
        text = found[1] if isinstance(found, tuple) else found[-1]["content"]
        if self.target == "answer":
            text = answer_only(text, predicted=row.get("predicted"), gold=row.get("gold"))
        if isinstance(found, tuple):
            return render_plain(self.tokenizer, found[0], text)
        ended = self.target == "answer" or _ended(row)
        messages = [*found[:-1], {**found[-1], "content": text}]
        return render(self.tokenizer, messages, stop_ids=self.stop_ids, ended=ended)

    def _sampled(self, number: int, row: Mapping[str, Any]) -> Example | None:
        assert self.signals is not None
        uid, messages = _uid(row), conversation(row)
        assert not isinstance(messages, tuple)
        sampled = self.signals.tokens(uid)
        if sampled is None:
            self.unscored.append(number)
            return None
        example = render_sampled(self.tokenizer, messages, sampled, uid=uid, stop_ids=self.stop_ids, ended=_ended(row))
        if example is None:
            self.mismatched.append(number)
        return example

    def check(self) -> None:
        """Stop where there are rows that must not be left out, or none are left."""
        left_out = len(self.too_long) + len(self.unscored) + len(self.mismatched) + len(self.unaligned)
        if not self.examples and not left_out:
            raise UserError(f"{self.path} holds no training rows")
        if self.too_long and (self.overlong == "refuse" or not self.examples):
            raise UserError(self._too_long(len(self.examples) + left_out))
        if (self.unscored or self.mismatched) and (self.unmatched == "refuse" or not self.examples):
            raise UserError(self._unmatched(len(self.examples) + left_out))
        if self.unaligned and (self.unmatched == "refuse" or not self.examples):
            raise UserError(self._unaligned(len(self.examples) + left_out))

    def _too_long(self, total: int) -> str:
        longest = max(length for _, length, _ in self.too_long)
        first, _, most = self.too_long[0]
        otherwise = ", leave them out with --overlong drop or shorten them with --overlong cut"
        return (
            f"{self.path}: {len(self.too_long)} of {total} sequences are longer than {most} tokens "
            f"(the longest has {longest}; the first is line {first}): raise --max-length"
            + (otherwise if self.examples else "")
        )

    def _unmatched(self, total: int) -> str:
        assert self.signals is not None
        otherwise = ", or leave them out with --unmatched drop" if self.examples else ""
        if self.unscored:
            return (
                f"{self.path}: {len(self.unscored)} of {total} traces have no numbers in {self.signals.folder} (the "
                f"first is line {self.unscored[0]}): make them with distill score{otherwise}"
            )
        return (
            f"{self.path}: for {len(self.mismatched)} of {total} traces the numbers in {self.signals.folder} speak of "
            f"other tokens than the student would be trained on (the first is line {self.mismatched[0]}): give it the "
            f"teacher's chat template, or make the numbers anew with distill score{otherwise}"
        )

    def _unaligned(self, total: int) -> str:
        otherwise = ": leave them out with --unmatched drop" if self.examples else ""
        return (
            f"{self.path}: for {len(self.unaligned)} of {total} rows the teacher's tokenizer does not read the bytes "
            f"that the student writes, because it normalises or lacks some (the first is line {self.unaligned[0]})"
            + otherwise
        )


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


def _uid(row: Mapping[str, Any]) -> str:
    uid = row.get("uid")
    if not isinstance(uid, str) or isinstance(conversation(row), tuple):
        raise UserError("stored numbers belong to a store's traces, which have a 'uid' and 'messages'")
    return uid


def _is_partial(example: Example, other: Other) -> bool:
    """Whether some trained tokens of an example are in no span."""
    return int((example.weights > 0).sum()) > int((other.spans[:, 1] - other.spans[:, 0]).sum())


def _ended(row: Mapping[str, Any]) -> bool:
    """Whether a trace came to its own end; rows of other makers say nothing of it and are whole."""
    return row.get("finish_reason") not in ("length", "loop")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _first(rows: Iterable[tuple[int, dict[str, Any]]], limit: int | None) -> Iterable[tuple[int, dict[str, Any]]]:
    for count, item in enumerate(rows):
        if limit is not None and count >= limit:
            return
        yield item
