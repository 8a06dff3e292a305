"""What a human types: one pydantic model per command.

A field's name with `_` read as `-` is the command's long flag; the same name is the YAML key; its description is the
`--help` text. A flag beats the file. Unknown keys, and values of the wrong kind, are errors that name the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from distill.errors import UserError
from distill.tables import suggest

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A frozen group of settings that refuses what it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_truth_value_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads yes and on as true, and pydantic would take that for 1.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise PydanticCustomError("no_truth_value", "Input should not be true or false")
        return value


class Sampling(Section):
    """How tokens are drawn. Part of a sample's identity: another value is another sample."""

    temperature: Annotated[float, Field(ge=0)] = Field(0.6, description="Sampling temperature; 0 is greedy.")
    top_p: Share = Field(0.95, description="Nucleus mass kept when sampling.")
    max_completion_length: Count | None = Field(
        None, description="Most tokens of a completion; default: what the model's context leaves."
    )

    def sampling(self) -> dict[str, Any]:
        """Return the settings that shape a completion, as they enter a sample's uid."""
        return {name: getattr(self, name) for name in Sampling.model_fields}


class Engine(Section):
    """Which program runs a model, and how."""

    backend: str = Field("auto", description="auto, transformers, vllm.")
    concurrency: Count | None = Field(None, description="Samples in flight at once; default: the backend's own.")
    engine_arg: list[str] = Field(
        default_factory=list, description="key=value passed to the backend, e.g. dtype=bfloat16 (repeatable)."
    )
    chat_template: Path | None = Field(None, description="A Jinja file used where the model has no chat template.")
    trust_remote_code: bool = Field(False, description="Run Python code shipped inside a model folder.")


