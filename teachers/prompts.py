"""Where prompts come from: files, hub datasets and problems made here, each row checked before any teacher time.

A row needs a question (`prompt`, `question`, `problem` or `messages`) and, for verified traces, a gold answer
(`answer`, `gold` or `solution`), or tests (teachers/row_meta.py). Rows that lack one are refused by number, or skipped
and counted when asked to.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from distill.errors import UserError
from distill.records import Message, Prompt
from distill.tables import suggest
from teachers import nano
from teachers.exams.catalogue import EXAMS, exam_of, exam_rows
from teachers.gym_prompts import gym_prompts
from teachers.prompt_readers import read_rows
from teachers.row_meta import choice_gold, choices_of, tests_of, with_choices, with_tests
from teachers.verifiers.gold import missing, verifier_name

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
        source: a file, `hf:NAME[:CONFIG[:SPLIT]]`, an exam of `teachers.exams.catalogue` (`gsm8k`, `svamp:FILE`),
            `reasoning-gym:TASK[?k=v&k=v]` or `nano[:LEVEL]`.
        limit: use only the first `limit` rows.
        split: "train" or "heldout", where a source knows both: problems that are made here, and exams on the hub.
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
    elif source.startswith("reasoning-gym:"):
        prompts, bad = list(gym_prompts(source.removeprefix("reasoning-gym:"), split=split, limit=limit)), []
    else:
        exam = exam_of(source)
        prompts, bad = _parse(exam_rows(source, split) if exam else read_rows(source, names=EXAMS), limit)
        if not prompts and not bad:
            raise UserError(f"{source} is empty: it has no rows")
        if exam:
            fits = [verifier_name("auto", [prompt]) == exam.verifier for prompt in prompts]
            why = f"the verifier {exam.verifier} has nothing to judge it by"
            bad += [BadRow(prompt.source, why) for prompt, fit in zip(prompts, fits, strict=True) if not fit]
            prompts = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
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
    choices, tests = choices_of(row), tests_of(row)
    meta |= {key: value for key, value in (("choices", choices), ("tests", tests)) if value is not None}
    if tests and not any(row.get(column) for column in QUESTION_COLUMNS) and isinstance(row.get("text"), str):
        row = {**row, "prompt": row["text"]}  # MBPP
    *before, last = question_of(row)
    question = with_choices(last["content"], choices) if choices else last["content"]
    messages = (*before, {**last, "content": with_tests(question, tests) if tests else question})
    gold = choice_gold(row, choices) if choices else gold_of(row)
    prompt = Prompt(messages=messages, gold=gold, source=source, meta=meta)
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


def require(
    prompts: list[Prompt], bad: list[BadRow], *, verifier: str | None, skip: bool | None = None
) -> list[Prompt]:
    """Return the prompts that can be used, or refuse: each question once, with what the verifier needs.

    Args:
        verifier: judges the answers; None where nothing does, or right and wrong ones are kept.
        skip: leave the unusable rows out instead of refusing; the caller has shown them. None: refuse, and offer no
            --skip-bad-rows, which the command does not have.

    Raises:
        UserError: unusable rows and not `skip`, or nothing left.
    """
    lacking = [(prompt, missing(prompt, verifier)) for prompt in prompts]
    short = [BadRow(prompt.source, why) for prompt, why in lacking if why is not None]
    prompts, bad = [prompt for prompt, why in lacking if why is None], bad + short
    if bad and not skip:
        more = f" (and {len(bad) - 3} more rows)" if len(bad) > 3 else ""
        listed = "; ".join(f"{row.source}: {row.reason}" for row in bad[:3])
        if skip is None:
            raise UserError(f"{listed}{more}. Mend or remove them")
        hint = " or --keep any --verifier none" if short else ""
        raise UserError(f"{listed}{more}. Mend them, or leave them out with --skip-bad-rows{hint}")
    if not prompts:
        raise UserError(
            f"no usable prompt: all {len(bad)} rows are unusable, the first is {bad[0].source}: {bad[0].reason}"
        )
    seen: dict[str, Prompt] = {}
    for prompt in prompts:
        seen.setdefault(prompt.uid, prompt)
    return list(seen.values())
