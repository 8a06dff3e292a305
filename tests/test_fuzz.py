"""Any prompt file and any completion: one clear line or a whole store, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli import app
from distill.records import Completion
from distill.store import read_traces
from teachers.backend import Request
from teachers.filters import FILTERS

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)  # lone surrogates and control characters too
TEXT = st.one_of(
    ANY_TEXT,
    st.sampled_from(
        ["<think>", "</think>", "\\boxed{", "\\frac{", "}", "((((" * 40, "9**9**9", "```python\n", "\0", "A"]
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
COLUMNS = ["prompt", "question", "problem", "messages", "answer", "solution", "gold", "choices", "test", "entry_point"]
COLUMNS += ["verification_info", "level", "Body", "Question"]
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": TEXT | JSON})
ROW = st.dictionaries(st.sampled_from(COLUMNS), TEXT | JSON | st.lists(TURN, max_size=3), max_size=5)
LINE = st.one_of(
    ROW.map(lambda row: json.dumps(row).encode()),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=40),
)
COMPLETION = st.lists(TEXT, max_size=6).map("".join)


class AnyAnswer:
    """A model that says what the test wants."""

    name, provides, description, config = "any", frozenset({"text", "feed"}), "any text", None
    answers: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, model: str, **_: Any) -> None: ...

    def generate(
        self, requests: Iterable[Request | None], sampling: Mapping[str, Any], **_: Any
    ) -> Iterator[tuple[Request, Completion]]:
        for number, request in enumerate(request for request in requests if request is not None):
            text, reason = self.answers[number % len(self.answers)]
            error = "it broke" if reason == "error" else None
            yield (
                request,
                Completion(
                    text=text, finish_reason=reason, num_prompt_tokens=1, num_completion_tokens=len(text), error=error
                ),
            )

    def close(self) -> None: ...


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """Run a command line; whatever it ends with, there is one `error:` line or none, and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        app(arguments)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert sum(line.startswith("error: ") for line in said.split("\n")) == (stop.value.code != 0)
    assert stop.value.code in (0, 1, 2)
    return int(stop.value.code)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    lines=st.lists(LINE, max_size=6),
    answers=st.lists(
        st.tuples(COMPLETION, st.sampled_from(["stop", "stop", "length", "loop", "error"])), min_size=1, max_size=4
    ),
    skip=st.booleans(),
    again=st.sampled_from([[], ["--drop", ",".join(set(FILTERS) - {"length", "pass_rate"})], ["--keep", "diverse:1"]]),
)
def test_any_prompts_and_any_completions(
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    lines: list[bytes],
    answers: list[tuple[str, str]],
    skip: bool,
    again: list[str],
) -> None:
    """Generate, resume and filter: what the journal holds is counted, and the views can be read back."""
    folder = tmp_path_factory.mktemp("fuzz")
    prompts, store = folder / "rows.jsonl", folder / "store"
    prompts.write_bytes(b"\n".join(lines))
    AnyAnswer.answers = answers
    line = ["generate", "--prompts", str(prompts), "--teacher", "nano", "--backend", "test_fuzz:AnyAnswer", "-n", "2"]
    line += ["--verifier", "none", "--keep", "any", "--out", str(store), *(["--skip-bad-rows"] if skip else [])]
    code = run(line, capsys)
    if code == 2:
        assert not store.exists() or not list(read_traces(store))
        return
    assert run(line, capsys) == code
    _check(store)
    run(["filter", str(store), "--keep", "any", *again], capsys)
    _check(store)


def _check(store: Path) -> None:
    samples = {trace.uid for trace in read_traces(store)}
    funnel = json.loads((store / "funnel.json").read_text())
    assert funnel["samples"] == len(samples) == funnel["kept"] + sum(funnel["rejected"].values())
    for name, count in (("kept.jsonl", funnel["kept"]), ("rejected.jsonl", len(samples) - funnel["kept"])):
        # Bytes first: a reader of the file may not accept what Python's own json does.
        rows = [json.loads(line) for line in (store / name).read_bytes().decode("utf-8").split("\n")[:-1]]
        assert len(rows) == count
