"""Stages to a plan: each one's settings checked by its command's own model, its hash, its folder, its command line.

The hash of a stage is made of its command, of all its settings but those that cannot change a result, of what it reads
(other stages by their folders' names, which have their hashes in them; the rest by content) and of this version.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import __version__
from distill.config import Section, build
from distill.errors import UserError
from distill.pipeline.commands import COMMANDS, KINDS
from distill.pipeline.expansion import Stage
from distill.pipeline.inputs import Inputs
from distill.pipeline.references import Output, Text, outputs, render
from distill.records import content_hash

_IN_KEY = "stage:"  # before a folder's name in a hash, where no file of the same name can be meant


@dataclass(frozen=True, slots=True)
class Planned:
    """A stage ready to run: `key` is its whole hash, `arguments` its command line without `distill`.

    `options` are its settings with the folders of other stages in them; `config` is all its settings, checked, where
    those folders have the names that the hash knows them by.
    """

    stage: Stage
    key: str
    folder: Path
    config: Section
    options: Mapping[str, Any]
    arguments: tuple[str, ...]
    inputs: Mapping[str, str]  # what it reads from outside -> identity

    @property
    def name(self) -> str:
        """The name of its folder, log and mark."""
        return self.folder.name


def plan_stages(stages: list[Stage], out: Path, resolve: Callable[[str], str]) -> list[Planned]:
    """Return the plan of stages, in their order.

    Args:
        out: the folder that gets theirs.
        resolve: see `Inputs`.

    Raises:
        UserError: wrong settings of a stage, something read that does not exist or is of another kind, or two instances
            of one stage that would do the same.
    """
    planned: dict[str, Planned] = {}
    inputs = Inputs(resolve)
    for stage in stages:
        try:
            _check_kinds(stage, planned)
            this = _plan(stage, out, planned, inputs)
        except UserError as error:
            raise UserError(f"stage {stage.id}: {error}") from error
        for other in planned.values():
            if other.stage.name == stage.name and other.key == this.key:
                axes = [axis for axis, label in stage.labels.items() if other.stage.labels[axis] != label]
                raise UserError(
                    f"stage {stage.id} would do the same as {other.stage.id}: use "
                    f"{' and '.join(f'${{{axis}}}' for axis in axes)} in its options"
                )
        planned[stage.id] = this
    return list(planned.values())


def _plan(stage: Stage, out: Path, planned: Mapping[str, Planned], inputs: Inputs) -> Planned:
    command = COMMANDS[stage.command]
    named = {key: render(value, lambda id: _IN_KEY + planned[id].name) for key, value in stage.options.items()}
    # As the command line will say it, and with any folder: it takes part in no hash.
    checked = build(command.config, None, {**{key: _text(value) for key, value in named.items()}, "out": "."})
    outside: dict[str, str] = {}
    settings: dict[str, Any] = {}
    for name, value in checked.model_dump(mode="json").items():
        if name not in command.free | {"out"}:
            kind = command.reads.get(name)
            settings[name] = _identities(value, kind, inputs, outside) if kind else value
    key = content_hash({"command": stage.command, "launch": stage.launch, "settings": settings, "version": __version__})
    words = [stage.name, *(re.sub(r"[^\w.-]+", "-", label) for label in stage.labels.values()), key[:8]]
    folder = out / "-".join(words)
    typed = {key: render(value, lambda id: str(planned[id].folder)) for key, value in stage.options.items()}
    line = (stage.command, *_flags(checked, typed, positional=True), *_flags(checked, typed, positional=False))
    return Planned(stage, key, folder, checked, typed, (*line, *command.always, "--out", str(folder)), outside)


def _identities(value: Any, kind: str, inputs: Inputs, outside: dict[str, str]) -> Any:
    """Return a setting with identities in place of what it reads outside, which are noted in `outside`."""
    if isinstance(value, list):
        return [_identities(each, kind, inputs, outside) for each in value]
    if value is None or _IN_KEY in str(value):
        return value
    identity = inputs.identify(kind, str(value))
    if identity != str(value):
        outside[str(value)] = identity
    return identity


def _check_kinds(stage: Stage, planned: Mapping[str, Planned]) -> None:
    """Refuse a folder of one kind where another is read: after hours of training it would be known too late."""
    for option, value in stage.options.items():
        kind = COMMANDS[stage.command].reads.get(option)
        if kind is None:
            continue
        for output in outputs(value):
            theirs = planned[output.stage].stage.command
            makes, allowed = COMMANDS[theirs].makes, KINDS[kind]
            if makes not in allowed:
                makers = ", ".join(name for name, each in COMMANDS.items() if each.makes in allowed) or "no stage"
                raise UserError(f"{option} reads {output.stage}, which {theirs} makes; it can read what {makers} makes")
        if kind == "model":
            _check_milestone(value, planned)


def _check_milestone(value: Any, planned: Mapping[str, Planned]) -> None:
    if not isinstance(value, Text) or len(value.parts) != 2 or not isinstance(value.parts[0], Output):
        return
    milestone = re.fullmatch(r"/milestones/(\d+)", str(value.parts[1]))
    written = getattr(planned[value.parts[0].stage].config, "milestones", None) or 1
    if milestone and not 1 <= int(milestone[1]) < written:
        has = f"has the milestones 1 to {written - 1}" if written > 1 else "is not told to write milestones"
        raise UserError(f"{value.parts[0].stage} {has}: there is no {milestone[0][1:]}")


def _text(value: Any) -> Any:
    """Return a value as a command line has it: text, but for truth values, which are flags of their own."""
    if isinstance(value, list):
        return [_text(each) for each in value]
    return value if isinstance(value, bool) else str(value)


def _flags(checked: Section, options: Mapping[str, Any], *, positional: bool) -> Iterator[str]:
    """Yield the arguments, or the flags, that say these options."""
    for key, value in options.items():
        extra = type(checked).model_fields[key].json_schema_extra
        if (isinstance(extra, dict) and bool(extra.get("argument"))) != positional:
            continue
        flag = "--" + key.replace("_", "-")
        if isinstance(truth := getattr(checked, key), bool):
            yield flag if truth else f"--no-{flag[2:]}"
            continue
        for each in value if isinstance(value, list) else [value]:
            yield from ([str(each)] if positional else [flag, str(each)])
