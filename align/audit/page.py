"""A page that shows one text as two tokenizers split it, beside what the audit found: `distill align --page OUT.html`.

The student's tokens stand above the teacher's, span by span: a span that is one token on both sides is quiet, others
are coloured by who cuts more finely, with every token's edge to be seen. Pointing at a token says its id and bytes.

Everything is in the file: no script, no font, no image, no request (a Content-Security-Policy says so to the browser).
The text was written by others and is escaped by the template, always; what cannot be printed is spelled out. This
module makes values, `data/page.html.j2` draws them, and the words of the table are those of `align.audit.table`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from align.audit.comparison import Audit, percent
from align.audit.table import advice, outcome_rows, remarks, rows, span_rows, summary, visible
from align.byte_view import byte_view, tokenise
from align.spans import spans_of
from distill.errors import UserError

SHOWN_BYTES = 12_000  # of the text; the page says how many more there are
MARKS = {" ": "·", "\n": "⏎", "\t": "→", "\r": "␍"}


def write_page(found: Audit, student: Any, teacher: Any, texts: Iterable[tuple[str, str]], path: Path) -> Path:
    """Write the page of an audit.

    Args:
        found: the audit.
        student, teacher: the tokenizers it is about.
        texts: the (kind, text) pairs it was made with; the first `SHOWN_BYTES` bytes of them are drawn.
        path: the .html file to write, or a folder that gets `align.html`.

    Returns:
        The file written.

    Raises:
        UserError: the file cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    drawn, size = _drawn(student, teacher, texts)
    environment = Environment(
        loader=PackageLoader("align.audit", "data"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = environment.get_template("page.html.j2").render(
        found=found,
        title=f"{visible(found.student.name)} learns from {visible(found.teacher.name)}",
        headline=_headline(found),
        summary=summary(found),
        advice=_tight(advice(found)),
        rows=[(what, _tight(own), _tight(other), own != other) for what, own, other in rows(found)],
        outcomes=outcome_rows(found),
        token_bits=f"{found.token_bits:.2f}",
        kinds=[(kind, percent(share)) for kind, share in found.by_kind.items()],
        spans=span_rows(found),
        remarks=remarks(found),
        texts=drawn,
        shapes=Counter(span["shape"] for text in drawn for span in text["spans"]),
        left=found.bytes - size,
    )
    target = path if path.suffix == ".html" else path / "align.html"
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(html.encode("utf-8", "replace"))
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"--page: cannot write {target}: {error.strerror or error}") from error
    return target


def _headline(found: Audit) -> str:
    if found.vocabulary == "same":
        return "The two have one vocabulary."
    if not found.spans:
        return "No text could be compared byte for byte."
    return f"{_tight(percent(found.student.coverage))} of the student’s tokens are one token of the teacher’s."


def _tight(text: str) -> str:
    """Return a text that does not break before a percent sign."""
    return text.replace(" %", "\u00a0%")


def _drawn(student: Any, teacher: Any, texts: Iterable[tuple[str, str]]) -> tuple[list[dict[str, Any]], int]:
    """Return the texts to draw, those that a side changes left out, and how many bytes they have."""
    sides = [(tokenizer, byte_view(tokenizer)) for tokenizer in (student, teacher)]
    drawn: list[dict[str, Any]] = []
    size = 0
    for kind, text in texts:
        if size >= SHOWN_BYTES:
            break
        own, other = (tokenise(tokenizer, view, text, continued=True) for tokenizer, view in sides)
        if own is None or other is None:
            continue
        spans = []
        for (a, b), (c, d) in zip(*map(np.ndarray.tolist, spans_of(own.pieces, other.pieces)), strict=True):
            if size >= SHOWN_BYTES:
                break
            written = b"".join(own.pieces[a:b])
            size += len(written)
            spans.append(
                {
                    "shape": _shape(b - a, d - c),
                    "breaks": b"\n" in written,
                    "student": list(_tokens("student", own.ids[a:b], own.pieces[a:b])),
                    "teacher": list(_tokens("teacher", other.ids[c:d], other.pieces[c:d])),
                }
            )
        drawn.append({"kind": kind, "spans": spans})
    return drawn, size


def _shape(student: int, teacher: int) -> str:
    """Return who cuts a span more finely."""
    if student == teacher == 1:
        return "one"
    return "finer" if teacher == 1 else "coarser" if student == 1 else "across"


def _tokens(who: str, ids: list[int], tokens: list[bytes]) -> Iterator[dict[str, Any]]:
    for number, (index, token) in enumerate(zip(ids, tokens, strict=True), 1):
        of = f", {number} of {len(tokens)}" if len(tokens) > 1 else ""
        tip = f"{who} token {index}{of}: “{visible(token)}”, bytes {token.hex(' ').upper()}"
        yield {"parts": parts(token), "tip": tip, "size": max(1, len(token))}


def parts(token: bytes) -> list[tuple[str, str]]:
    """Return what to draw of a token as (class, text): "" for text, "mark" for white space, "hex" for the unprintable.

    A byte that is half of a character is its two hex digits; a character that has no picture is its code point.
    """
    drawn: list[tuple[str, str]] = []
    for character in token.decode("utf-8", "surrogateescape"):
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:
            drawn.append(("hex", f"{code - 0xDC00:02X}"))
        elif character in MARKS:
            drawn.append(("mark", MARKS[character]))
        elif character.isprintable():
            drawn.append(("", character))
        else:
            drawn.append(("hex", f"U+{code:04X}"))
    merged: list[tuple[str, str]] = []
    for kind, text in drawn:
        if merged and merged[-1][0] == kind and kind != "hex":
            merged[-1] = kind, merged[-1][1] + text
        else:
            merged.append((kind, text))
    return merged
