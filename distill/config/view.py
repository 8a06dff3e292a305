"""Traces to look at in a browser."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from distill.config.section import Count, Section


class ViewConfig(Section):
    """The traces of a store or of an evaluation, as one page."""

    dir: Path = Field(
        description="A trace store, a folder made by filter, or an evaluation.", json_schema_extra={"argument": True}
    )
    out: Path | None = Field(None, description="The .html file to write; default: view.html in DIR.")
    limit: Count | None = Field(None, description="Show only the first N questions, with all their samples.")
    sample: Count | None = Field(
        None, description="Show only N questions drawn at random, the same each time, with all their samples."
    )