class GenerateConfig(Sampling, Engine):
    """Prompts to verified traces."""

    prompts: str = Field(
        description="SRC: a .jsonl/.json/.csv/.parquet file, hf:NAME[:CONFIG[:SPLIT]] or nano[:LEVEL]."
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
    verifier: str = Field("auto", description="auto (math where there is a gold), math, none, or pkg.mod:function.")
    keep: str = Field(
        "correct", description="correct, any (right or wrong), or best-of:N (a prompt's N shortest correct)."
    )
    drop: str = Field(
        "truncated,malformed,duplicate", description="Filters that reject, comma-separated; the others only flag."
    )
    reasoning: Literal["auto", "think", "none"] = Field(
        "auto", description="think: <think>...</think> is required; auto: where most of the traces have it."
    )


class FilterConfig(Section):
    """A trace store judged again, without generating."""

    store: Path = Field(description="The trace store's folder.", json_schema_extra={"argument": True})
    verifier: str | None = Field(None, description="Judge again with this verifier; default: keep the stored verdicts.")
    keep: str = Field("correct", description="correct, any, or best-of:N.")
    drop: str = Field("truncated,malformed,duplicate", description="Filters that reject, comma-separated.")
    out: Path | None = Field(None, description="Write the result to another folder; default: in place.")


class TrainConfig(Section):
    """Traces to a student."""

    mode: str = Field(description="hard-labels or soft-logits.")
    student: str = Field(
        description="MODEL, or PRESET (llama-nano, qwen3-nano:hidden_size=96), or prune:MODEL?layers=12."
    )
    data: Path = Field(description="A trace store's folder, or a .jsonl file with messages.")
    out: Path = Field(description="The run's folder: the trained model, metrics.jsonl, run.json, checkpoints/.")
    teacher: str | None = Field(None, description="MODEL whose logits are learnt (soft-logits).")
    align: str = Field("auto", description="How teacher and student vocabularies meet: auto or identity.")
    divergence: str = Field("forward_kl", description="soft-logits: what compares teacher and student.")
    divergence_option: list[str] = Field(
        default_factory=list, description="name=number for the divergence, e.g. alpha=0.1 (repeatable)."
    )
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="soft-logits: softens both distributions.")
    hard_label_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="soft-logits: weight of the cross-entropy on the trace's own tokens, added to the divergence."
    )
    target: Literal["trace", "answer"] = Field(
        "trace", description="trace: reasoning and answer; answer: the final answer alone (the answers-only baseline)."
    )
    tokenizer: str | None = Field(
        None, description="MODEL whose tokenizer a preset student takes; default: the teacher's."
    )
    chat_template: Path | None = Field(None, description="A Jinja file used where the student has no chat template.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-4, description="Peak learning rate (AdamW).")
    lr_scheduler_type: str = Field("cosine", description="Any of transformers' schedules.")
    warmup_steps: Annotated[float, Field(ge=0)] = Field(0.03, description="Steps, or a share of them when below 1.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradients are clipped to this norm.")
    num_train_epochs: Annotated[float, Field(gt=0)] = Field(2.0, description="Passes over the data.")
    max_steps: Count | None = Field(None, description="Optimizer steps; overrides the epochs.")
    per_device_train_batch_size: Count = Field(8, description="Sequences of one forward pass on one device.")
    gradient_accumulation_steps: Count = Field(1, description="Forward passes of one optimizer step.")
    max_length: Count | None = Field(None, description="Tokens a sequence may have; default: the student's context.")
    overlong: Literal["refuse", "drop"] = Field("refuse", description="What happens to a sequence above max-length.")
    save_steps: Count = Field(200, description="Optimizer steps between checkpoints.")
    logging_steps: Count = Field(10, description="Optimizer steps between lines of metrics.jsonl.")
    gradient_checkpointing: bool = Field(False, description="Trade compute for activation memory.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type the student's weights are held in.")
    bf16: bool = Field(False, description="bfloat16 autocast in the forward and backward passes.")
    limit: Count | None = Field(None, description="Use only the first N traces.")
    seed: int = Field(0, description="Seed of initialisation and data order.")
    set: list[str] = Field(
        default_factory=list,
        description="trainer.NAME=VALUE: any other of transformers' TrainingArguments, e.g. trainer.adam_beta2=0.95.",
    )
    resume: bool = Field(
        False, description="Go on from the last checkpoint of an unfinished run, or start where there is none."
    )
    trust_remote_code: bool = Field(False, description="Run Python code shipped inside a model folder.")


class EvalConfig(Sampling, Engine):
    """A model's accuracy on questions with a gold answer."""

    model: str = Field(description="MODEL to evaluate, or prune:MODEL?layers=12.")
    prompts: str = Field(description="SRC; nano means its held-out problems here.")
    out: Path = Field(description="The evaluation's folder: samples.jsonl and eval.json.")
    n: Count = Field(1, description="Samples per question.")
    seed: int = Field(0, description="Seed of the run.")
    limit: Count | None = Field(None, description="Use only the first N questions.")
    system_prompt: str | None = Field(None, description="A system message put before every question that has none.")
    verifier: str = Field("math", description="math, or pkg.mod:function.")
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


class FetchConfig(Section):
    """A model as a plain local folder."""

    name: str = Field(description="A packaged name, a hub id, or a .gguf file.", json_schema_extra={"argument": True})
    out: Path | None = Field(None, description="The folder to make; default: models/NAME.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Type of the saved weights; default: the one recorded for the name, else float32."
    )


class DemoConfig(Section):
    """The whole road on the built-in problems."""

    out: Path = Field(Path("runs/demo"), description="Where everything goes; the same command resumes.")
    seeds: Count = Field(1, description="Training seeds of every arm.")
    budget: Annotated[float, Field(ge=30)] = Field(
        300.0, description="Seconds aimed at, on two free cores: training steps and traces scale with it."
    )
    rebuild_teacher: bool = Field(False, description="Train the embedded teacher anew and write it to OUT/teacher.")


C = TypeVar("C", bound=Section)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping of a YAML file.

    Raises:
        UserError: no such file, not YAML, or not a mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except Exception as error:  # PyYAML lets through what its readers raise: ValueError for the date 2026-13-01, ...
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} must hold a mapping of option: value, not {type(loaded).__name__}")
    return loaded


def build(model: type[C], file: Path | None, flags: Mapping[str, Any]) -> C:
    """Merge a recipe file and the flags given (a flag beats the file) into a checked config.

    Raises:
        UserError: an unknown key (the nearest is suggested), a missing one, or a value of the wrong kind.
    """
    values = read_yaml(file) if file else {}
    for key in values:
        if key not in model.model_fields:
            where = f"{file}: " if file else ""
            raise UserError(f"{where}unknown option {key!r}{suggest(str(key), model.model_fields)}")
    values.update(flags)
    try:
        return model(**values)
    except ValidationError as error:
        problems = [_one_line(model, problem) for problem in error.errors()]
        raise UserError("; ".join(problems)) from error


def _one_line(model: type[Section], problem: Any) -> str:
    name = str(problem["loc"][0])
    extra = model.model_fields[name].json_schema_extra
    flag = name.upper() if isinstance(extra, dict) and extra.get("argument") else "--" + name.replace("_", "-")
    if problem["type"] == "missing":
        return f"{flag} is required"
    return f"{flag}: {problem['msg'][0].lower()}{problem['msg'][1:]} (given {problem['input']!r})"
