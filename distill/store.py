"""The trace store on disk: an append-only journal, and views made from it.

`traces.jsonl` is the journal: one line per sample, accepted or not, in order of completion, fsynced in small groups.
A crash loses at most the samples in flight; a torn last line is dropped when the store is opened again and its
sample is generated anew. `kept.jsonl`, `rejected.jsonl` and `funnel.json` are views: made anew from the journal,
written beside and renamed, so a reader never sees half of one. One writer at a time, by an OS lock that dies with
its process. What is kept is not decided here (see teachers/filters/).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from distill.errors import RunError, UserError
from distill.records import Judgement, Trace

JOURNAL, KEPT, REJECTED, FUNNEL, MANIFEST = (
    "traces.jsonl",
    "kept.jsonl",
    "rejected.jsonl",
    "funnel.json",
    "manifest.json",
)
SIGNAL = "signal"  # the folder of what a teacher said of every token (`distill.signals`)


def dump_line(row: Mapping[str, Any]) -> str:
    """Return one JSON line. Lone surrogates stay escaped, so any text a model emits can be written as UTF-8."""
    try:
        text = json.dumps(row, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(row, ensure_ascii=True)
    return text + "\n"


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Write a JSON file whole or not at all."""
    with replacing(path) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=True)
        stream.write("\n")


class replacing:
    """Context manager: a text file that takes its place only when the block ends well.

    Raises:
        RunError: the disk is full, or takes no file there; the file that was there stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> IO[str]:
        try:
            self.stream = self.temporary.open("w", encoding="utf-8")
        except OSError as error:
            raise full_disk(error, self.path) from error
        return self.stream

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self.stream.flush()
                os.fsync(self.stream.fileno())
                self.stream.close()
                self.temporary.replace(self.path)
                return
        except OSError as problem:
            error = problem
        finally:
            if not self.stream.closed:
                # A full disk refuses the buffered rest too; the file is thrown away all the same.
                with contextlib.suppress(OSError):
                    self.stream.close()
            self.temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise full_disk(error, self.path) from error


def full_disk(error: OSError, path: Path) -> RunError:
    """Return the one-line error for a write that the disk refused; what was written before is safe."""
    what = "no space left on the disk" if error.errno == errno.ENOSPC else (error.strerror or str(error))
    return RunError(f"cannot write {path}: {what}; everything finished before is kept, run the same command again")


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSONL file, skipping blank lines.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object (named by number).
    """
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                if raw.strip():
                    yield number, _object(raw, path, number)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _object(raw: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} line {number} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} line {number} must be a JSON object, not {type(value).__name__}")
    return value


class TraceStore:
    """One trace store opened for writing; use as a context manager. Reading needs only `read_traces`."""

    def __init__(self, folder: Path, *, journal: str = JOURNAL, sync_every: int = 16) -> None:
        self.folder = folder
        self.path = folder / journal
        self.sync_every = sync_every
        self.unsynced = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = (folder / ".lock").open("w")
        except OSError as error:
            raise UserError(f"cannot use {folder} as the output folder: {error.strerror or error}") from error
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.lock.close()
            raise UserError(f"another process is writing to {folder}; wait for it or name another --out") from error
        try:
            for unfinished in folder.glob(".*.json*.[0-9]*"):  # of a view that a killed run was writing
                unfinished.unlink()
            self.torn_bytes = mend(self.path)
            self._open_journal()
        except OSError as error:
            self.lock.close()
            raise UserError(f"cannot use {folder} as the output folder: {error.strerror or error}") from error

    def _open_journal(self) -> None:
        # Unbuffered: after a refused write no half line may wait in a buffer and land in the journal later.
        self.journal = self.path.open("ab", buffering=0)

    def __enter__(self) -> TraceStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def claim(self, recipe: Mapping[str, Any], *, own: Collection[str] = (), **facts: Any) -> None:
        """Bind the folder to a recipe: the settings that must not change between two runs on one store.

        Args:
            own: names that the command itself may have put into a new folder.
            facts: more to note in a new manifest, which may differ later (where the model lay, for one).

        Raises:
            UserError: the folder holds samples of another recipe (the differing settings are named), or something else.
        """
        path = self.folder / MANIFEST
        if not path.exists():
            known = {".lock", self.path.name, *own, *(f".{name}" for name in own)}
            foreign = sorted(each.name for each in self.folder.iterdir() if each.name not in known)
            if foreign or self.path.stat().st_size:
                what = (
                    f"files of something else ({', '.join(foreign[:3])})" if foreign else f"samples but no {MANIFEST}"
                )
                raise UserError(f"{self.folder} has {what}: name another --out")
            write_json(path, {"recipe": dict(recipe), **facts})
            return
        before = read_manifest(self.folder).get("recipe", {})
        if not self.path.stat().st_size:  # nothing was drawn for the recipe that claimed it
            write_json(path, {"recipe": dict(recipe), **facts})
            return
        differing = [key for key in recipe if before.get(key) != recipe[key]]
        if differing:
            listed = ", ".join(f"{key} is {before.get(key)!r} there and {recipe[key]!r} here" for key in differing)
            raise UserError(f"{self.folder} belongs to another recipe ({listed}): name another --out")

    def append(self, trace: Trace) -> None:
        """Add one line to the journal.

        Raises:
            RunError: the disk is full. A partly written line is cut off again, so the journal stays whole.
        """
        line = memoryview(dump_line(trace.to_json()).encode("utf-8"))
        whole = os.fstat(self.journal.fileno()).st_size
        try:
            while line:
                line = line[self.journal.write(line) :]
            self.unsynced += 1
            if self.unsynced >= self.sync_every:
                self.sync()
        except OSError as error:
            os.truncate(self.path, whole)
            raise full_disk(error, self.path) from error

    def replace_journal(self, traces: Iterable[Trace]) -> None:
        """Write the journal anew, whole or not at all; `traces` may read the old one while it does."""
        with replacing(self.path) as stream:
            for trace in traces:
                stream.write(dump_line(trace.to_json()))
        self.journal.close()
        self._open_journal()

    def sync(self) -> None:
        """Make every appended line survive a power cut."""
        os.fsync(self.journal.fileno())
        self.unsynced = 0

    def close(self) -> None:
        """Sync, close and give the lock back."""
        try:
            self.sync()
            self.journal.close()
        except OSError as error:
            raise full_disk(error, self.path) from error
        finally:
            self.lock.close()


