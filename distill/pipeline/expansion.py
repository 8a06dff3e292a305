"""Templates to stages: every combination of a stage's axes is one, and follows what it reads.

A stage has the axes of its own `for`, and those of every stage it reads as `${name}`: it is made once for each instance
of that, and reads the one with the same labels. `${name[axis=*]}` gathers instead, and `${name[axis=label]}` picks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distill.errors import UserError
from distill.pipeline.document import Document, Label, Template, value_of
from distill.pipeline.references import ALL, ONLY, Output, Reference, fill, outputs, references
from distill.tables import suggest

Axes = Mapping[str, Mapping[str, Label]]


@dataclass(frozen=True, slots=True)
class Stage:
    """One instance of a template: `labels` is axis -> label, `options` hold `Output`s for the stages in `needs`."""

    name: str
    labels: Mapping[str, str]
    command: str
    launch: tuple[str, ...]
    options: Mapping[str, Any]
    needs: tuple[str, ...]

    @property
    def id(self) -> str:
        """How the stage is addressed: `student`, or `student[0]`."""
        return instance_id(self.name, self.labels.values())


def instance_id(name: str, labels: Iterable[str]) -> str:
    """Return the id of one instance of a template."""
    listed = ",".join(labels)
    return f"{name}[{listed}]" if listed else name


def expand(document: Document) -> list[Stage]:
    """Return every stage of a pipeline, in an order in which they can run.

    Raises:
        UserError: an unknown reference (the nearest name is told), stages that read each other in a circle, or an index
            that does not fit.
    """
    axes: dict[str, Axes] = {}
    stages: list[Stage] = []
    for template in _ordered(document):
        try:
            axes[template.name] = _axes(template, axes)
            stages += _instances(template, axes, document.values)
        except UserError as error:
            raise UserError(f"stage {template.name}: {error}") from error
    return stages


def _read(template: Template) -> Iterator[Reference]:
    """Yield the references of a template, those its labels bring included."""
    yield from references(dict(template.options))
    for labels in template.axes.values():
        for label in labels.values():
            yield from references(dict(label.options))


def _ordered(document: Document) -> list[Template]:
    """Return the templates so that each stands after those it reads, and otherwise as in the file."""
    done: dict[str, Template] = {}
    path: list[str] = []

    def visit(name: str) -> None:
        if name in path:
            circle = " -> ".join([*path[path.index(name) :], name])
            raise UserError(f"these stages read each other in a circle: {circle}")
        if name in done:
            return
        path.append(name)
        for reference in _read(document.stages[name]):
            if reference.name in document.stages:
                visit(reference.name)
        path.pop()
        done[name] = document.stages[name]

    for name in document.stages:
        visit(name)
    known = {axis for template in done.values() for axis in template.axes}
    for template in done.values():
        for reference in _read(template):
            if reference.name not in {*done, *known, *document.values}:
                near = suggest(reference.name, [*done, *template.axes])
                raise UserError(f"stage {template.name}: {reference.text} is no stage, axis, vars or rewards{near}")
    return list(done.values())


def _axes(template: Template, known: Mapping[str, Axes]) -> Axes:
    """Return the axes of a template: its own, then those it follows."""
    found: dict[str, Mapping[str, Label]] = {}
    for reference in _read(template):
        if reference.name not in known:
            continue
        theirs = known[reference.name]
        index = _index(reference, theirs)
        for axis, labels in theirs.items():
            if axis in index:
                continue
            if axis in found and axis not in template.axes and found[axis].keys() != labels.keys():
                raise UserError(
                    f"{reference.text} has {_listed(labels)} as {axis}, another stage that is read "
                    f"{_listed(found[axis])}: say which are meant with `for: {{{axis}: [...]}}`"
                )
            found.setdefault(axis, {label: Label(each.value, {}) for label, each in labels.items()})
    return {**template.axes, **{axis: labels for axis, labels in found.items() if axis not in template.axes}}


def _index(reference: Reference, axes: Axes) -> dict[str, str]:
    """Return a reference's index with every axis named; axes that are not in it are followed.

    Raises:
        UserError: an axis or a label that the stage does not have.
    """
    index = dict(reference.index or {})
    if reference.key is not None:
        raise UserError(f"{reference.text} is no value: a stage is its folder, ${{{reference.name}}}")
    if ONLY in index:
        if index == {ONLY: ALL}:
            return dict.fromkeys(axes, ALL)
        if len(axes) != 1 or len(index) != 1:
            named = ", ".join(f"{axis}=..." for axis in axes)
            has = f"write ${{{reference.name}[{named}]}}" if axes else "that stage has no `for`"
            raise UserError(f"{reference.text} does not say which axis is meant: {has}")
        index = {next(iter(axes)): index[ONLY]}
    for axis, label in index.items():
        if axis not in axes:
            raise UserError(f"{reference.text}: {reference.name} has no axis {axis}, but {_listed(axes) or 'none'}")
        if label != ALL and label not in axes[axis]:
            raise UserError(f"{reference.text}: {reference.name} has no {axis} {label}, but {_listed(axes[axis])}")
    return index


def _instances(
    template: Template, known: Mapping[str, Axes], values: Mapping[str, Mapping[str, Any]]
) -> Iterator[Stage]:
    axes = known[template.name]
    for chosen in itertools.product(*(labels.items() for labels in axes.values())):
        labels = {axis: label for axis, (label, _) in zip(axes, chosen, strict=True)}
        here = {axis: each.value for axis, (_, each) in zip(axes, chosen, strict=True)}

        def answer(reference: Reference, labels: dict[str, str] = labels, here: dict[str, Any] = here) -> Any:
            if reference.name in values:
                return value_of(reference, values)
            if reference.name in here and reference.key is None and reference.index is None:
                return here[reference.name]
            if reference.name in known:
                return _chosen(reference, known[reference.name], labels)
            raise UserError(f"{reference.text} is no axis of this stage: it has {_listed(axes) or 'none'}")

        options = dict(template.options)
        for _, label in chosen:
            options |= label.options
        filled = {key: fill(value, answer) for key, value in options.items() if value is not None}
        needs = tuple(dict.fromkeys(each.stage for value in filled.values() for each in outputs(value)))
        yield Stage(template.name, labels, template.command, template.launch, filled, needs)


def _chosen(reference: Reference, axes: Axes, labels: Mapping[str, str]) -> Output | list[Output]:
    """Return the instance a reference means to the instance with these labels, or the several it gathers."""
    index = _index(reference, axes)
    wanted = []
    for axis, theirs in axes.items():
        label = index.get(axis, labels.get(axis, ""))
        if label != ALL and label not in theirs:
            raise UserError(f"{reference.text}: {reference.name} has no {axis} {label}, but {_listed(theirs)}")
        wanted.append(list(theirs) if label == ALL else [label])
    found = [Output(instance_id(reference.name, each)) for each in itertools.product(*wanted)]
    return found if ALL in index.values() else found[0]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
