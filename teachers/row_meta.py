"""What a row of a dataset brings for its verifier: the options of a multiple choice, and the tests of a program.

Read from the columns that the usual datasets have and put into one form each, JSON-able, for `Prompt.meta`:

- `choices`: letter -> text, from `choices` or `options` (MMLU, MMLU-Pro, ARC, AQuA).
- `tests`: `cases`, each of a `type`: `code` (Python with assertions), `function_call` (`name`, `input`, `output`) or
  `stdin_stdout` (`input`, `output`); `setup` (code before them), `head` (the beginning of the function that the prompt
  gave), `entry_point` and `solution` where the row has them. From HumanEval's `test` and `entry_point`, MBPP's
  `test_list`, and `verification_info` of open-r1 and PrimeIntellect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

OPTION_COLUMNS = ("choices", "options")
CASE_TYPES = ("stdin_stdout", "function_call")


def choices_of(row: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the row's options by letter, in their order; None where it has none.

    Raises:
        ValueError: they are no list, or object, of 2 to 26 texts.
    """
    for column in OPTION_COLUMNS:
        found = _json_or_text(row.get(column))
        if not isinstance(found, (list, Mapping)) or not found:
            continue
        if isinstance(found, Mapping) and isinstance(found.get("text"), list):  # ARC: {"text": [...], "label": [...]}
            texts = found["text"]
        elif isinstance(found, Mapping):
            texts = [found[key] for key in sorted(found, key=str)]
        else:
            texts = found
        texts = [str(text) if isinstance(text, (int, float)) else text for text in texts]
        if not all(isinstance(text, str) and text.strip() for text in texts) or not 2 <= len(texts) <= 26:
            raise ValueError(f"{column} must be 2 to 26 texts")
        return dict(zip(ascii_uppercase, _without_letters(texts), strict=False))
    return None


def _without_letters(texts: list[str]) -> list[str]:
    """Return the options without their own letters, where all have one (AQuA: "A)21")."""
    marked = zip(ascii_uppercase, texts, strict=False)
    if all(text.strip()[:1] == letter and text.strip()[1:2] in (")", ".", ":") for letter, text in marked):
        return [text.strip()[2:].strip() for text in texts]
    return [text.strip() for text in texts]


def choice_gold(row: Mapping[str, Any], choices: Mapping[str, str]) -> str | None:
    """Return the letter of the row's right option where it is given as an index from 0, a label or a text.

    Whatever else stands there is left as it is, for the check of golds to refuse.
    """
    for column in ("answer", "gold", "answerKey", "correct", "answer_index", "label", "solution"):
        value = row.get(column)
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int):
            return list(choices)[value] if 0 <= value < len(choices) else str(value)
        if not isinstance(value, str) or not value.strip():
            continue
        value = value.strip()
        if value.upper() in choices:
            return value.upper()
        labels = [str(label) for label in _labels(row)]
        if value in labels and labels.index(value) < len(choices):  # ARC has rows with the labels 1 to 4
            return list(choices)[labels.index(value)]
        return next((letter for letter, text in choices.items() if text == value), value)
    return None


def _labels(row: Mapping[str, Any]) -> list[Any]:
    for column in OPTION_COLUMNS:
        found = _json_or_text(row.get(column))
        if isinstance(found, Mapping):
            return found["label"] if isinstance(found.get("label"), list) else sorted(found, key=str)
    return []


def with_choices(question: str, choices: Mapping[str, str]) -> str:
    """Return the question with its options below it, if they are not in it: nobody can choose what is not shown."""
    if all(text in question for text in choices.values()):
        return question
    return question.rstrip() + "\n\n" + "\n".join(f"{letter}. {text}" for letter, text in choices.items())


