"""Traces to a student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from distill.config.reinforcing import Reinforcing
from distill.config.section import Count


class TrainConfig(Reinforcing):
    """Traces to a student."""

    mode: str | None = Field(
        None,
        description="hard-labels, soft-logits, features, relations, on-policy, grpo, or pkg.mod:name of a LossMode.",
    )
    loss: str | None = Field(
        None, description="Several modes with weights instead: soft_logits=1.0,hard_labels=0.1,features=0.5."
    )
    student: str = Field(
        description="MODEL, or PRESET (llama-nano, qwen3-nano:hidden_size=96), or prune:MODEL?layers=12."
    )
    data: Path = Field(
        description="A trace store's folder, or a .jsonl file with messages; grpo: a store's questions, or a SRC of "
        "questions as in generate."
    )
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
    max_completion_length: Count = Field(512, description="on-policy, grpo: most tokens of a completion it writes.")
    rollout_temperature: Annotated[float, Field(ge=0)] = Field(
        1.0, description="on-policy, grpo: temperature the student draws with; not that of the divergence."
    )
    rollout_top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="on-policy: nucleus mass it draws from."
    )
    rollout_backend: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="on-policy, grpo: what writes completions; vllm gets the weights as they change.",
    )
    rollout_engine_arg: list[str] = Field(
        default_factory=list, description="key=value for vLLM, e.g. gpu_memory_utilization=0.4 (repeatable)."
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
    max_flops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="End once the ledger holds so many FLOPs; the learning rate follows what is spent."
    )
    max_seconds: Annotated[float, Field(gt=0)] | None = Field(None, description="The same for seconds.")
    max_tokens: Count | None = Field(None, description="The same for tokens trained on or written by the student.")
    milestones: Count | None = Field(
        None, description="Also keep the model at k/N of the run, in OUT/milestones/k, for k below N."
    )
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
