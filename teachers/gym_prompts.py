"""Prompts from reasoning-gym: more than a hundred generators of problems, each with a scorer of its own.

`reasoning-gym:TASK?size=200&seed=1&KEY=VALUE`: the keys are the fields of the task's own configuration, their values
JSON or plain text. Where a problem belongs is decided by a hash of its question alone, one in eight is held out, as
for the built-in problems: so whatever their seeds and sizes, training and held-out problems never share a question.
(Another seed would not do: reasoning-gym makes problem i from seed + i, so neighbouring seeds share almost all.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any
from urllib.parse import parse_qsl

from distill.errors import UserError
from distill.records import Prompt
from distill.tables import suggest
from teachers.nano.problems import split_of
from teachers.verifiers.reasoning_gym import as_json, gym, score

DEFAULT_SIZE = 1000
# Of how many problems one of the split is sought: some questions come twice, and a task may have few in all.
STREAM = {"train": 2, "heldout": 16}
MOST = 20_000  # of a stream, unless more is asked for: word_ladder takes no larger size
CHECKED = 3  # problems whose gold is scored here already, so that a task that cannot be used is refused at once


def gym_prompts(spec: str, *, split: str, limit: int | None) -> Iterator[Prompt]:
    """Yield the problems of `TASK[?k=v&k=v]`, each question once; fewer than `size` where the task has no more.

    Args:
        split: "train" or "heldout".
        limit: at most so many, whatever `size` says.

    Raises:
        UserError: the package is missing, no such task or key, a value that the task refuses, or a task whose own
            answers do not score 1 once they have been written down.
    """
    task, _, query = spec.partition("?")
    settings = _settings(task, query)
    size = settings.pop("size", DEFAULT_SIZE)
    size = size if limit is None else min(size, limit)
    count = max(size, min(STREAM[split] * size + 64, MOST))
    seen: set[str] = set()
    for number, entry in enumerate(_entries(task, settings, count)):
        question = entry["question"]
        if split_of(question) != split or question in seen:
            continue
        plain = as_json(entry)
        if plain is None or not isinstance(plain.get("answer"), str):
            raise UserError(
                f"reasoning-gym:{task} cannot be used: its problems have no answer that can be written down"
            )
        if len(seen) < CHECKED and score(task, plain, plain["answer"]) != 1.0:
            raise UserError(f"reasoning-gym:{task} cannot be used: its own answers do not score 1 once written down")
        seen.add(question)
        yield Prompt(
            messages=({"role": "user", "content": question},),
            gold=plain["answer"],
            source=f"reasoning-gym:{task}:{number}",
            meta={"reasoning_gym": {"task": task, "entry": plain}},
        )
        if len(seen) >= size:
            return
    if not seen:
        raise UserError(f"reasoning-gym:{spec} makes no {split} problem")


def _settings(task: str, query: str) -> dict[str, Any]:
    tables = gym().factory.DATASETS
    if task not in tables:
        raise UserError(
            f"reasoning-gym has no task {task!r}{suggest(task, tables)}; it has {', '.join(sorted(tables))}"
        )
    known = [field.name for field in fields(tables[task][1])]
    settings: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in known:
            raise UserError(f"reasoning-gym:{task} has no {key!r}: it has {', '.join(known)}{suggest(key, known)}")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    for key in ("size", "seed"):
        if key in settings and (type(settings[key]) is not int or settings[key] < (key == "size")):
            raise UserError(f"reasoning-gym:{task}: {key} must be a whole number, not {settings[key]!r}")
    return settings


def _entries(task: str, settings: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """Yield a task's first `count` problems."""
    try:
        dataset = gym().create_dataset(task, **{"seed": 0, **settings, "size": count})
        for index in range(count):
            yield dataset[index]
    except (AssertionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"reasoning-gym:{task} refuses its settings: {what}") from error
