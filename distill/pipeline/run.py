"""`distill run`: a pipeline's file checked, planned and carried out; its manifest.

Everything that can be checked without a model is checked before anything is written. Two runs on one folder do not
mix: the second is refused while the first runs.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from distill import __version__
from distill.config.pipeline import RunConfig
from distill.errors import UserError
from distill.pipeline.commands import COMMANDS
from distill.pipeline.comparison import VERDICT
from distill.pipeline.document import Document
from distill.pipeline.expansion import expand
from distill.pipeline.plan import Planned, plan_stages
from distill.pipeline.processes import Step, run_steps
from distill.pipeline.reading import read_document
from distill.progress import say
from distill.store import write_json

MANIFEST, LOGS, LOCK = "manifest.json", "logs", ".lock"
_PACKAGES = ("torch", "transformers", "vllm", "ray", "peft", "math-verify")


def run_pipeline(config: RunConfig, command: Sequence[str], resolve: Callable[[str], str]) -> dict[str, Any]:
    """Carry out `distill run` and return the state of every stage; with `dry_run` change nothing.

    Args:
        command: how to start `distill`, such as `[python, cli.py]`.
        resolve: a MODEL to what loaders understand.

    Raises:
        UserError: see `plan`; or another run has the folder.
        RunError: a stage failed; its log is named. What was finished stays finished.
    """
    return carry_out(read_document(config.pipeline, config.var), config, command, resolve)


def run_arms(config: RunConfig, command: Sequence[str], resolve: Callable[[str], str]) -> dict[str, Any]:
    """Carry out a comparison's recipe up to its last stage, and return the options of that: what to compare, and how.

    Raises:
        UserError: as `run_pipeline`; or the file is no recipe of a comparison.
        RunError: as `run_pipeline`.
    """
    document = read_document(config.pipeline, config.var)
    planned = _plan(document, config, resolve)
    verdict = next((each for each in planned if each.stage.id == VERDICT), None)
    if verdict is None or verdict.stage.command != "compare":
        raise UserError(f"{config.pipeline} has no arms to compare: run it with `distill run`")
    _carry_out(document, [each for each in planned if each is not verdict], config, command)
    return dict(verdict.options)


def carry_out(
    document: Document, config: RunConfig, command: Sequence[str], resolve: Callable[[str], str]
) -> dict[str, Any]:
    """Plan a document and run its stages (see `run_pipeline`)."""
    return _carry_out(document, _plan(document, config, resolve), config, command)


def _out(document: Document, config: RunConfig) -> Path:
    out = config.out or document.out
    if out is None:
        raise UserError(f"{config.pipeline} has no `out`: name the folder with --out")
    return out


def _plan(document: Document, config: RunConfig, resolve: Callable[[str], str]) -> list[Planned]:
    return plan_stages(expand(document), _out(document, config), resolve)


def _carry_out(
    document: Document, planned: Sequence[Planned], config: RunConfig, command: Sequence[str]
) -> dict[str, Any]:
    out = _out(document, config)
    steps = {each.stage.id: _step(each, planned) for each in planned}
    if config.dry_run:
        return _result(out, planned, steps)
    jobs = config.jobs or _jobs()
    began = time.monotonic()
    with _locked(out):
        _tell_changes(config.pipeline, planned)
        _write_manifest(out, document, planned, steps)
        finished = sum(step.seconds(out / LOGS) is not None for step in steps.values())
        say(f"{len(steps)} stages in {out}, {finished} finished, {jobs} side by side")
        run_steps(
            list(steps.values()),
            command,
            logs=out / LOGS,
            jobs=jobs,
            threads=max(1, _cores() // jobs),
            after=lambda step, seconds: _write_manifest(out, document, planned, steps),
        )
    say(f"finished in {time.monotonic() - began:.0f} s")
    return _result(out, planned, steps)


def _step(this: Planned, planned: Sequence[Planned]) -> Step:
    names = {each.stage.id: each.name for each in planned}
    command = COMMANDS[this.stage.command]
    return Step(
        name=this.name,
        arguments=this.arguments,
        needs=tuple(names[need] for need in this.stage.needs),
        key=this.key,
        locks=str(getattr(this.config, command.locks)) if command.locks else "",
        launch=this.stage.launch,
        anew=command.anew,
    )


def _result(out: Path, planned: Sequence[Planned], steps: Mapping[str, Step]) -> dict[str, Any]:
    return {"out": str(out), "stages": {each.stage.id: _record(out, each, steps) for each in planned}}


def _record(out: Path, this: Planned, steps: Mapping[str, Step]) -> dict[str, Any]:
    """Return what the manifest says of a stage."""
    step = steps[this.stage.id]
    seconds = step.seconds(out / LOGS)
    state = "finished" if seconds is not None else "begun" if this.folder.exists() else "to do"
    return {
        "command": shlex.join([*this.stage.launch, "distill", *this.arguments]),
        "folder": str(this.folder),
        "key": this.key,
        "needs": list(this.stage.needs),
        "inputs": dict(this.inputs),
        "state": state,
        "seconds": seconds,
    }


def _write_manifest(out: Path, document: Document, planned: Sequence[Planned], steps: Mapping[str, Step]) -> None:
    """Write what was asked and what is done; `distill run` on it does the same again."""
    found = {name: version for name in _PACKAGES if (version := _version(name))}
    write_json(
        out / MANIFEST,
        {
            "pipeline": {**document.source, "out": str(out)},
            "versions": {"distill": __version__, "python": platform.python_version(), **found},
            **_result(out, planned, steps),
        },
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _tell_changes(pipeline: Path, planned: Sequence[Planned]) -> None:
    """Say which stages of a manifest are no longer what they were: other files, or another version of this program."""
    if pipeline.suffix != ".json":
        return
    before = json.loads(pipeline.read_text(encoding="utf-8")).get("stages")
    if not isinstance(before, Mapping):
        return
    changed = [
        each.stage.id
        for each in planned
        if isinstance(was := before.get(each.stage.id), Mapping) and was.get("key", each.key) != each.key
    ]
    if changed:
        say(f"not as in {pipeline} (settings, files that are read, or version): {', '.join(changed)}")


def _jobs() -> int:
    """Return how many stages run side by side unless told: two trainings on one GPU would only fight for its memory."""
    devices = Path("/dev")
    if any(devices.glob("nvidia[0-9]*")) or (devices / "kfd").exists():
        return 1
    return _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder against a second run; the lock dies with the process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("w")
    except OSError as error:
        raise UserError(f"cannot use {out} as the output folder: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run works in {out}: wait for it, or name another --out") from error
        yield
