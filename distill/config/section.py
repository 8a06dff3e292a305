"""What every command's settings are made of: a strict pydantic model, filled from a YAML file and from flags.

Unknown keys, and values of the wrong kind, are errors that name the key and suggest the nearest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from distill.errors import UserError
from distill.tables import suggest

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A frozen group of settings that refuses what it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_truth_value_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads yes and on as true, and pydantic would take that for 1.
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise PydanticCustomError("no_truth_value", "Input should not be true or false")
        return value


C = TypeVar("C", bound=Section)


class _OneOfEach(yaml.SafeLoader):
    """Refuses a key that stands in a mapping twice: YAML would keep the last, and the other would be gone unseen."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)  # before `<<` brings in keys that may be beaten
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise UserError(
                    f"has the key {key.value!r} twice in one mapping, again in line {key.start_mark.line + 1}"
                )
            seen.add(name)
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping of a YAML file.

    Raises:
        UserError: no such file, not YAML, a key that stands there twice, or not a mapping.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _OneOfEach)
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except Exception as error:  # PyYAML lets through what its readers raise: ValueError for the date 2026-13-01, ...
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} must hold a mapping of option: value, not {type(loaded).__name__}")
    return loaded


def key_values(pairs: Iterable[str], flag: str, known: Iterable[str] | None = None) -> dict[str, Any]:
    """Parse `key=value` arguments; values are read as YAML, so `true`, `8` and `0.9` keep their kinds.

    Args:
        flag: the option they were given to.

    Raises:
        UserError: no `=` in one, a value that is not YAML, or a key outside `known`.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UserError(f"{flag} takes key=value, not {pair!r}")
        if known is not None and key not in known:
            listed = ", ".join(known) or "none"
            raise UserError(f"{flag} {key!r} is unknown here: allowed are {listed}{suggest(key, known)}")
        try:
            parsed = yaml.safe_load(value) if value else value
            # YAML 1.1 reads 1:30 as ninety; here it is a pair.
            options[key] = value if isinstance(parsed, int) and ":" in value else parsed
        except Exception as error:  # PyYAML lets through what its readers raise
            raise UserError(f"{flag} {pair!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    return options


def build(model: type[C], file: Path | None, flags: Mapping[str, Any]) -> C:
    """Merge a recipe file and the flags given (a flag beats the file) into a checked config.

    Raises:
        UserError: an unknown key (the nearest is suggested), a missing one, or a value of the wrong kind.
    """
    values = read_yaml(file) if file else {}
    for key in values:
        if key not in model.model_fields:
            where = f"{file}: " if file else ""
            raise UserError(f"{where}unknown option {key!r}{suggest(str(key), model.model_fields)}")
    values.update(flags)
    try:
        return model(**values)
    except ValidationError as error:
        problems = [_one_line(model, problem) for problem in error.errors()]
        raise UserError("; ".join(problems)) from error


def _one_line(model: type[Section], problem: Any) -> str:
    name = str(problem["loc"][0])
    extra = model.model_fields[name].json_schema_extra
    flag = name.upper() if isinstance(extra, dict) and extra.get("argument") else "--" + name.replace("_", "-")
    if problem["type"] == "missing":
        return f"{flag} is required"
    return f"{flag}: {problem['msg'][0].lower()}{problem['msg'][1:]} (given {problem['input']!r})"
