"""A recipe, a student and perhaps a teacher to a trained folder: what `distill train` runs.

Between the start of a run and its end there are only whole checkpoints, so stopping at any moment loses at most the
steps since the last one; what the folder is at each moment is `distill.run_folder`. Building models and tokenizers is
the caller's business.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers

from distill.alignment import Alignment
from distill.batch import collate
from distill.callbacks import METRICS, TIMINGS, Progress
from distill.checkpoints import last_checkpoint
from distill.config import TrainConfig
from distill.dataset import Dataset, data_file, load_examples, sha256
from distill.errors import RunError, UserError
from distill.lora import add_lora
from distill.models import context_length, end_token_ids
from distill.objective import read_objective, signal_folder
from distill.packing import check_packing, pack
from distill.progress import say
from distill.render import Example
from distill.rollouts import Rollouts
from distill.run_folder import CHECKPOINTS, RUN, claim, open_run, read_run, save_final
from distill.signal_data import SignalData
from distill.store import full_disk, write_json
from distill.trainer import DistillTrainer
from distill.training_arguments import training_arguments


def run_training(
    config: TrainConfig, *, model: Any, tokenizer: Any, teacher: Any = None, alignment: Alignment | None = None
) -> dict[str, Any]:
    """Train `model` as the recipe says, save it into `config.out` and return what `run.json` holds.

    A folder whose run is finished is left as it is. `model` is trained in place.

    Args:
        model: the student, a causal language model, on any device.
        tokenizer: the student's tokenizer, with a chat template where the data needs one.
        teacher: the teacher, where the mode needs one.
        alignment: of a teacher with another tokenizer, running or stored. Without one, that its vocabulary is the
            student's is the caller's to see to (`align.open_alignment`): here only widths can be compared.

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
    width = model.get_output_embeddings().weight.shape[0]
    signals = None
    if objective.source == "signal":
        theirs = None if alignment is None else alignment.teacher_tokenizer
        signals = SignalData(signal_folder(config), tokenizer, num_outcomes=width, teacher_tokenizer=theirs)
    dataset = load_examples(
        config.data,
        tokenizer,
        max_length=max_length,
        overlong=config.overlong,
        target=config.target,
        limit=config.limit,
        stop_ids=_stop_ids(model, tokenizer),
        signals=signals,
        unmatched=config.unmatched,
        alignment=alignment,
        teacher_length=None if teacher is None else context_length(teacher.config),
    )
    for count, what in (
        (dataset.dropped, f"left out {dataset.dropped} sequences longer than {max_length} tokens"),
        (dataset.cut, f"cut {dataset.cut} sequences to {max_length} tokens"),
        (dataset.unmatched, f"left out {dataset.unmatched} traces that the stored numbers do not speak of"),
        (dataset.unaligned, f"left out {dataset.unaligned} rows whose text the teacher's tokenizer changes"),
        (dataset.in_part, f"{dataset.in_part} rows have trained tokens that the teacher says nothing of"),
    ):
        if count:
            say(what)
    rollouts = _rollouts(config, model, tokenizer, max_length) if "rollouts" in objective.needs else None
    if rollouts is not None:
        rollouts.check(dataset.examples)
    pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = _rows(config, model, dataset.examples, max_length)
    if config.lora_r is not None:
        names = config.lora_target_modules
        model = add_lora(
            model,
            r=config.lora_r,
            alpha=config.lora_alpha or 2 * config.lora_r,
            dropout=config.lora_dropout,
            target_modules=names if names == "all-linear" else [name.strip() for name in names.split(",")],
        )
    progress = Progress()
    trainer = DistillTrainer(
        model,
        teacher,
        args=training_arguments(config),
        train_dataset=rows,
        collate=partial(collate, pad_id=pad_id, signals=signals),
        processing_class=tokenizer,
        loss=objective.weights,
        loss_options=objective.options,
        rollouts=rollouts,
        metrics_folder=config.out,
        callbacks=[progress],
        alignment=alignment,
    )
    resume_from = last_checkpoint(config.out / CHECKPOINTS)
    if trainer.is_world_process_zero():
        claim(config)
        for old in (METRICS, TIMINGS) if resume_from is None else ():
            (config.out / old).unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        run = _run_record(config, trainer, dataset)
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


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {index for index in [*ids, tokenizer.eos_token_id] if index is not None and index < len(tokenizer)}


def _rows(config: TrainConfig, model: Any, examples: list[Example], max_length: int | None) -> Sequence[Any]:
    """Return what a row of a batch holds: one example, or as many as fit."""
    if not config.packing:
        return examples
    if max_length is None:
        raise UserError(
            "--packing fills rows of --max-length tokens, and neither that nor the model's context is known"
        )
    check_packing(model, max_length)
    return pack(examples, max_length)


def _rollouts(config: TrainConfig, model: Any, tokenizer: Any, max_length: int | None) -> Rollouts:
    return Rollouts(
        model,
        end_ids=end_token_ids(model, tokenizer),
        pad_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        num_outcomes=len(tokenizer),
        max_length=max_length,
        seed=config.seed,
        max_completion_length=config.max_completion_length,
        temperature=config.rollout_temperature,
        top_p=config.rollout_top_p,
        student_share=config.student_share,
    )


def _run_record(config: TrainConfig, trainer: DistillTrainer, dataset: Dataset) -> dict[str, Any]:
    lines = [row for row in trainer.state.log_history if "loss" in row]
    across: dict[str, Any] = {}
    if trainer.alignment is not None:
        across["alignment"] = {"method": trainer.alignment.name, "why": trainer.alignment.why}
        across |= {"unaligned": dataset.unaligned, "aligned_in_part": dataset.in_part}
    return {
        "recipe": config.model_dump(mode="json"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else "cpu",
        "data_sha256": sha256(data_file(config.data)),
        "sequences": len(dataset.examples),
        "dropped_overlong": dataset.dropped,
        "cut_overlong": dataset.cut,
        "without_signal": dataset.unmatched,
        **across,
        "trained_share": dataset.trained_share,
        "num_parameters": trainer.student.num_parameters(),
        "steps": trainer.state.global_step,
        "ledger": trainer.ledger(),
        "metrics": lines[-1] if lines else {},
    }
