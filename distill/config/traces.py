"""Traces: made, judged, scored and written out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from distill.config.model import Engine, Sampling
from distill.config.section import Count, Section, Share


class Verifying(Section):
    """How a verifier runs."""

    verifier_option: list[str] = Field(
        default_factory=list, description="name=value for the verifier, e.g. min_agreement=0.5 (repeatable)."
    )
    verifier_workers: Count = Field(1, description="Processes that verify.")
    verifier_seconds: Annotated[float, Field(gt=0)] = Field(10.0, description="Wall-clock limit of one verdict.")


class Judging(Verifying):
    """A model that says what is right."""

    judge: str | None = Field(None, description="MODEL that judges (verifiers judge, universal-self-consistency).")
    judge_backend: str = Field("auto", description="The judge's backend, as --backend.")
    judge_base_url: list[str] = Field(default_factory=list, description="The judge's endpoint, as --base-url.")
    judge_max_completion_length: Count = Field(2048, description="Most tokens of a judgement.")


class Curation(Section):
    """What is kept."""

    keep: str = Field(
        "correct",
        description="correct, any (right or wrong), best-of:N (a prompt's N shortest correct) or diverse:N.",
    )
    drop: str = Field(
        "truncated,malformed,loop,contaminated",
        description="Filters that reject, comma-separated, or none; the others only flag.",
    )
    length: str | None = Field(None, description="LO:HI tokens of a completion, either may be empty; drops the others.")
    pass_rate: str | None = Field(
        None, description="LO:HI, the share of a prompt's samples that are right; drops the traces of other prompts."
    )
    decontaminate: list[Path] = Field(
        default_factory=list, description="A file of evaluation questions that must not be learnt (repeatable)."
    )
    seek_in_completions: bool = Field(False, description="--decontaminate: look into what the teacher wrote, too.")
    near_duplicate: Share = Field(
        0.9, description="Similarity from which --drop near_duplicate calls two traces the same."
    )


class GenerateConfig(Sampling, Engine, Judging, Curation):
    """Prompts to verified traces."""

    prompts: str = Field(
        description="SRC: a .jsonl/.json/.csv/.parquet file, hf:NAME[:CONFIG[:SPLIT]], reasoning-gym:TASK[?k=v] or "
        "nano[:LEVEL], or an exam's problems: gsm8k, svamp, math-500, aime24, aime25 (or NAME:FILE), mcq:FILE."
    )
    out: Path = Field(description="The trace store's folder; the same command on it resumes.")
    teacher: str | None = Field(
        None, description="MODEL: a folder, hub id, .gguf file or nano (the default for nano prompts)."
    )
    n: Count = Field(1, description="Samples per prompt.")
    seed: int = Field(0, description="Seed of the run; each sample derives its own.")
    limit: Count | None = Field(None, description="Use only the first N prompts.")
    system_prompt: str | None = Field(None, description="A system message put before every question that has none.")
    skip_bad_rows: bool = Field(False, description="Leave out rows without a question or gold instead of refusing.")
    until_correct: Count | None = Field(
        None, description="Keep sampling a prompt until this many of its traces are right (with --max-samples)."
    )
    max_samples: Count | None = Field(None, description="Most samples of a prompt under --until-correct.")
    ahead: Annotated[int, Field(ge=0)] = Field(
        0, description="--until-correct: samples of a prompt in flight beyond those missing; more speed, more tokens."
    )
    top_logprobs: Count | None = Field(
        None, description="Store the log-probabilities of the K likeliest tokens at every position, in signal/."
    )
    sample_logprobs: Count | None = Field(
        None, description="Store N random draws of the teacher's distribution at every position, in signal/."
    )
    verifier: str = Field(
        "auto",
        description="auto (by what the prompts have), none, math, choice, code_tests, reasoning-gym, judge, "
        "self-consistency, universal-self-consistency, or pkg.mod:function.",
    )
    reasoning: Literal["auto", "think", "none"] = Field(
        "auto", description="think: <think>...</think> is required; auto: where most of the traces have it."
    )
    check_template: str | None = Field(
        None, description="MODEL, the student: refuse to start if its chat template would drop the reasoning."
    )
    log_seconds: Annotated[float, Field(gt=0)] = Field(
        10.0, description="Seconds between two lines of progress where stderr is no terminal."
    )


class FilterConfig(Judging, Curation):
    """A trace store judged again, without generating."""

    store: Path = Field(description="The trace store's folder.", json_schema_extra={"argument": True})
    verifier: str | None = Field(None, description="Judge again with this verifier; default: keep the stored verdicts.")
    out: Path | None = Field(None, description="Write the result to another folder; default: in place.")


class ScoreConfig(Engine):
    """What a teacher says about traces that exist."""

    store: Path = Field(description="The trace store's folder.", json_schema_extra={"argument": True})
    teacher: str = Field(description="MODEL that scores; it need not be who wrote the traces.")
    top_logprobs: Count | None = Field(None, description="The K likeliest tokens at every position.")
    sample_logprobs: Count | None = Field(None, description="N random draws of the distribution at every position.")
    which: Literal["kept", "all"] = Field("kept", description="kept.jsonl, or every complete trace of the journal.")
    out: Path | None = Field(None, description="The folder of the numbers; default: signal/ in the store.")


class ExportConfig(Section):
    """Kept traces as a file for other trainers."""

    store: Path = Field(description="A trace store, or a folder made by filter.", json_schema_extra={"argument": True})
    format: str = Field(description="messages, prompt-completion, sharegpt, openai, grpo, or pkg.mod:function.")
    out: Path = Field(description="A .jsonl or .parquet file; a dataset card is written beside it.")
    check_template: str | None = Field(
        None, description="MODEL, the student: fail if its chat template would leave reasoning or stop token untrained."
    )
    licence: str = Field("unknown", description="Licence of the data, for the card.")
    chat_template: Path | None = Field(None, description="A Jinja file used where the student has no chat template.")
    trust_remote_code: bool = Field(False, description="Run Python code shipped inside a model folder.")