def mend(journal: Path) -> int:
    """Cut a torn last line (a crash in mid-write) off a journal; return the bytes cut."""
    if not journal.exists():
        return 0
    with journal.open("rb+") as stream:
        size = stream.seek(0, os.SEEK_END)
        end = size
        while end:
            start = max(0, end - 65536)
            stream.seek(start)
            newline = stream.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        stream.truncate(end)
        return size - end


def read_traces(path: Path) -> Iterator[Trace]:
    """Yield the traces of a store (its folder, or one journal file) in order; a torn last line is passed over.

    Raises:
        UserError: no such store, or a damaged line (named by number).
    """
    path = path / JOURNAL if path.is_dir() or path.suffix != ".jsonl" else path
    if not path.is_file():
        raise UserError(f"{path.parent} is not a trace store: it has no {path.name}")
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if not raw.endswith(b"\n"):
                return
            row = _object(raw, path, number)
            try:
                yield Trace.from_json(row)
            except (KeyError, TypeError) as error:
                raise UserError(f"{path} line {number} is not a trace: {error}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return `manifest.json`.

    Raises:
        UserError: missing or damaged.
    """
    path = folder / MANIFEST
    try:
        return _object(path.read_bytes(), path, 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def write_views(
    folder: Path, out: Path, judge: Callable[[Trace], Judgement], facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Make `kept.jsonl`, `rejected.jsonl` and `funnel.json` in `out` from the journal in `folder`; return the funnel.

    Args:
        judge: says why a trace is rejected, if it is, and what its flags are, seen beside the rest of the store. A
            failed sample (`error` set) is not judged: it is retried by the next run and counted as `failed`.
        facts: more to note in the funnel.
    """
    first_reason: dict[str, int] = {}
    any_reason: dict[str, int] = {}
    flags: dict[str, dict[str, int]] = {}
    samples = kept = failed = 0
    with replacing(out / KEPT) as kept_stream, replacing(out / REJECTED) as rejected_stream:
        for trace in latest(folder):
            samples += 1
            if trace.error is not None:
                failed += 1
                rejected_stream.write(dump_line({**trace.to_json(), "reasons": ["failed"]}))
                continue
            judgement = judge(trace)
            reasons, trace = judgement.reasons, replace(trace, flags=judgement.flags)
            for flag in judgement.flags:
                count = flags.setdefault(flag.partition(": ")[0], {"samples": 0, "kept": 0})
                count["samples"] += 1
                count["kept"] += not reasons
            if not reasons:
                kept += 1
                kept_stream.write(dump_line(as_conversation(trace)))
                continue
            first_reason[reasons[0]] = first_reason.get(reasons[0], 0) + 1
            for reason in reasons:
                any_reason[reason] = any_reason.get(reason, 0) + 1
            rejected_stream.write(dump_line({**trace.to_json(), "reasons": list(reasons)}))
    if failed:
        first_reason["failed"] = any_reason["failed"] = failed
    funnel = {
        "samples": samples,
        "kept": kept,
        "rejected": dict(sorted(first_reason.items(), key=lambda item: -item[1])),  # by first reason: these add up
        "reasons": dict(sorted(any_reason.items(), key=lambda item: -item[1])),  # by any reason: these overlap
        "flags": dict(sorted(flags.items(), key=lambda item: -item[1]["samples"])),  # what dropping them would cost
        **(facts or {}),
    }
    write_json(out / FUNNEL, funnel)
    return funnel


def latest(folder: Path) -> Iterator[Trace]:
    """Yield one trace per uid: a failed sample that a later run repeated is passed over, so nothing counts twice."""
    repeated: dict[str, int] = {}
    for trace in read_traces(folder):
        repeated[trace.uid] = repeated.get(trace.uid, 0) + 1
    for trace in read_traces(folder):
        repeated[trace.uid] -= 1
        if repeated[trace.uid] == 0:
            yield trace


def as_conversation(trace: Trace) -> dict[str, Any]:
    """Return a line of `kept.jsonl`: the trace with the assistant's turn inside `messages`, as trainers read it.

    No `completion` column stands beside `messages` (TRL looks at either to tell what kind of dataset it has), and
    every column keeps one type from line to line, because Arrow readers infer one schema for the whole file: texts are
    empty where there is none, `meta` and `flags` are JSON texts.
    """
    row = trace.to_json()
    row["messages"] = [*row["messages"], {"role": "assistant", "content": row.pop("completion")}]
    for name in ("meta", "flags"):
        row[name] = json.dumps(row[name], sort_keys=True)
    row["verdicts"] = [{**verdict, "predicted": verdict["predicted"] or ""} for verdict in row["verdicts"]]
    row["gold"], row["predicted"] = trace.gold or "", trace.predicted or ""
    del row["error"]  # a kept trace has none
    return row
