"""A recipe to the settings of a `transformers.Trainer`; `--set trainer.NAME=VALUE` reaches the rest of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import yaml
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType

from distill.budget import UNBOUNDED, Budget
from distill.config import TrainConfig
from distill.errors import UserError
from distill.objective import TRAINER
from distill.run_folder import CHECKPOINTS
from distill.tables import suggest


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
        "max_steps": config.max_steps or (UNBOUNDED if budget_of(config) else -1),
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
        "bf16": config.bf16,
        "seed": config.seed,
        "optim": "adamw_torch_fused",
        "logging_strategy": "steps",
        "logging_steps": config.logging_steps,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "eval_strategy": "no",
        "report_to": _reporters(config.report_to),
        "run_name": config.out.name,
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


def budget_of(config: TrainConfig) -> Budget:
    """Return what a run may spend.

    Raises:
        UserError: a warm-up in steps, which a run measured by what it spends does not know the number of.
    """
    budget = Budget(config.max_flops, config.max_seconds, config.max_tokens)
    if budget and config.warmup_steps >= 1:
        raise UserError(
            f"--warmup-steps {config.warmup_steps:g} beside a budget: give a share of the run, such as 0.03"
        )
    return budget


def _reporters(names: str) -> list[str]:
    """Return where metrics are reported to.

    Raises:
        UserError: transformers knows no such reporter, or its package is not installed.
    """
    listed = [name.strip() for name in names.split(",")]
    if listed == ["none"]:
        return listed
    for name in listed:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise UserError(
                f"unknown --report-to {name!r}: known are none, {known}{suggest(name, INTEGRATION_TO_CALLBACK)}"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except Exception as error:  # each says in its own way that its package is missing
            raise UserError(f"--report-to {name}: {' '.join(str(error).split())[:300]}") from error
    return listed


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
        if section != TRAINER:  # a loss mode's: see `distill.objective`
            continue
        if not equals:
            raise UserError(f"--set takes SECTION.NAME=VALUE, not {pair!r}")
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
