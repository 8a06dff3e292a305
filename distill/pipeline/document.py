"""A pipeline's file as checked templates of stages: names, commands and options are known, references are not resolved.

    out: runs/x
    vars: {rate: 1e-3}
    rewards: {maths: [accuracy=1.0, format=0.2]}
    stages:
      student: {command: train, for: {seed: [0, 1, 2]}, ...options of the command...}

A stage may also have `launch`, what its process is started with (`accelerate launch --config_file F`). A manifest of an
earlier run holds such a document under `pipeline`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config import key_values
from distill.errors import UserError
from distill.pipeline.commands import COMMANDS
from distill.pipeline.references import Reference, pieces, references
from distill.tables import suggest

TOP = ("out", "vars", "rewards", "stages")
WORDS = ("command", "for", "launch")  # of a stage, beside the options of its command
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_LABEL = re.compile(r"[^\s,\[\]{}=*$]+")


@dataclass(frozen=True, slots=True)
class Label:
    """One value of an axis: what `${axis}` is, and the options it brings into the stage that declares it."""

    value: Any
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Template:
    """One stage as written; `axes` are those of its `for`, label by label."""

    name: str
    command: str
    launch: tuple[str, ...]
    axes: Mapping[str, Mapping[str, Label]]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """A pipeline's file; `source` is the mapping that it was, with the values of `--var` in it."""

    out: Path | None
    values: Mapping[str, Mapping[str, Any]]  # vars, rewards
    stages: Mapping[str, Template]
    source: Mapping[str, Any]


def parse_document(content: Any, variables: list[str] | None = None) -> Document:
    """Check a pipeline's content as far as can be seen without resolving references.

    Args:
        variables: NAME=VALUE in place of what `vars` says.

    Raises:
        UserError: not the mapping described above; an unknown word, command, option or variable (the nearest is named).
    """
    if not isinstance(content, Mapping):
        raise UserError(f"a pipeline is a mapping of {', '.join(TOP)}, not {type(content).__name__}")
    _known(content, TOP, "a pipeline has no")
    values = {section: _mapping(content.get(section) or {}, section) for section in ("vars", "rewards")}
    changed = key_values(variables or [], "--var", values["vars"])
    values["vars"] = {**values["vars"], **changed}
    for section, entries in values.items():
        for found in references(dict(entries)):
            raise UserError(f"{section} holds the reference {found.text}; its values are plain")
    for name, listed in values["rewards"].items():
        if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
            raise UserError(f"rewards: {name} must be a list of name=weight, not {listed!r}")
    stages = _mapping(content.get("stages") or {}, "stages")
    if not stages:
        raise UserError("a pipeline needs stages: name: {command: ..., ...}")
    source = {**content, **({"vars": dict(values["vars"])} if values["vars"] else {})}
    templates = {str(name): _template(name, stage, values, stages) for name, stage in stages.items()}
    out = content.get("out")
    if out is not None and not isinstance(out, str):
        raise UserError(f"out must be a folder's name, not {out!r}")
    return Document(Path(out) if out else None, values, templates, source)


def value_of(reference: Reference, values: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return what `${vars.x}` or `${rewards.x}` stands for.

    Raises:
        UserError: there is no such name.
    """
    section = values[reference.name]
    if reference.key is None or reference.key not in section or reference.index is not None:
        near = suggest(reference.key or "", section)
        raise UserError(f"{reference.text}: {reference.name} has {', '.join(map(str, section)) or 'nothing'}{near}")
    return section[reference.key]


def _template(name: Any, stage: Any, values: Mapping[str, Mapping[str, Any]], stages: Mapping[str, Any]) -> Template:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in values:
        raise UserError(f"stages: {name!r} is no name: allowed are letters, digits, - and _, and not vars or rewards")
    where = f"stage {name}"
    stage = _mapping(stage, where)
    command = stage.get("command")
    if command not in COMMANDS:
        raise UserError(
            f"{where}: command {command!r} is unknown: {', '.join(COMMANDS)}{suggest(str(command), COMMANDS)}"
        )
    launch = stage.get("launch", "")
    if not isinstance(launch, str):
        raise UserError(f"{where}: launch is what the command line begins with, a text, not {launch!r}")
    options = {key: value for key, value in stage.items() if key not in WORDS}
    axes: dict[str, dict[str, Label]] = {}
    for axis, written in _mapping(stage.get("for") or {}, f"{where}: for").items():
        if not isinstance(axis, str) or not _NAME.fullmatch(axis) or axis in stages or axis in values:
            raise UserError(f"{where}: for: {axis!r} is no name of an axis: letters and digits, and no stage's name")
        axes[axis] = _labels(f"{where}: for: {axis}", _from_vars(written, values))
    for given in [options, *(label.options for labels in axes.values() for label in labels.values())]:
        _check_options(where, command, given)
    return Template(name, command, tuple(shlex.split(launch)), axes, options)


def _from_vars(written: Any, values: Mapping[str, Mapping[str, Any]]) -> Any:
    """Resolve an axis that is written as `${vars.seeds}`; the options of its labels keep their references."""

    def answer(reference: Reference) -> Any:
        if reference.name not in values:
            raise UserError(f"for: {reference.text} is no list: allowed are [a, b], {{a: options}} and ${{vars.name}}")
        return value_of(reference, values)

    if not isinstance(written, str):
        return written
    found = pieces(written)
    return answer(found[0]) if len(found) == 1 and isinstance(found[0], Reference) else written


def _labels(where: str, written: Any) -> dict[str, Label]:
    if isinstance(written, Mapping):
        entries = [(key, key, _mapping(options or {}, f"{where}: {key}")) for key, options in written.items()]
    elif isinstance(written, list):
        entries = [(value, value, {}) for value in written]
    else:
        raise UserError(f"{where} must be a list of values, or a mapping of names to options, not {written!r}")
    labels: dict[str, Label] = {}
    for key, value, options in entries:
        label = str(key)
        if isinstance(key, (list, Mapping)) or key is None or not _LABEL.fullmatch(label):
            raise UserError(f"{where}: {key!r} cannot name an instance: no spaces and none of , [ ] {{ }} = * $")
        if label in labels:
            raise UserError(f"{where}: {label} stands there twice")
        labels[label] = Label(value, options)
    if not labels:
        raise UserError(f"{where} is empty: it needs at least one value")
    return labels


def _check_options(where: str, name: str, options: Mapping[str, Any]) -> None:
    command = COMMANDS[name]
    refused = {
        "out": "a stage's folder is made from its name and settings",
        "resume": "every stage is resumed",
        **command.refused,
    }
    fields = command.config.model_fields
    for key, value in options.items():
        if key in refused:
            raise UserError(f"{where}: {key} is no option of a stage: {refused[key]}")
        if key not in fields:
            raise UserError(f"{where}: unknown option {key!r} of {name}{suggest(str(key), [*fields, *WORDS])}")
        try:
            list(references(value))
        except UserError as error:
            raise UserError(f"{where}: {key}: {error}") from error
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, (list, Mapping)) for item in items):
            raise UserError(f"{where}: {key} must be a value or a list of values, not {value!r}")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a mapping, not {value!r}")
    return dict(value)


def _known(given: Mapping[Any, Any], allowed: tuple[str, ...], what: str) -> None:
    for key in given:
        if key not in allowed:
            raise UserError(f"{what} {key!r}: allowed are {', '.join(allowed)}{suggest(str(key), allowed)}")
