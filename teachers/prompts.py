"""Where prompts come from: files, hub datasets and the built-in problems, each row checked before any teacher time.

A row needs a question (`prompt`, `question`, `problem` or `messages`) and, for verified traces, a gold answer
(`answer`, `gold` or `solution`). Rows that lack one are refused by number, or skipped and counted when asked to.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.records import Message, Prompt
from distill.tables import suggest
from teachers import nano

QUESTION_COLUMNS = ("messages", "prompt", "question", "problem")
GOLD_COLUMNS = ("answer", "gold", "solution")
NANO_DEFAULT_SIZE = 1000  # the stream of built-in problems has no end; --limit asks for any number


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: where it stands and why."""

    source: str
    reason: str


def read_prompts(
    source: str, *, limit: int | None = None, split: str = "train", system_prompt: str | None = None
) -> tuple[list[Prompt], list[BadRow]]:
    """Read a SRC into prompts, in order, each question once.

    Args:
        source: a file, `hf:NAME[:CONFIG[:SPLIT]]` or `nano[:LEVEL]`.
        limit: use only the first `limit` rows.
        split: which built-in problems `nano` means, "train" or "heldout".
        system_prompt: put before every question that brings no system message of its own.

    Returns:
        The prompts, and the rows that could not be used (no question, not an object). A missing gold is no fault
        here: `Prompt.gold` is None then.

    Raises:
        UserError: the source does not exist, is empty, is not of a known kind, or is damaged as a whole.
    """
    if source == "nano" or source.startswith("nano:"):
        levels = nano.parse_levels(source.partition(":")[2])
        prompts = list(nano.problems(levels=levels, split=split, limit=limit or NANO_DEFAULT_SIZE))
        bad: list[BadRow] = []
    else:
        prompts, bad = _parse(_rows(source), limit)
        if not prompts and not bad:
            raise UserError(f"{source} is empty: it has no rows")
    if system_prompt is not None:
        prompts = [_with_system(prompt, system_prompt) for prompt in prompts]
    return prompts, bad


def _parse(rows: Iterable[tuple[str, Any]], limit: int | None) -> tuple[list[Prompt], list[BadRow]]:
    prompts: list[Prompt] = []
    bad: list[BadRow] = []
    for number, (where, row) in enumerate(rows):
        if limit is not None and number >= limit:
            break
        try:
            prompts.append(prompt_of(row, where))
        except ValueError as error:
            bad.append(BadRow(where, str(error)))
    return prompts, bad


def prompt_of(row: Any, source: str) -> Prompt:
    """Turn one row into a prompt.

    Raises:
        ValueError: the row is not an object, has no question, its messages are malformed, or it holds what is no text.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError(f"the row must be an object, not {type(row).__name__}")
    meta = {key: _plain(row[key]) for key in ("level", "difficulty", "type", "subject") if key in row}
    prompt = Prompt(messages=question_of(row), gold=gold_of(row), source=source, meta=meta)
    try:
        json.dumps([prompt.messages, prompt.gold, meta], ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:  # no tokenizer takes it, and no reader of kept.jsonl
        raise ValueError("it holds a lone surrogate (half a character)") from error
    return prompt


def _plain(value: Any) -> Any:
    """Return what JSON can hold as it is, and the text of anything else (a date in a Parquet file, NaN)."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value


