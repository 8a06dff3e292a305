"""A recipe, a student and perhaps a teacher to a trained folder: what `distill train` runs.

Between the start of a run and its end there are only whole checkpoints, so stopping at any moment loses at most the
steps since the last one; what the folder is at each moment is `distill.run_folder`. Building models and tokenizers is
the caller's business.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import transformers
import yaml
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from distill.callbacks import METRICS, TIMINGS, Progress
from distill.checkpoints import last_checkpoint
from distill.config import TrainConfig
from distill.dataset import data_file, load_examples, sha256
from distill.divergences import DIVERGENCES
from distill.errors import RunError, UserError
from distill.losses import LOSSES, LossMode
from distill.models import context_length
from distill.progress import say
from distill.run_folder import CHECKPOINTS, RUN, claim, open_run, read_run, save_final
from distill.store import full_disk, write_json
from distill.tables import bind, lookup, suggest
from distill.trainer import DistillTrainer


def run_training(config: TrainConfig, *, model: Any, tokenizer: Any, teacher: Any = None) -> dict[str, Any]:
    """Train `model` as the recipe says, save it into `config.out` and return what `run.json` holds.

    A folder whose run is finished is left as it is. `model` is trained in place.

    Args:
        model: the student, a causal language model, on any device.
        tokenizer: the student's tokenizer, with a chat template where the data needs one.
        teacher: the teacher, where the mode needs one. That its vocabulary is the student's is the caller's to see to
            (`align.open_alignment`): here only widths can be compared.

    Raises:
        UserError: a wrong setting, unusable data, or a folder of another recipe.
        RunError: the loss became NaN or infinite, or the disk is full; whole checkpoints stay.
    """
    name, mode = loss_mode(config.mode)
    if open_run(config) == "finished":
        say(f"{config.out} is finished; nothing to do")
        return read_run(config.out)
    options = _loss_options(config, name, mode, model, tokenizer, teacher)
    max_length = _max_length(config, model, teacher if options else None)
    dataset = load_examples(
        config.data,
        tokenizer,
        max_length=max_length,
        overlong=config.overlong,
        target=config.target,
        limit=config.limit,
        stop_ids=_stop_ids(model, tokenizer),
    )
    if dataset.dropped:
        say(f"left out {dataset.dropped} sequences longer than {max_length} tokens")
    progress = Progress()
    trainer = DistillTrainer(
        model,
        teacher if "teacher_logits" in mode.needs else None,
        args=training_arguments(config),
        train_dataset=dataset.examples,
        processing_class=tokenizer,
        loss=name,
        loss_options=options,
        metrics_folder=config.out,
        callbacks=[progress],
    )
    resume_from = last_checkpoint(config.out / CHECKPOINTS)
    if trainer.is_world_process_zero():
        claim(config)
        for old in (METRICS, TIMINGS) if resume_from is None else ():
            (config.out / old).unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        run = _run_record(config, trainer, dataset.trained_share, len(dataset.examples), dataset.dropped)
        save_final(trainer, config.out)
        if trainer.is_world_process_zero():
            write_json(config.out / RUN, run)
    except torch.OutOfMemoryError as error:
        raise RunError(
            "out of GPU memory: lower --per-device-train-batch-size and raise --gradient-accumulation-steps, "
            "or add --gradient-checkpointing"
        ) from error
    except OSError as error:
        raise full_disk(error, config.out) from error
    finally:
        progress.close()
    return run


def loss_mode(mode: str) -> tuple[str, LossMode]:
    """Return the table name and the entry of a mode as the command line spells it.

    Raises:
        UserError: unknown; the nearest is suggested.
    """
    known = [name.replace("_", "-") for name in LOSSES]
    name = mode.replace("-", "_")
    if name not in LOSSES and ":" not in mode:
        raise UserError(f"unknown mode {mode!r}: known are {', '.join(known)}{suggest(mode, known)}")
    if name in LOSSES:
        return name, LOSSES[name]
    entry = lookup(LOSSES, mode, "mode")
    if not isinstance(entry, LossMode):
        raise UserError(f"--mode {mode} must name a distill.losses.LossMode, not a {type(entry).__name__}")
    return mode, entry


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """Return the transformers settings of a recipe.

    Raises:
        UserError: an unknown schedule.
    """
    schedules = [schedule.value for schedule in SchedulerType]
    if config.lr_scheduler_type not in schedules:
        near = suggest(config.lr_scheduler_type, schedules)
        raise UserError(
            f"unknown lr_scheduler_type {config.lr_scheduler_type!r}: known are {', '.join(schedules)}{near}"
        )
    settings: dict[str, Any] = {
        "output_dir": str(config.out / CHECKPOINTS),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
        "bf16": config.bf16,
        "seed": config.seed,
        "optim": "adamw_torch",
        "logging_strategy": "steps",
        "logging_steps": config.logging_steps,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,  # `Progress` reports, on stderr
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "use_cpu": not torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    further = _trainer_settings(config.set, taken=settings)
    try:
        args = TrainingArguments(**settings, **further)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"transformers refuses the settings: {' '.join(str(error).split())[:300]}") from error
    if args.n_gpu > 1:
        # One process with several GPUs would mean torch's DataParallel, which splits a batch behind the loss's back.
        # One GPU is used; several are for one process each (accelerate launch).
        args._n_gpu = 1
    return args


# Settings of `TrainingArguments` that this trainer never asks: accepting one would be a knob that does nothing.
IDLE_SETTINGS = frozenset({"label_smoothing_factor", "average_tokens_across_devices", "resume_from_checkpoint"})


def _trainer_settings(pairs: Sequence[str], *, taken: Mapping[str, Any]) -> dict[str, Any]:
    """Read `trainer.adam_beta2=0.95` pairs; values are YAML.

    Raises:
        UserError: another section, an unknown setting, or one that has its own flag or meaning here.
    """
    known = {each.name: each.default for each in fields(TrainingArguments) if each.init and each.name not in taken}
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        section, _, key = name.strip().partition(".")
        if section != "trainer" or not equals:
            raise UserError(f"--set takes trainer.NAME=VALUE, not {pair!r}")
        if key in taken:
            raise UserError(f"--set {name}: {key} is set by distill train itself (see its --help)")
        if key in IDLE_SETTINGS or key.startswith(("eval_", "per_device_eval_", "do_")):
            raise UserError(f"--set {name}: {key} would change nothing here, distill train has its own way of that")
        if key not in known:
            raise UserError(f"--set {name}: TrainingArguments has no {key!r}{suggest(key, known)}")
        settings[key] = yaml.safe_load(value)
        # TrainingArguments checks few kinds; a word where a number belongs would come out as a traceback much later.
        if isinstance(known[key], (bool, int, float)) and not isinstance(settings[key], (bool, int, float)):
            raise UserError(f"--set {name}: {key} takes a {type(known[key]).__name__}, not {value!r}")
    return settings


def _loss_options(
    config: TrainConfig, name: str, mode: LossMode, model: Any, tokenizer: Any, teacher: Any
) -> dict[str, Any]:
    _check_width("student", model, tokenizer)
    if "teacher_logits" not in mode.needs:
        return {}
    if teacher is None:
        raise UserError(f"--mode {config.mode} learns from a teacher's logits: name one with --teacher")
    _check_width("teacher", teacher, tokenizer)
    # An unknown divergence or option is refused before the folder is taken.
    function = lookup(DIVERGENCES, config.divergence, "divergence")
    divergence_options = _options(config.divergence_option)
    bind(function, divergence_options, f"divergence {config.divergence!r}")
    return {
        "num_outcomes": len(tokenizer),
        "divergence": config.divergence,
        "divergence_options": divergence_options,
        "temperature": config.temperature,
        "hard_label_weight": config.hard_label_weight,
    }


def _options(pairs: Sequence[str]) -> dict[str, float]:
    """Read `alpha=0.2` pairs; a divergence's options are numbers."""
    options: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            options[name.strip()] = float(value)
        except ValueError:
            raise UserError(f"--divergence-option takes name=number, not {pair!r}") from None
    return options


