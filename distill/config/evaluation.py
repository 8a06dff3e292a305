"""Evaluations, one and several."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from distill.config.model import Engine, Sampling
from distill.config.section import Count, Section
from distill.config.traces import Verifying


class EvalConfig(Sampling, Engine, Verifying):
    """A model's accuracy on questions with a gold answer."""

    model: str = Field(description="MODEL to evaluate, or prune:MODEL?layers=12.")
    prompts: str = Field(description="SRC; nano means its held-out problems here.")
    out: Path = Field(description="The evaluation's folder: samples.jsonl and eval.json.")
    n: Count = Field(1, description="Samples per question.")
    seed: int = Field(0, description="Seed of the run.")
    limit: Count | None = Field(None, description="Use only the first N questions.")
    system_prompt: str | None = Field(None, description="A system message put before every question that has none.")
    verifier: str = Field(
        "auto",
        description="auto (by what the prompts have), math, choice, code_tests, reasoning-gym, or pkg.mod:function.",
    )
    text: Path | None = Field(
        None, description="A trace store or .jsonl with messages: also report bits per byte on it."
    )
    chat_template: Path | None = Field(None, description="A Jinja file used where the model has no chat template.")
    arm: str | None = Field(None, description="Name of the arm in a comparison; default: the folder's name.")
    train_seed: int | None = Field(None, description="Which training seed of its arm this model is.")


class CompareConfig(Section):
    """Evaluations side by side."""

    evaluations: list[Path] = Field(
        description="EVAL_DIR...: folders made by distill eval.", json_schema_extra={"argument": True}
    )
    out: Path = Field(description="Where compare.json and report.html go.")
    store: list[Path] = Field(
        default_factory=list, description="A trace store whose funnel the report shows (repeatable)."
    )
    seed: int = Field(0, description="Seed of the bootstrap.")
