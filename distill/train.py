"""A recipe, a student and perhaps a teacher to a trained folder: what `distill train` runs.

Between the start of a run and its end there are only whole checkpoints, so stopping at any moment loses at most the
steps since the last one; what the folder is at each moment is `distill.run_folder`. Building models and tokenizers is
the caller's business.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from distill.alignment import Alignment
from distill.budget import Milestones
from distill.callbacks import METRICS, TIMINGS, Progress
from distill.checkpoints import last_checkpoint
from distill.config import TrainConfig
from distill.errors import RunError, UserError
from distill.lora import add_lora
from distill.material import Rewarded, questions_to_answer, traces_to_learn
from distill.models import context_length
from distill.objective import read_objective
from distill.progress import say
from distill.reinforce.journal import ROLLOUTS
from distill.rollouts import Writer
from distill.run_folder import (
    CHECKPOINTS,
    RUN,
    claim,
    data_content,
    open_run,
    read_run,
    save_final,
    save_milestone,
)
from distill.store import full_disk, write_json
from distill.trainer import DistillTrainer
from distill.training_arguments import budget_of, training_arguments


def run_training(
    config: TrainConfig,
    *,
    model: Any,
    tokenizer: Any,
    teacher: Any = None,
    alignment: Alignment | None = None,
    rewarded: Rewarded | None = None,
    writer: Writer | None = None,
) -> dict[str, Any]:
    """Train `model` as the recipe says, save it into `config.out` and return what `run.json` holds.

    A folder whose run is finished is left as it is. `model` is trained in place.

    Args:
        model: the student, a causal language model, on any device.
        tokenizer: the student's tokenizer, with a chat template where the data needs one.
        teacher: the teacher, where the mode needs one.
        alignment: of a teacher with another tokenizer, running or stored. Without one, that its vocabulary is the
            student's is the caller's to see to (`align.open_alignment`): here only widths can be compared.
        rewarded: the questions and what answers to them are worth, where the mode needs rewards.
        writer: writes the student's completions where the student writes; None is transformers.

    Raises:
        UserError: a wrong setting, unusable data, or a folder of another recipe.
        RunError: the loss became NaN or infinite, or the disk is full; whole checkpoints stay.
    """
    objective = read_objective(config, alignment)
    if open_run(config) == "finished":
        say(f"{config.out} is finished; nothing to do")
        return read_run(config.out)
    if (objective.source == "model") != (teacher is not None):
        raise UserError(
            "the loss asks a teacher: name one with --teacher"
            if teacher is None
            else "nobody asks the teacher that was given"
        )
    if alignment is not None and objective.source is None:
        raise UserError("nobody asks a teacher, and one of another tokenizer was given an alignment")
    _check_width("student", model, tokenizer)
    if teacher is not None:
        _check_width("teacher", teacher, tokenizer if alignment is None else alignment.teacher_tokenizer)
    if alignment is not None:
        say(f"teacher and student have different tokenizers: {alignment.name} ({alignment.why})")
        alone = objective.weights.keys() == {"soft_logits"}
        if alone and not alignment.labelled and not objective.options.get("soft_logits", {}).get("hard_label_weight"):
            say(
                "hint: give hard labels beside it (--loss soft_logits=1,hard_labels=1): only they teach which of a "
                "text's tokens the student is to take"
            )
    max_length = _max_length(config, model, teacher if alignment is None else None)
    args = training_arguments(config)
    if "rewards" in objective.needs:
        if rewarded is None:
            raise UserError("grpo needs questions and what answers to them are worth")
        material = questions_to_answer(config, objective, model, tokenizer, rewarded, max_length, writer, args)
    else:
        material = traces_to_learn(config, objective, model, tokenizer, teacher, alignment, max_length, writer)
    if config.lora_r is not None:
        names = config.lora_target_modules
        model = add_lora(
            model,
            r=config.lora_r,
            alpha=config.lora_alpha or 2 * config.lora_r,
            dropout=config.lora_dropout,
            target_modules=names if names == "all-linear" else [name.strip() for name in names.split(",")],
        )
    progress = Progress(by_steps=not (budget_of(config) and config.max_steps is None))
    trainer = DistillTrainer(
        model,
        teacher,
        args=args,
        train_dataset=material.rows,
        collate=material.collate,
        processing_class=tokenizer,
        loss=objective.weights,
        loss_options=objective.options,
        rollouts=material.rollouts,
        experience=material.experience,
        budget=budget_of(config),
        metrics_folder=config.out,
        callbacks=[progress],
        alignment=alignment,
    )
    progress.share = trainer.progress

    def record() -> dict[str, Any]:
        return _run_record(config, trainer, material.facts)

    if config.milestones is not None:

        def keep(number: int) -> None:
            save_milestone(trainer, config.out, number, record())

        trainer.add_callback(Milestones(config.milestones, trainer.progress, keep))
    resume_from = last_checkpoint(config.out / CHECKPOINTS)
    if trainer.is_world_process_zero():
        claim(config)
        for old in (METRICS, TIMINGS, ROLLOUTS) if resume_from is None else ():
            (config.out / old).unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        run = record()
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


def _run_record(config: TrainConfig, trainer: DistillTrainer, facts: Mapping[str, Any]) -> dict[str, Any]:
    lines = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "recipe": config.model_dump(mode="json"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else "cpu",
        "data_sha256": data_content(config),
        **facts,
        "num_parameters": trainer.student.num_parameters(),
        "steps": trainer.state.global_step,
        "progress": min(trainer.progress(), 1.0),
        "ledger": trainer.ledger(),
        "metrics": lines[-1] if lines else {},
    }
