"""Evaluations, one and several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from distill.config.model import Engine, Sampling
from distill.config.section import Count, Section
from distill.config.traces import Verifying


class EvalConfig(Sampling, Engine, Verifying):
    """A model's accuracy on questions with a gold answer."""

    model: str = Field(description="MODEL to evaluate, or prune:MODEL?layers=12.")
    prompts: str = Field(
        "",
        description="SRC, as of generate: gsm8k, math-500, aime24, aime25, svamp, mcq:FILE and nano mean held-out "
        "problems here. Required without --harness.",
    )
    out: Path = Field(description="The evaluation's folder: samples.jsonl and eval.json.")
    n: Count = Field(1, description="Samples per question.")
    mde: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None,
        description="POINTS: as many samples per question as show a difference of so many percentage points between "
        "two models (80 % power at 5 %), instead of -n.",
    )
    mde_from: list[Path] = Field(
        default_factory=list,
        description="--mde: an evaluation to take the variances from, or those of two models (repeatable).",
    )
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
    trained_before: list[Path] = Field(
        default_factory=list,
        description="Runs that this model went through before its last: their cost and steps are added (repeatable).",
    )
    harness: Literal["lm-eval"] | None = Field(
        None, description="Have lm-evaluation-harness ask and judge: --tasks instead of --prompts."
    )
    tasks: str | None = Field(None, description="--harness: its tasks, comma-separated.")
    harness_arg: list[str] = Field(
        default_factory=list,
        description="--harness: key=value for it, e.g. num_fewshot=5 or apply_chat_template=true (repeatable).",
    )


class CompareConfig(Section):
    """Evaluations side by side."""

    evaluations: list[Path] = Field(
        description="EVAL_DIR..., folders made by distill eval; or one RECIPE.yaml of a comparison.",
        json_schema_extra={"argument": True},
    )
    out: Path = Field(description="Where compare.json and report.html go.")
    store: list[Path] = Field(
        default_factory=list,
        description="A trace store whose funnel the report shows, and whose cost the arms that learnt from it are "
        "charged (repeatable).",
    )
    seed: int = Field(0, description="Seed of the bootstrap.")
    match: Literal["flops", "seconds", "tokens", "prompts"] = Field(
        "flops", description="At equal what the arms' checkpoints are compared, beside their ends."
    )
    amortize_teacher: str = Field(
        "full", description="full, none or 1/M: the share of what generating its traces cost that an arm is charged."
    )
    teacher: str | None = Field(
        None, description="MODEL that colours the shown answers token by token: where it and each arm's student part."
    )
    show_questions: Count = Field(4, description="Questions whose answers the report shows side by side.")
    trust_remote_code: bool = Field(False, description="Run Python code shipped inside a model folder.")
