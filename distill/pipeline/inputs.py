"""What a stage reads from outside the pipeline, as a text that changes when its content does.

Files and folders are hashed wherever they lie, so moving them changes nothing; models by `distill.identity`, which of
large weights reads samples. A hub id or a built-in name is its own identity: what stands behind it may change unseen,
as may what a Python function imports.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.dataset import data_file, sha256
from distill.errors import UserError
from distill.identity import model_identity
from distill.run_folder import RUN
from distill.store import JOURNAL, SIGNAL

_FUNCTION = re.compile(r"\b([A-Za-z_]\w*(?:\.\w+)*):[A-Za-z_]\w*")
_FILE = re.compile(r"(?!hf:)(?:[a-z][\w-]*:)?(.+\.(?:jsonl|json|csv|parquet))")
_PARTS = re.compile(r"([a-z][\w-]*:)?([^?]+)(\?.*)?", re.DOTALL)  # prune:MODEL?layers=12, svamp:FILE


class Inputs:
    """Identities of what lies outside, each worked out once.

    Args:
        resolve: a MODEL to what loaders understand, such as the folder of the embedded teacher.
    """

    def __init__(self, resolve: Callable[[str], str]) -> None:
        self.resolve = resolve
        self.known: dict[tuple[str, str], str] = {}

    def identify(self, kind: str, value: str) -> str:
        """Return the identity of one thing that is read.

        Args:
            kind: a key of `distill.pipeline.commands.KINDS`.

        Raises:
            UserError: a file, folder or model that does not exist or cannot be read.
        """
        if (kind, value) not in self.known:
            try:
                self.known[kind, value] = self._identify(kind, value)
            except OSError as error:
                raise UserError(f"cannot read {error.filename or value}: {error.strerror or error}") from error
        return self.known[kind, value]

    def _identify(self, kind: str, value: str) -> str:
        if kind == "code":
            return _with_sources(value)
        if kind in ("model", "teacher"):
            return self._model(value)
        if kind == "prompts" or (kind == "data" and not Path(value).exists()):
            return _prompts(value)
        if kind == "data":
            file = data_file(Path(value))
            # Of a store, its questions (grpo) and its stored numbers are read as well, where no others are named.
            beside = [file.parent / JOURNAL, file.parent / SIGNAL] if Path(value).is_dir() else []
            return "".join(_content(path) for path in [file, *beside] if path.exists())
        path = Path(value).expanduser()
        if not path.exists():
            raise UserError(f"{value} does not exist")
        return _content(path)

    def _model(self, value: str) -> str:
        parts = _PARTS.fullmatch(value)
        before, name, after = (part or "" for part in parts.groups()) if parts else ("", value, "")
        if Path(value).expanduser().exists():
            before, name, after = "", value, ""
        located = self.resolve(name)
        folder = Path(located).expanduser()
        if name.startswith((".", "/", "~")) and not folder.exists():
            raise UserError(f"no model at {name}: there is no such folder or file")
        # A training's ledger goes into evaluations of its model; a store of traces speaks for its teacher (replay).
        beside = [_content(folder / file) for file in (RUN, JOURNAL) if (folder / file).is_file()]
        return "".join([before, model_identity(located), after, *beside])


def _prompts(value: str) -> str:
    path = Path(value).expanduser()
    if path.is_file():
        return _content(path)
    named = _FILE.fullmatch(value)
    if named is None and "/" in value and ":" not in value:
        raise UserError(f"{value} does not exist")
    if named is None:
        return value  # nano:1-2, hf:owner/name, reasoning-gym:task, gsm8k
    file = Path(named[1]).expanduser()
    if not file.is_file():
        raise UserError(f"{value} does not exist: no such file of prompts")
    return f"{value.removesuffix(named[1])}{_content(file)}"


def _content(path: Path) -> str:
    """Return a hash of a file, or of all files below a folder with their names; hidden ones are not looked at."""
    if path.is_file():
        return f"{path.suffix}:{sha256(path)}"  # the suffix says how it is read
    digest = hashlib.sha256()
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    for file in files:
        inside = file.relative_to(path)
        if not any(part.startswith(".") for part in inside.parts):
            digest.update(f"{inside.as_posix()}:{sha256(file)}\n".encode())
    return f"folder:{digest.hexdigest()}"


def _with_sources(value: str) -> str:
    """Return a value with the hash of the source of every `package.module:function` that it names."""
    found: dict[str, Any] = {}
    for module in sorted(set(_FUNCTION.findall(value))):
        try:
            spec = importlib.util.find_spec(module)
        except Exception:  # looking runs the packages around it, which may raise anything; the command says it better
            spec = None
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            found[module] = sha256(Path(spec.origin))
    return value + "".join(f" {module}={digest}" for module, digest in found.items())