def _check_width(who: str, model: Any, tokenizer: Any) -> None:
    width = model.get_output_embeddings().weight.shape[0]
    if width < len(tokenizer):
        raise UserError(
            f"the {who} has {width} output embeddings for a tokenizer of {len(tokenizer)} tokens: "
            "they do not belong together, or the embeddings must be resized"
        )


def _max_length(config: TrainConfig, *models: Any) -> int | None:
    """Return the most tokens of a sequence: what was asked, never above what a model has positions for."""
    contexts = [limit for model in models if model is not None and (limit := context_length(model.config))]
    if config.max_length and contexts and config.max_length > min(contexts):
        raise UserError(f"--max-length {config.max_length} is above the {min(contexts)} positions of the models")
    return config.max_length or min(contexts, default=None)


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {index for index in [*ids, tokenizer.eos_token_id] if index is not None and index < len(tokenizer)}


def _run_record(
    config: TrainConfig, trainer: DistillTrainer, trained_share: float, sequences: int, dropped: int
) -> dict[str, Any]:
    lines = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "recipe": config.model_dump(mode="json"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else "cpu",
        "data_sha256": sha256(data_file(config.data)),
        "sequences": sequences,
        "dropped_overlong": dropped,
        "trained_share": trained_share,
        "num_parameters": trainer.student.num_parameters(),
        "steps": trainer.state.global_step,
        "ledger": trainer.ledger(),
        "metrics": lines[-1] if lines else {},
    }