def tests_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the row's tests in their one form; None where it has none.

    Raises:
        ValueError: they are for another language than Python, or are not what their column promises.
    """
    if row.get("verification_info") not in (None, "", {}):
        tests = _verification(row["verification_info"])
        solution = row.get("gold_standard_solution")
    elif isinstance(row.get("test"), str) and isinstance(row.get("entry_point"), str):
        tests, solution = _human_eval(row), row.get("canonical_solution")
        solution = tests["head"] + solution if isinstance(solution, str) else None
    elif row.get("test_list") not in (None, "", []):
        tests, solution = _assertions(row), row.get("code")
    else:
        return None
    if isinstance(solution, str) and solution.strip():
        tests["solution"] = _without_fence(solution)
    try:
        json.dumps(tests, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"its tests cannot be written as JSON: {error}") from error
    return tests


def _verification(found: Any) -> dict[str, Any]:
    found = _json_or_text(found)
    if not isinstance(found, Mapping):
        raise ValueError("verification_info must be an object, or its JSON text")
    language = found.get("language", "python")
    if str(language).lower() not in ("python", "python3"):
        raise ValueError(f"its tests are for {language!r}; only python can be run")
    cases = _json_or_text(found.get("test_cases"))
    if not isinstance(cases, list) or not cases:
        raise ValueError("verification_info has no test_cases")
    return {"cases": [_case(case) for case in cases]}


def _case(case: Any) -> dict[str, Any]:
    if not isinstance(case, Mapping) or "input" not in case or "output" not in case:
        raise ValueError("a test case must have input and output")
    kind = case.get("type", "function_call" if case.get("fn_name") else "stdin_stdout")
    if kind not in CASE_TYPES:
        raise ValueError(f"a test case must be of type {' or '.join(CASE_TYPES)}, not {kind!r}")
    given, expected = case["input"], case["output"]
    if kind == "stdin_stdout":
        return {"type": kind, "input": _text(given), "output": _text(expected)}
    name = case.get("fn_name")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError("a test case of type function_call must name its function in fn_name")
    return {"type": kind, "name": name, "input": _arguments(given), "output": _json_or_text(expected)}


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise ValueError("input and output of a test case of type stdin_stdout must be texts")
    return value


def _arguments(value: Any) -> list[Any]:
    """Return the arguments of a call: a list, its JSON text, or a text with the JSON of one argument on each line."""
    if isinstance(value, str):
        lines = [line for line in value.split("\n") if line.strip()]
        value = _json_or_text(value) if len(lines) < 2 else [_json_or_text(line) for line in lines]
    return value if isinstance(value, list) else [value]


def _json_or_text(value: Any) -> Any:
    """Return a column's value, or what its text means as JSON; any other text is itself."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _human_eval(row: Mapping[str, Any]) -> dict[str, Any]:
    name, head = row["entry_point"], row.get("prompt")
    if not name.isidentifier():
        raise ValueError("entry_point must be a function's name")
    check = f"\ncheck({name})" if "def check(" in row["test"] else ""
    tests: dict[str, Any] = {"cases": [{"type": "code", "code": row["test"] + check}], "entry_point": name}
    # A prompt in words is no head of a function, and cannot stand before the code.
    tests["head"] = head if isinstance(head, str) and f"def {name}" in head and "```" not in head else ""
    return tests


def _assertions(row: Mapping[str, Any]) -> dict[str, Any]:
    found = _json_or_text(row["test_list"])
    if not isinstance(found, list) or not all(isinstance(code, str) and code.strip() for code in found):
        raise ValueError("test_list must be a list of assertions")
    imports = row.get("test_imports")
    setup = "\n".join([*map(str, imports if isinstance(imports, list) else []), str(row.get("test_setup_code") or "")])
    return {"cases": [{"type": "code", "code": code} for code in found], "setup": setup.strip()}


def with_tests(question: str, tests: Mapping[str, Any]) -> str:
    """Return the question with its assertions below it, if it does not show them: they alone name the function.

    The words are those of the paper that made MBPP (arXiv 2108.07732).
    """
    codes = [case["code"].strip() for case in tests["cases"] if case["type"] == "code"]
    if "entry_point" in tests or not codes or codes[0] in question:
        return question
    return question.rstrip() + "\nYour code should pass these tests:\n\n" + "\n".join(codes)


def _without_fence(code: str) -> str:
    lines = code.strip("\n").split("\n")
    fenced = len(lines) > 2 and lines[0].strip().startswith("```") and lines[-1].strip() == "```"
    return "\n".join(lines[1:-1]) if fenced else code
