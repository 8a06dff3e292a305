"""Names in recipes become functions, and every wrong name is one line that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.tables import bind, load, lookup, suggest

TABLE: dict[str, Any] = {"dumps": json.dumps, "loads": "json:loads"}


def test_an_entry_is_a_function_or_imported_lazily() -> None:
    assert lookup(TABLE, "dumps", "thing") is json.dumps
    assert lookup(TABLE, "loads", "thing") is json.loads
    assert lookup(TABLE, "json.decoder:JSONDecoder", "thing") is json.JSONDecoder


def test_an_unknown_name_lists_the_known_and_suggests_the_nearest() -> None:
    with pytest.raises(UserError) as refused:
        lookup(TABLE, "dump", "writer")
    assert str(refused.value) == "unknown writer 'dump': known are dumps, loads; did you mean 'dumps'?"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_here:f", "cannot import 'no_such_module_here'"),
        ("json.no_such_part:f", r"cannot import 'json\.no_such_part'"),
        ("json:dumsps", "module 'json' has no 'dumsps'; did you mean 'dumps'"),
        ("json:", "module 'json' has no ''"),
        (":f", "cannot import ''"),
        (".json:f", r"cannot import '\.json'"),
        ("json.:f", r"cannot import 'json\.'"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lookup({}, path, "thing")


@pytest.mark.parametrize(
    "code", ["def broken(:\n", "import no_such_module_here\n", "raise RuntimeError('at import')\n"]
)
def test_a_users_module_that_does_not_import_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    name = f"user_module_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=f"cannot import '{name}'"):
        load(f"{name}:f")


@given(name=st.text(max_size=20))
def test_any_name_is_found_or_refused(name: str) -> None:
    try:
        found = lookup(TABLE, name, "thing")
    except UserError as refused:
        found = str(refused)
    assert found in (json.dumps, json.loads) or found.startswith(("unknown thing", "cannot import", "module"))


def test_suggest_is_silent_when_nothing_is_near() -> None:
    assert suggest("temprature", ["temperature", "top_p"]) == "; did you mean 'temperature'?"
    assert suggest("xyz", ["temperature", "top_p"]) == ""
    assert suggest("x", []) == ""


def scaled(value: float, *, factor: float = 1.0, shift: float = 0.0) -> float:
    return value * factor + shift


def test_bind_fixes_keyword_only_options() -> None:
    assert bind(scaled, {"factor": 3.0, "shift": 1.0}, "scaled")(2.0) == 7.0
    assert bind(scaled, {}, "scaled") is scaled


@pytest.mark.parametrize(
    ("option", "hint"), [("facto", "did you mean 'factor'"), ("value", "accepted are factor, shift")]
)
def test_bind_refuses_what_is_no_keyword_only_option(option: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"scaled takes no option '{option}'.*{hint}"):
        bind(scaled, {option: 1.0}, "scaled")
    with pytest.raises(UserError, match="accepted are none"):
        bind(len, {"x": 1}, "len")