def question_of(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the messages that ask the row's question; an assistant turn at the end is the answer, and left out.

    Raises:
        ValueError: no question.
    """
    for column in QUESTION_COLUMNS:
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            return ({"role": "user", "content": value},)
        if isinstance(value, list) and value:
            return _messages(value, column)
    if isinstance(row.get("Body"), str) and isinstance(row.get("Question"), str):  # SVAMP
        return ({"role": "user", "content": f"{row['Body'].strip()} {row['Question'].strip()}"},)
    near = next((hint for key in row if (hint := suggest(str(key), QUESTION_COLUMNS))), "")
    raise ValueError(f"no question: needs a non-empty {', '.join(QUESTION_COLUMNS)}; it has {_listed(row)}{near}")


def _messages(turns: list[Any], column: str) -> tuple[Message, ...]:
    messages: list[Message] = []
    for turn in turns:
        if not (
            isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        ):
            raise ValueError(f"{column} must be a list of {{role, content}} texts")
        messages.append({"role": turn["role"], "content": turn["content"]})
    if messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{column} must end with a user turn (before the assistant's, if there is one)")
    if not messages[-1]["content"].strip():
        raise ValueError(f"{column}: the user's last turn is empty")
    return tuple(messages)


def gold_of(row: Mapping[str, Any]) -> str | None:
    """Return the row's gold answer, or None; GSM8K's `#### 42` and the last `\\boxed{...}` are taken out of a text."""
    for column in (*GOLD_COLUMNS, "Answer"):
        value = row.get(column)
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, int) or (isinstance(value, (float, Decimal)) and math.isfinite(value)):
            return _decimal(value)
        if isinstance(value, str) and value.strip():
            return final_answer(value)
    return None


def _decimal(value: int | float | Decimal) -> str:
    """Return a number's digits without an exponent, which the verifiers would read as a product with e."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{Decimal(repr(value)):f}"
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def final_answer(text: str) -> str:
    """Return the final answer written in a worked solution; a text without any mark is the answer itself.

    A box after the last `####` beats it: then that was a heading.
    """
    marked = list(re.finditer(r"####[ \t]*(\S[^\n]*)", text))
    boxed = last_boxed(text[marked[-1].start() :] if marked else text)
    if marked and not boxed:
        answer = marked[-1][1].strip()
        grouped = re.fullmatch(r"[^\d(\[{]*\d{1,3}(,\d{3})+(\.\d+)?[^\d,]*", answer)  # 1,234 and not (1,234)
        return answer.replace(",", "") if grouped else answer
    return boxed or text.strip()


def last_boxed(text: str) -> str | None:
    """Return the content of the last closed `\\boxed{...}` with balanced braces, or None; `\\{` is no brace."""
    opened: list[int] = []  # where the content of each open brace begins; negative: no box
    last = (0, 0)
    for token in re.finditer(r"\\boxed\{|\\.|[{}]", text, re.DOTALL):
        if token[0] in ("{", "\\boxed{"):
            opened.append(token.end() if len(token[0]) > 1 else -1)
        elif token[0] == "}" and opened:
            last = max(last, (opened.pop(), token.start()))
    return text[slice(*last)].strip() if last[0] else None


def _with_system(prompt: Prompt, system_prompt: str) -> Prompt:
    if prompt.messages[0]["role"] == "system":
        return prompt
    return replace(prompt, messages=({"role": "system", "content": system_prompt}, *prompt.messages))


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(str(key)) for key in list(row)[:8]) or "no columns"


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    if source.startswith("hf:"):
        return _hub_rows(source)
    path = Path(source)
    kind = path.suffix.lower()
    if not path.is_file():
        known = ", ".join(READERS)
        what = "is a folder" if path.is_dir() else "does not exist"
        hint = suggest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UserError(
            f"prompts {source!r} {what}{hint}; give a {known} file, hf:NAME[:CONFIG[:SPLIT]] or nano[:LEVEL]"
        )
    if kind not in READERS:
        raise UserError(f"cannot read prompts from {source!r}: known file types are {', '.join(READERS)}")
    return READERS[kind](path)


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if not raw.strip():
                continue
            try:
                yield f"{path.name}:{number}", json.loads(raw)
            except (ValueError, RecursionError) as error:
                yield f"{path.name}:{number}", ValueError(f"not JSON: {error}")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        loaded = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if isinstance(loaded, Mapping):  # {"data": [...]} and the like: the one list inside
        lists = [value for value in loaded.values() if isinstance(value, list)]
        loaded = lists[0] if len(lists) == 1 else loaded
    if not isinstance(loaded, list):
        raise UserError(f"{path} must hold a list of rows")
    return ((f"{path.name}:{number}", row) for number, row in enumerate(loaded, 1))


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            for row in reader:
                yield f"{path.name}:{reader.line_num}", {key: value for key, value in row.items() if key is not None}
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a UTF-8 CSV file: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}:{number}", row
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a Parquet file: {' '.join(str(error).split())}") from error


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    name, _, rest = source.removeprefix("hf:").partition(":")
    config, _, split = rest.partition(":")
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the hub's client raises dozens of kinds; each means: this source cannot be had
        raise UserError(f"cannot load the hub dataset {source!r}: {' '.join(str(error).split())[:300]}") from error
    return ((f"{name}:{number}", row) for number, row in enumerate(rows, 1))


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def require(prompts: list[Prompt], bad: list[BadRow], *, gold: bool, skip: bool) -> list[Prompt]:
    """Return the prompts that can be used, or refuse: each question once, with a gold where one is needed.

    Args:
        gold: a gold answer is needed (the verifier compares with it).
        skip: leave the unusable rows out instead of refusing; the caller has shown them.

    Raises:
        UserError: unusable rows and not `skip`, or nothing left.
    """
    if gold:
        bad = bad + [
            BadRow(p.source, "no gold answer: needs answer, gold or solution") for p in prompts if p.gold is None
        ]
        prompts = [p for p in prompts if p.gold is not None]
    if bad and not skip:
        more = f" (and {len(bad) - 3} more rows)" if len(bad) > 3 else ""
        listed = "; ".join(f"{row.source}: {row.reason}" for row in bad[:3])
        gold_hint = " or --keep any --verifier none" if any("no gold" in row.reason for row in bad) else ""
        raise UserError(f"{listed}{more}. Mend them, or leave them out with --skip-bad-rows{gold_hint}")
    if not prompts:
        raise UserError(
            f"no usable prompt: all {len(bad)} rows are unusable, the first is {bad[0].source}: {bad[0].reason}"
        )
    seen: dict[str, Prompt] = {}
    for prompt in prompts:
        seen.setdefault(prompt.uid, prompt)
    return list(seen.values())
