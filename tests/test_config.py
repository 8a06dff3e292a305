"""Recipes: YAML keys are the flags, flags beat the file, and every mistake is one line that names its key."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from distill import config
from distill.config import FilterConfig, GenerateConfig, Section, TrainConfig, build, read_yaml
from distill.errors import UserError

MODELS = [m for _, m in inspect.getmembers(config, inspect.isclass) if issubclass(m, Section) and m is not Section]
COMMANDS = [m for m in MODELS if m.__name__.endswith("Config")]
NEEDED = {"prompts": "a.jsonl", "out": "runs/a"}
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def recipe(folder: Path, **values: Any) -> Path:
    """Write a recipe file."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_every_command_has_a_model() -> None:
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("model", MODELS)
def test_every_field_is_described_in_one_sentence_and_its_default_is_allowed(model: type[Section]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert "\n" not in field.description, name
    required = {name: "x" for name, field in model.model_fields.items() if field.is_required()}
    required = {name: ["x"] if name == "evaluations" else value for name, value in required.items()}
    defaults = model.model_validate(required).model_dump()
    assert model.model_validate(defaults).model_dump() == defaults


@pytest.mark.parametrize("model", MODELS)
def test_every_field_can_come_from_a_file_and_a_flag_beats_it(model: type[Section], tmp_path: Path) -> None:
    required = {name: "x" for name, field in model.model_fields.items() if field.is_required()}
    required = {name: ["x"] if name == "evaluations" else value for name, value in required.items()}
    values = model.model_validate(required).model_dump(mode="json")
    assert build(model, recipe(tmp_path, **values), {}).model_dump(mode="json") == values
    for name in values:
        if values[name] == "x":
            assert getattr(build(model, recipe(tmp_path, **values), {name: "flag"}), name) in ("flag", Path("flag"))


def test_a_flag_beats_the_file_and_the_file_the_default(tmp_path: Path) -> None:
    file = recipe(tmp_path, **NEEDED, n=4, temperature=0.9)
    built = build(GenerateConfig, file, {"temperature": "0.1"})
    assert (built.n, built.temperature, built.top_p, built.out) == (4, 0.1, 0.95, Path("runs/a"))


def test_flags_are_texts_and_files_are_typed() -> None:
    texts = {"n": "4", "temperature": "1e-1", "limit": "7", "skip_bad_rows": True}
    typed = {"n": 4, "temperature": 0.1, "limit": 7, "skip_bad_rows": True}
    assert build(GenerateConfig, None, NEEDED | texts) == build(GenerateConfig, None, NEEDED | typed)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("temprature", "temperature"),
        ("top-p", "top_p"),
        ("max_tokens_length", None),
        ("learning_rate", None),
        (3, None),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_suggested(tmp_path: Path, key: Any, near: str | None) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**NEEDED, key: 1}))
    with pytest.raises(UserError) as refused:
        build(GenerateConfig, path, {})
    message = str(refused.value)
    assert message.startswith(f"{path}: unknown option {key!r}")
    assert near is None or message.endswith(f"did you mean {near!r}?")


WRONG = [
    ({"n": 0}, "--n: input should be greater than or equal to 1"),
    ({"n": "three"}, "--n: input should be a valid integer"),
    ({"n": 1.5}, "--n: input should be a valid integer"),
    ({"n": True}, "--n: "),
    ({"n": [1]}, "--n: "),
    ({"n": None}, "--n: "),
    ({"seed": False}, "--seed: "),
    ({"temperature": -0.1}, "--temperature: "),
    ({"temperature": True}, "--temperature: "),
    ({"temperature": math.nan}, "--temperature: "),
    ({"temperature": math.inf}, "--temperature: "),
    ({"temperature": {"a": 1}}, "--temperature: "),
    ({"top_p": 0}, "--top-p: "),
    ({"top_p": 1.1}, "--top-p: "),
    ({"reasoning": "maybe"}, "--reasoning: input should be 'auto', 'think' or 'none'"),
    ({"skip_bad_rows": "perhaps"}, "--skip-bad-rows: "),
    ({"engine_arg": "dtype=float32"}, "--engine-arg: "),
    ({"engine_arg": [1]}, "--engine-arg: "),
    ({"prompts": 3}, "--prompts: "),
    ({"out": 3}, "--out: "),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_a_value_of_the_wrong_kind_is_one_line_naming_the_flag(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(UserError) as refused:
        build(GenerateConfig, recipe(tmp_path, **{**NEEDED, **values}), {})
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
    assert f"(given {next(iter(values.values()))!r})" in str(refused.value) or "engine_arg" in values


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(UserError, match=r"--top-p: .*; --prompts is required; .*--n: "):
        build(GenerateConfig, None, {"out": "x", "n": 0, "top_p": 2})


def test_what_is_missing_is_named_as_its_flag() -> None:
    with pytest.raises(UserError, match=r"^--student is required; --data is required; --out is required$"):
        build(TrainConfig, None, {})
    with pytest.raises(UserError, match="is required"):
        build(FilterConfig, None, {})


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "must hold a mapping of option: value, not NoneType"),
        (b"- a\n", "must hold a mapping of option: value, not list"),
        (b"just text", "must hold a mapping of option: value, not str"),
        (b"a: [1", "is not YAML"),
        (b"a: \xff", "is not YAML"),
        (b"\tn: 1", "is not YAML"),
        (b"a: 2026-13-01", "is not YAML"),
        (b"a: !!int ''", "is not YAML"),
        (b"a: !!bool maybe", "is not YAML"),
        (b"a: !!python/object:os.system x", "is not YAML"),
        (b"? [1]\n: 2", "is not YAML"),
        (b"n: 1\nseed: 2\nn: 3", "has the key 'n' twice in one mapping, again in line 3"),
        (b"[" * 5000, "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_yaml(path)
    assert f"{path} {fault}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the recipe .*absent\.yaml: No such file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match=r"cannot read the recipe .*: Is a directory"):
        read_yaml(tmp_path)


@given(content=st.binary(max_size=60) | st.text("ab:-[]{}!?&*|>'\"#%@\n\t 0123.e", max_size=60).map(str.encode))
@in_one_folder
def test_any_file_is_a_recipe_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError):  # prompts and out are missing at the very least
        build(GenerateConfig, path, {})


def values() -> st.SearchStrategy[Any]:
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
        max_leaves=3,
    )


@given(given_values=st.dictionaries(st.sampled_from(sorted(GenerateConfig.model_fields)), values(), max_size=4))
def test_any_values_are_a_config_or_refused(given_values: dict[str, Any]) -> None:
    try:
        built = build(GenerateConfig, None, NEEDED | given_values)
    except UserError as refused:
        message = str(refused)
    else:
        message = f"--temperature {built.temperature}" if math.isfinite(built.temperature) and built.n >= 1 else ""
    assert message.startswith("--")


def test_configs_are_frozen_and_sampling_is_what_shapes_a_completion() -> None:
    built = build(GenerateConfig, None, NEEDED)
    with pytest.raises(ValidationError, match="frozen"):
        built.n = 2  # type: ignore[misc]
    assert built.sampling() == {"temperature": 0.6, "top_p": 0.95, "max_completion_length": None}
    for name, value in {"temperature": 1.5, "top_p": 0.5, "max_completion_length": 7, "thinking_budget": 9}.items():
        assert build(GenerateConfig, None, NEEDED | {name: value}).sampling() == {**built.sampling(), name: value}
    assert build(GenerateConfig, None, NEEDED | {"loop_stop": "64:8"}).sampling()["loop_stop"] == [64, 8]
