"""Many commands as one: the pipeline."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from distill.config.section import Count, Section


class RunConfig(Section):
    """The stages of a file, each done once."""

    pipeline: Path = Field(
        description="A pipeline's YAML file, or the manifest.json of an earlier run.",
        json_schema_extra={"argument": True},
    )
    out: Path | None = Field(None, description="Where every stage gets its folder; default: the file's `out`.")
    var: list[str] = Field(
        default_factory=list, description="NAME=VALUE in place of what the file's `vars` say (repeatable)."
    )
    dry_run: bool = Field(False, description="Check everything and print the plan; run nothing.")
    jobs: Count | None = Field(
        None, description="Stages side by side; default: as many as cores, one where there is a GPU."
    )
