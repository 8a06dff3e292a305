"""Files and hub datasets as rows, each with where it stands; what the rows mean is said in teachers/prompts.py."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.tables import suggest


def read_rows(source: str, *, names: Iterable[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield every row of a file or hub dataset with where it stands; a line that cannot be read is a ValueError.

    Args:
        source: a path, or `hf:NAME[:CONFIG[:SPLIT]]`.
        names: of sources that are no files, for whoever mistyped one.

    Raises:
        UserError: the source does not exist, is not of a known kind, or is damaged as a whole.
    """
    if source.startswith("hf:"):
        return _hub_rows(source)
    path = Path(source)
    kind = path.suffix.lower()
    if not path.is_file():
        known = ", ".join(READERS)
        what = "is a folder" if path.is_dir() else "does not exist"
        named = ", ".join(names)
        there = [*names, *(p.name for p in path.parent.iterdir())] if path.parent.is_dir() else []
        raise UserError(
            f"prompts {source!r} {what}{suggest(path.name, there)}; give a {known} file, hf:NAME[:CONFIG[:SPLIT]], "
            f"reasoning-gym:TASK or nano[:LEVEL]{', or an exam: ' if named else ''}{named}"
        )
    if kind not in READERS:
        raise UserError(f"cannot read prompts from {source!r}: known file types are {', '.join(READERS)}")
    return READERS[kind](path)


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if not raw.strip():
                continue
            try:
                yield f"{path.name}:{number}", json.loads(raw)
            except (ValueError, RecursionError) as error:
                yield f"{path.name}:{number}", ValueError(f"not JSON: {error}")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        loaded = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if isinstance(loaded, Mapping):  # {"data": [...]} and the like: the one list inside
        lists = [value for value in loaded.values() if isinstance(value, list)]
        loaded = lists[0] if len(lists) == 1 else loaded
    if not isinstance(loaded, list):
        raise UserError(f"{path} must hold a list of rows")
    return ((f"{path.name}:{number}", row) for number, row in enumerate(loaded, 1))


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            for row in reader:
                yield f"{path.name}:{reader.line_num}", {key: value for key, value in row.items() if key is not None}
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a UTF-8 CSV file: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}:{number}", row
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a Parquet file: {' '.join(str(error).split())}") from error


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    name, _, rest = source.removeprefix("hf:").partition(":")
    config, _, split = rest.partition(":")
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the hub's client raises dozens of kinds; each means: this source cannot be had
        raise UserError(f"cannot load the hub dataset {source!r}: {' '.join(str(error).split())[:300]}") from error
    return ((f"{name}:{number}", row) for number, row in enumerate(rows, 1))


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
