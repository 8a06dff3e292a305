"""Prompts: every file type gives the same, golds are found where datasets hide them, bad rows are named by number."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from distill.errors import UserError
from distill.records import Prompt
from teachers.prompts import BadRow, final_answer, gold_of, last_boxed, prompt_of, question_of, read_prompts, require

DATA = Path(__file__).parents[2] / "shared" / "data"
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
ROWS = [
    {"question": "What is 1 + 1?", "answer": "#### 2"},
    {"question": 'Two lines,\n"quoted", with é and 数.', "answer": "So \\boxed{\\frac{1}{2}}."},
    {"question": "What is 600 + 634?", "answer": "600 + 634 = 1234\n#### 1,234"},
]


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows in the format that the path's suffix names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", [".json", ".csv", ".parquet", ".JSONL"])
def test_every_file_type_gives_the_same_prompts(tmp_path: Path, kind: str) -> None:
    reference, bad = read_prompts(write_rows(tmp_path / "a.jsonl", ROWS))
    assert not bad
    assert [p.gold for p in reference] == ["2", "\\frac{1}{2}", "1234"]
    if kind == ".JSONL":
        (tmp_path / "b.JSONL").write_bytes((tmp_path / "a.jsonl").read_bytes())
        prompts, bad = read_prompts(str(tmp_path / "b.JSONL"))
    else:
        prompts, bad = read_prompts(write_rows(tmp_path / f"b{kind}", ROWS))
    assert not bad
    assert [(p.uid, p.messages, p.gold) for p in prompts] == [(p.uid, p.messages, p.gold) for p in reference]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, kind: str) -> None:
    path = Path(write_rows(tmp_path / f"a{kind}", ROWS))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    prompts, bad = read_prompts(str(path))
    assert (len(prompts), bad) == (3, [])


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("42", "42"),
        ("  42\n", "42"),
        ("6*7 = <<6*7=42>>42\n#### 42", "42"),
        ("#### 1,234", "1234"),
        ("#### -1,234,567.50", "-1234567.50"),
        ("#### $1,200", "$1200"),
        ("#### (1,2)", "(1,2)"),
        ("#### (1,200)", "(1,200)"),
        ("#### 1,234 dollars", "1234 dollars"),
        ("#### 1,2", "1,2"),
        ("#### 3\n#### 4", "4"),
        ("#### 42 ", "42"),
        ("so \\boxed{5}", "5"),
        ("first \\boxed{4}, no, \\boxed{\\frac{1}{\\sqrt{2}}}.", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{a \\\\}", "a \\\\"),
        ("\\boxed{5} and then \\boxed{6", "5"),
        ("\\boxed{", "\\boxed{"),
        ("#### Step 1\nAdd.\n#### Step 2\nSo \\boxed{7}.", "7"),
        ("#### \\boxed{8}", "8"),
        ("north", "north"),
    ],
)
def test_the_final_answer_of_a_solution(text: str, gold: str) -> None:
    assert final_answer(text) == gold
    assert gold_of({"answer": text}) == gold_of({"solution": text}) == gold_of({"gold": text}) == gold


@given(
    inner=st.recursive(
        st.text("ab1 \\,", max_size=4).map(lambda t: t.replace("\\", "\\\\")),
        lambda x: st.lists(x, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
        max_leaves=8,
    ),
    tail=st.text("x } {", max_size=5),
)
def test_a_balanced_box_is_found_whole(inner: str, tail: str) -> None:
    assert last_boxed(f"text \\boxed{{{inner}}}{tail}") == inner.strip()


def test_a_gold_of_unclosed_boxes_is_read_in_linear_time() -> None:
    began = time.perf_counter()
    assert last_boxed("\\boxed{1}" + "\\boxed{" * 30_000) == "1"
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        (5, "5"),
        (5.0, "5"),
        (-0.5, "-0.5"),
        (1234567, "1234567"),
        (1234567.0, "1234567"),
        (1e22, "10000000000000000000000"),
        (1e-7, "0.0000001"),
        (10**400, "1" + "0" * 400),
        (0, "0"),
        (decimal.Decimal("1.50"), "1.50"),
        (float("nan"), None),
        (float("inf"), None),
        (True, None),
        (None, None),
        ("", None),
        ("  ", None),
        ([], None),
        ({"a": 1}, None),
    ],
)
def test_golds_that_are_no_texts(value: Any, gold: str | None) -> None:
    assert gold_of({"answer": value}) == gold
    assert gold_of({"answer": value, "solution": "\\boxed{x}"}) == (gold or "x")


def test_svamp_columns() -> None:
    row = {"ID": "chal-1", "Body": "Ana has 3 pens. ", "Question": "How many? ", "Answer": 3.0, "Type": "Addition"}
    prompt = prompt_of(row, "svamp:1")
    assert prompt.messages == user("Ana has 3 pens. How many?")
    assert (prompt.gold, prompt.source) == ("3", "svamp:1")


@pytest.mark.parametrize("column", ["prompt", "question", "problem", "messages"])
def test_question_columns(column: str) -> None:
    assert question_of({column: "1+1?", "id": 1}) == user("1+1?")
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?", "name": "x"}]
    expected = ({"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"})
    assert question_of({column: turns}) == expected
    assert question_of({column: [*turns, {"role": "assistant", "content": "2"}]}) == expected


BAD = [
    ({}, "no question: needs a non-empty messages, prompt, question, problem; it has no columns"),
    ({"questions": "1+1?"}, "did you mean 'question'"),
    ({"question": " \n"}, "no question"),
    ({"question": 5}, "no question"),
    ({"question": None}, "no question"),
    ({"messages": []}, "no question"),
    ({"messages": ["hi"]}, "messages must be a list of {role, content} texts"),
    ({"messages": [{"role": "user"}]}, "messages must be a list"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages must be a list"),
    ({"messages": [{"role": "system", "content": "s"}]}, "messages must end with a user turn"),
    ({"messages": [{"role": "assistant", "content": "s"}]}, "messages must end with a user turn"),
    ({"messages": [{"role": "user", "content": " "}]}, "the user's last turn is empty"),
    ({"question": "half \ud83d"}, "surrogate"),
    ({"question": "1+1?", "answer": "\udc00"}, "surrogate"),
    ([1], "the row must be an object, not list"),
    ("text", "the row must be an object, not str"),
    (None, "the row must be an object, not NoneType"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_named_by_number_and_the_others_go_on(tmp_path: Path, row: Any, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n\n{json.dumps(row)}\n{json.dumps(ROWS[1])}\n")
    prompts, bad = read_prompts(str(path))
    assert [p.source for p in prompts] == ["a.jsonl:1", "a.jsonl:4"]
    assert [b.source for b in bad] == ["a.jsonl:3"]
    assert reason in bad[0].reason
    with pytest.raises(UserError, match=r"^a\.jsonl:3: .*--skip-bad-rows"):
        require(prompts, bad, verifier="math", skip=False)
    assert require(prompts, bad, verifier="math", skip=True) == prompts


def test_numbers_of_rows_in_every_format(tmp_path: Path) -> None:
    rows = [{"question": q, "answer": "1"} for q in ("a?", "", "b\nc?", "")]
    for kind, numbers in {".json": [2, 4], ".parquet": [2, 4], ".jsonl": [2, 4], ".csv": [3, 6]}.items():
        _, bad = read_prompts(write_rows(tmp_path / f"a{kind}", rows))
        assert [b.source for b in bad] == [f"a{kind}:{n}" for n in numbers]  # in a CSV: the line, after the header's


def test_a_malformed_line_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"question": "1?"\n' + b"\xff\xfe\n" + b"[" * 100_000 + b"\n" + b'{"question": "2?"}\n')
    prompts, bad = read_prompts(str(path))
    assert [p.source for p in prompts] == ["a.jsonl:4"]
    assert [b.source for b in bad] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert all(b.reason.startswith("not JSON") for b in bad)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl", b"", "is empty: it has no rows"),
        ("a.jsonl", b"\n \n", "is empty: it has no rows"),
        ("a.json", b"[]", "is empty: it has no rows"),
        ("a.json", b"", "is not JSON"),
        ("a.json", b"3", "must hold a list of rows"),
        ("a.json", b'{"a": [], "b": []}', "must hold a list of rows"),
        ("a.csv", b"", "is empty: it has no rows"),
        ("a.csv", b"question,answer\n", "is empty: it has no rows"),
        ("a.csv", b"question\n\xff\n", "is not a UTF-8 CSV file"),
        ("a.parquet", b"", "is not a Parquet file"),
        ("a.parquet", b"PAR1xxxxPAR1", "is not a Parquet file"),
        ("a.txt", b"1+1?", "known file types are .jsonl, .json, .csv, .parquet"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_prompts(str(tmp_path / name))
    assert fault in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_parquet_file_damaged_inside_is_one_line(tmp_path: Path) -> None:
    path = Path(write_rows(tmp_path / "a.parquet", ROWS * 50))
    content = bytearray(path.read_bytes())
    content[8:200] = b"\xff" * 192  # the pages; the footer stays
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a Parquet file"):
        read_prompts(str(path))


def test_parquet_values_that_json_does_not_know(tmp_path: Path) -> None:
    row = {"question": "1+1?", "answer": decimal.Decimal("2.0"), "level": datetime.date(2026, 1, 2), "type": b"\xff"}
    ((prompt,), _) = read_prompts(write_rows(tmp_path / "a.parquet", [row]))
    assert prompt.gold == "2.0"
    assert json.loads(json.dumps(dict(prompt.meta), allow_nan=False))["level"] == "2026-01-02"


def test_a_json_file_may_wrap_its_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    assert len(read_prompts(str(tmp_path / "a.json"))[0]) == 3


def test_a_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    write_rows(tmp_path / "problems.jsonl", ROWS)
    with pytest.raises(UserError, match=r"does not exist; did you mean 'problems\.jsonl'\?; give a .*nano"):
        read_prompts(str(tmp_path / "problem.jsonl"))
    with pytest.raises(UserError, match="is a folder"):
        read_prompts(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(str(tmp_path / "absent" / "x.jsonl"))


def test_duplicate_questions_are_asked_once_and_limit_counts_rows(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [ROWS[0], ROWS[0], {**ROWS[0], "answer": "3"}, ROWS[1], {}])
    prompts, bad = read_prompts(source, limit=4)
    assert (len(prompts), bad) == (4, [])
    asked = require(prompts, bad, verifier="math", skip=False)
    assert [(p.source, p.gold) for p in asked] == [("a.jsonl:1", "2"), ("a.jsonl:4", "\\frac{1}{2}")]
    assert len(read_prompts(source, limit=1)[0]) == 1
    assert len(read_prompts(source)[1]) == 1


def test_require_names_rows_without_a_gold(tmp_path: Path) -> None:
    prompts, bad = read_prompts(
        write_rows(tmp_path / "a.jsonl", [ROWS[0], {"question": "?"}, *[{"question": f"{i}?"} for i in range(4)]])
    )
    assert (len(prompts), bad) == (6, [])
    with pytest.raises(
        UserError, match=r"a\.jsonl:2: no gold answer.*a\.jsonl:4.*\(and 2 more rows\).*--verifier none"
    ):
        require(prompts, bad, verifier="math", skip=False)
    assert len(require(prompts, bad, verifier="math", skip=True)) == 1
    assert len(require(prompts, bad, verifier=None, skip=False)) == 6


def test_nothing_usable_is_an_error_even_when_skipping() -> None:
    with pytest.raises(UserError, match="no usable prompt: all 1 rows are unusable, the first is a:1: why"):
        require([], [BadRow("a:1", "why")], verifier=None, skip=True)


def test_a_system_prompt_goes_before_questions_without_one(tmp_path: Path) -> None:
    own = {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "1?"}]}
    prompts, _ = read_prompts(write_rows(tmp_path / "a.jsonl", [ROWS[0], own]), system_prompt="given")
    assert [p.messages[0]["content"] for p in prompts] == ["given", "own"]
    assert [len(p.messages) for p in prompts] == [2, 2]


@pytest.mark.parametrize("source", ["nano:9", "nano:x", "nano:1:2"])
def test_unknown_levels_of_the_built_in_problems(source: str) -> None:
    with pytest.raises(UserError, match="level"):
        read_prompts(source)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None, categories=None), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "messages",
                    "prompt",
                    "question",
                    "answer",
                    "role",
                    "content",
                    "Body",
                    "Question",
                    "level",
                    "choices",
                    "options",
                    "text",
                    "label",
                    "test",
                    "code",
                    "entry_point",
                    "test_list",
                    "verification_info",
                    "language",
                    "test_cases",
                    "input",
                    "output",
                    "type",
                    "fn_name",
                ]
            )
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(values=st.lists(JSON_VALUES, max_size=4))
@example(values=[{"question": "q", "answer": 10**400}])
@example(values=[{"question": "q", "answer": float("nan"), "level": float("nan")}])
@in_one_folder
def test_any_json_is_prompts_bad_rows_or_a_user_error(tmp_path: Path, values: list[Any]) -> None:
    lines, whole = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text("".join(json.dumps(value) + "\n" for value in values))
    whole.write_text(json.dumps(values))
    for path in (lines, whole):
        try:
            prompts, bad = read_prompts(str(path))
            require(prompts, bad, verifier="math", skip=True)
        except UserError:
            continue
        assert len(prompts) + len(bad) == len(values)
        for prompt in prompts:
            check(prompt)


@given(content=st.binary(max_size=80))
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
@in_one_folder
def test_any_bytes_are_prompts_bad_rows_or_a_user_error(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / f"a{kind}"
    path.write_bytes(content)
    try:
        prompts, _ = read_prompts(str(path))
    except UserError:
        return
    for prompt in prompts:
        check(prompt)


def check(prompt: Prompt) -> None:
    """A prompt that was accepted can be asked, tokenised and written."""
    assert prompt.messages[-1]["role"] == "user"
    assert prompt.messages[-1]["content"].strip()
    assert prompt.gold is None or prompt.gold.strip()
    json.dumps([list(prompt.messages), prompt.gold, dict(prompt.meta)], allow_nan=False, ensure_ascii=False).encode(
        "utf-8"
    )


MMLU = {"question": "Capital of France?", "choices": ["Rome", "Paris", "Bonn", "Oslo"], "answer": 1}
SHOWN = "Capital of France?\n\nA. Rome\nB. Paris\nC. Bonn\nD. Oslo"
LETTERS = {"A": "Rome", "B": "Paris", "C": "Bonn", "D": "Oslo"}


@pytest.mark.parametrize(
    "row",
    [
        MMLU,
        {**MMLU, "answer": "B"},
        {**MMLU, "answer": "b"},
        {**MMLU, "answer": "Paris"},
        {**MMLU, "answer": 1.0},
        {**MMLU, "choices": json.dumps(MMLU["choices"])},
        {"question": MMLU["question"], "options": MMLU["choices"], "answer": "B", "answer_index": 1},
        {"question": MMLU["question"], "options": LETTERS, "answer": "B"},
        {"question": MMLU["question"], "options": ["A)Rome", "B)Paris", "C)Bonn", "D)Oslo"], "correct": "B"},
        {
            "question": MMLU["question"],
            "choices": {"text": MMLU["choices"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
        {
            "question": MMLU["question"],
            "choices": {"text": MMLU["choices"], "label": ["1", "2", "3", "4"]},
            "answerKey": "2",
        },
    ],
)
def test_multiple_choice_in_every_form(row: dict[str, Any]) -> None:
    prompt = prompt_of(row, "a:1")
    assert prompt.messages == user(SHOWN)
    assert prompt.gold == "B"
    assert prompt.meta["choices"] == LETTERS


def test_options_that_the_question_shows_are_not_shown_twice() -> None:
    assert prompt_of({**MMLU, "question": SHOWN}, "a:1").messages == user(SHOWN)
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": MMLU["question"]}]
    assert prompt_of({**MMLU, "messages": turns}, "a:1").messages == (turns[0], *user(SHOWN))


def test_a_gold_that_is_none_of_the_options_is_left_for_the_check() -> None:
    assert prompt_of({**MMLU, "answer": 4}, "a:1").gold == "4"
    assert prompt_of({**MMLU, "answer": "Berlin"}, "a:1").gold == "Berlin"
    assert prompt_of({"question": "1+1?", "choices": None, "answer": 2}, "a:1").meta == {}


HUMAN_EVAL = {
    "prompt": 'def inc(x: int) -> int:\n    """Add one."""\n',
    "entry_point": "inc",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
    "canonical_solution": "    return x + 1\n",
}
MBPP = {"text": "Add one.", "code": "def inc(x):\n  return x + 1", "test_list": ["assert inc(1) == 2"]}


def test_tests_of_humaneval_and_mbpp() -> None:
    prompt = prompt_of(HUMAN_EVAL, "a:1")
    assert prompt.messages == user(HUMAN_EVAL["prompt"])
    assert prompt.meta["tests"] == {
        "cases": [{"type": "code", "code": HUMAN_EVAL["test"] + "\ncheck(inc)"}],
        "entry_point": "inc",
        "head": HUMAN_EVAL["prompt"],
        "solution": HUMAN_EVAL["prompt"] + HUMAN_EVAL["canonical_solution"],
    }
    prompt = prompt_of({**MBPP, "test_setup_code": "import math", "test_imports": ["import re"]}, "a:1")
    assert prompt.messages == user("Add one.\nYour code should pass these tests:\n\nassert inc(1) == 2")
    assert prompt.meta["tests"]["setup"] == "import re\nimport math"
    assert prompt.meta["tests"]["solution"] == MBPP["code"]


def test_verification_info_in_every_form() -> None:
    cases = [
        {"type": "stdin_stdout", "input": "1\n", "output": "2\n"},
        {"type": "function_call", "fn_name": "f", "input": "[1, 2]\n3", "output": "5"},
        {"type": "function_call", "fn_name": "f", "input": [1, [2]], "output": [[5]]},
    ]
    expected = [
        {"type": "stdin_stdout", "input": "1\n", "output": "2\n"},
        {"type": "function_call", "name": "f", "input": [[1, 2], 3], "output": 5},
        {"type": "function_call", "name": "f", "input": [1, [2]], "output": [[5]]},
    ]
    for info in ({"language": "python", "test_cases": cases}, {"language": "python", "test_cases": json.dumps(cases)}):
        for column in (info, json.dumps(info)):
            prompt = prompt_of({"question": "?", "verification_info": column}, "a:1")
            assert prompt.meta["tests"]["cases"] == expected


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"verification_info": {"language": "cpp", "test_cases": []}}, "for 'cpp'; only python"),
        ({"verification_info": "no"}, "verification_info must be an object"),
        ({"verification_info": {"language": "python"}}, "no test_cases"),
        ({"verification_info": {"test_cases": [{"input": "1"}]}}, "input and output"),
        ({"verification_info": {"test_cases": [{"input": "", "output": "", "type": "x"}]}}, "of type stdin_stdout or"),
        ({"verification_info": {"test_cases": [{"input": 1, "output": ""}]}}, "must be texts"),
        ({"verification_info": {"test_cases": [{"input": 1, "output": 1, "fn_name": "a b"}]}}, "name its function"),
        (
            {"verification_info": {"test_cases": [{"input": 1, "output": float("nan"), "fn_name": "f"}]}},
            "cannot be written as JSON",
        ),
        ({"test_list": "assert"}, "test_list must be a list"),
        ({"choices": [1]}, "choices must be 2 to 26 texts"),
        ({"options": ["", "x"]}, "options must be 2 to 26 texts"),
    ],
)
def test_tests_and_options_that_cannot_be_used_are_refused_by_row(
    tmp_path: Path, columns: dict[str, Any], reason: str
) -> None:
    prompts, bad = read_prompts(write_rows(tmp_path / "a.jsonl", [ROWS[0], {"question": "?", **columns}]))
    assert len(prompts) == 1
    assert (bad[0].source, reason in bad[0].reason) == ("a.jsonl:2", True), bad


@pytest.mark.parametrize(
    ("verifier", "row", "reason"),
    [
        ("code_tests", {"question": "?"}, "no tests: needs test and entry_point"),
        ("reasoning-gym", {"question": "?"}, "no reasoning-gym entry"),
        ("choice", {"question": "?"}, "no gold answer"),
    ],
)
def test_require_asks_for_what_the_verifier_needs(verifier: str, row: dict[str, Any], reason: str) -> None:
    prompts = [prompt_of(row, "a:1"), prompt_of({**MMLU, **HUMAN_EVAL, "answer": 1}, "a:2")]
    with pytest.raises(UserError, match=f"^a:1: {reason}"):
        require(prompts, [], verifier=verifier, skip=False)
    if verifier != "reasoning-gym":
        assert require(prompts, [], verifier=verifier, skip=True) == prompts[1:]
    assert require(prompts, [], verifier="own.module:function", skip=False) == prompts


def gsm8k(row: dict[str, Any]) -> str:
    return str(row["answer"]).split("####")[1].strip().replace(",", "")


def svamp(row: dict[str, Any]) -> str:
    return f"{row['Answer']:g}" if row["Answer"] != int(row["Answer"]) else str(int(row["Answer"]))


REAL: dict[str, Callable[[dict[str, Any]], str]] = {
    "gsm8k/train.jsonl": gsm8k,
    "gsm8k/test_first660.jsonl": gsm8k,
    "svamp/svamp_first700.jsonl": svamp,
    "math/math500.jsonl": lambda row: str(row["answer"]).strip(),
}


@pytest.mark.parametrize("name", [name for name in REAL if (DATA / name).is_file()])
def test_real_datasets_are_read_whole(name: str) -> None:
    prompts, bad = read_prompts(str(DATA / name))
    rows = [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    assert not bad
    assert [p.gold for p in prompts] == [REAL[name](row) for row in rows]
    assert all(re.fullmatch(rf"{re.escape(Path(name).name)}:\d+", p.source) for p in prompts)


@pytest.mark.parametrize("name", [name for name in ["math/math500.jsonl"] if (DATA / name).is_file()])
def test_the_box_of_a_worked_solution_is_its_answer(name: str) -> None:
    rows = [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    wrong = [row["answer"] for row in rows if final_answer(row["solution"]).split() != row["answer"].split()]
    assert len(wrong) <= 0.02 * len(rows), wrong  # the dataset's own answers differ in their spelling now and then
