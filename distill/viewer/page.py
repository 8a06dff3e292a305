"""One self-contained HTML page to filter, search and read traces: `distill view`.

Everything is in the file: no font, no image, no request; a Content-Security-Policy says so to the browser and lets no
script run but the page's own, named by its hash. Traces were written by models: they travel as JSON
(`distill.viewer.rows`) and become text nodes, never markup. The page is written as it is made, a block of rows at a
time, so that a large store needs little memory here; how large a page may grow is for the reader to say
(`--limit`, `--sample`), who is told its size.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from distill.config.view import ViewConfig
from distill.errors import UserError
from distill.progress import Meter
from distill.report.numbers import count, percent
from distill.store import replacing
from distill.viewer.census import Census, current, take_census
from distill.viewer.facts import facts, headline, remarks
from distill.viewer.folder import Entry, Folder, count_lines, open_folder, read_entries
from distill.viewer.rows import blocks, choose

SCRIPTS = ("view_traces.js", "view_list.js", "view_reader.js", "view_facets.js", "view_page.js")
REASON_SHADES = 4  # of the funnel's bar; further reasons share the last


def write_view(config: ViewConfig) -> dict[str, Any]:
    """Write the page of a folder.

    Returns:
        Its `page`, size in `bytes`, how many `traces` and `questions` it has, and the folder: `of_traces`,
        `of_questions`.

    Raises:
        UserError: the folder holds no traces, a file of it is damaged, or both --limit and --sample are given.
        RunError: the disk is full, or takes no file there.
    """
    if config.limit is not None and config.sample is not None:
        raise UserError("--limit and --sample are both given: the page has the first questions or some at random")
    out = config.out or config.dir / "view.html"
    if out.suffix != ".html":
        raise UserError(f"--out {out} must end in .html")
    folder = open_folder(config.dir)
    with Meter("view", 2 * count_lines(folder), unit="lines") as meter:
        census = take_census(_counted(read_entries(folder), meter), path=folder.path)
        chosen = choose(census.questions, limit=config.limit, sample=config.sample)
        shown = blocks(current(_counted(read_entries(folder), meter), census), chosen)
        _write(out, _page(folder, census, chosen=chosen, sampled=config.sample is not None, data=shown))
    return {
        "page": str(out),
        "bytes": out.stat().st_size,
        "traces": sum(census.questions[uid] for uid in chosen),
        "questions": len(chosen),
        "of_traces": census.traces,
        "of_questions": len(census.questions),
    }


def said(result: dict[str, Any]) -> str:
    """Return the line for a person: what was written, how large it is, and what to do where that is much."""
    megabytes = result["bytes"] / 1e6
    size = f"{megabytes:.0f} MB" if megabytes >= 10 else f"{megabytes:.2f} MB"
    shown = f"{result['traces']} traces of {result['questions']} questions"
    if result["traces"] < result["of_traces"]:
        shown += f", out of {result['of_traces']} of {result['of_questions']}"
    advice = "; --sample N makes it smaller" if megabytes >= 100 else ""
    return f"wrote {result['page']}: {shown}, {size}{advice}"


def _page(
    folder: Folder, census: Census, *, chosen: Sequence[str], sampled: bool, data: Iterable[str]
) -> Iterator[str]:
    """Yield the page in pieces."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("distill", "data"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(count=count, percent=percent)
    script = "\n".join(files("distill").joinpath("data", name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f"(() => {{\n'use strict';\n{script}}})();"
    assert "</script" not in script.lower()
    return environment.get_template("view.html.j2").generate(
        name="/".join(folder.path.resolve().parts[-2:]),
        kind=folder.kind,
        headline=headline(folder, census),
        facts=facts(folder, census),
        remarks=remarks(folder, census, shown=len(chosen), sampled=sampled),
        census=census,
        shades=REASON_SHADES,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        blocks=data,
    )


def _write(out: Path, pieces: Iterable[str]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make {out.parent}: {error.strerror or error}") from error
    with replacing(out) as stream:
        for piece in pieces:
            # A file's or a model's name may hold what UTF-8 cannot: it is shown as "?".
            stream.write(piece.encode("utf-8", "replace").decode("utf-8"))


def _counted(entries: Iterable[Entry], meter: Meter) -> Iterator[Entry]:
    for entry in entries:
        yield entry
        meter.advance()
