"""The texts that two tokenizers are compared on: a .txt file, a .jsonl file, or the built-in sample.

What is distilled is the assistant's text, so of a row with messages only the last turn counts. A .txt file is cut at
its empty lines, so that one character which a tokenizer changes costs a paragraph and not the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.audit.sample_text import SAMPLE
from distill.errors import UserError
from distill.store import read_lines

PARAGRAPH = re.compile(r"(?<=\n\n)(?=\S)")
COLUMNS = ("messages", "completion", "answer", "text")


def read_texts(path: Path | None) -> list[tuple[str, str]]:
    """Return (kind, text) pairs, none of them empty.

    Args:
        path: a .jsonl file whose rows have one of `COLUMNS`, the first that is there; or any file of UTF-8 text; None
            for the built-in sample.

    Raises:
        UserError: no such file, no text in it, a row without text (named by its number), or bytes that are not UTF-8.
    """
    if path is None:
        return list(SAMPLE.items())
    if path.suffix == ".jsonl":
        texts = [(path.name, _text(row, path, number)) for number, row in read_lines(path)]
    else:
        texts = [(path.name, part) for part in PARAGRAPH.split(_read(path))]
    texts = [(kind, text) for kind, text in texts if text]
    if not texts:
        raise UserError(f"--text: there is no text in {path}")
    return texts


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # not read_text, which would turn CR LF into LF
    except UnicodeDecodeError as error:
        raise UserError(f"--text: {path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"--text: cannot read {path}: {error.strerror or error}") from error


def _text(row: Mapping[str, Any], path: Path, number: int) -> str:
    column = next((name for name in COLUMNS if row.get(name) is not None), None)
    if column is None:
        raise UserError(f"--text: {path} line {number} has none of {', '.join(COLUMNS)}")
    value = row[column]
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise UserError(f"--text: {path} line {number}: {column!r} holds no text")
    return value
