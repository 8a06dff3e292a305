"""The folder of a training run: whose it is, whether it is finished, and how the model gets into it whole.

It binds itself to its recipe when the run starts (`recipe.json`), and counts as finished when `run.json` is there,
which is written last. No torch, so a command can ask before it loads anything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from distill.checkpoints import last_checkpoint, reason
from distill.config import TrainConfig
from distill.dataset import data_file, sha256
from distill.errors import RunError, UserError
from distill.records import content_hash
from distill.store import JOURNAL, write_json

RECIPE = "recipe.json"
RUN = "run.json"
CHECKPOINTS = "checkpoints"
MILESTONES = "milestones"
FREE = {"out", "resume"}  # settings that may differ between two starts of one run


def open_run(config: TrainConfig) -> Literal["new", "resumed", "finished"]:
    """Say what a run's folder is to this recipe, changing nothing; cheap enough to ask before models are loaded.

    Raises:
        UserError: the folder holds something else or another recipe (the differing keys are named), the data changed
            since, or there is a checkpoint and `--resume` was not given.
    """
    out = config.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, not a folder")
    data_hash = data_content(config)
    if not (out / RECIPE).exists():
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"--out {out} is not empty and holds no training run: choose another folder")
        return "new"
    recorded = _read_json(out / RECIPE)
    wanted = {**_recipe(config), "data (content)": data_hash}
    before = {**recorded["recipe"], "data (content)": recorded["data_sha256"]}
    differing = [key for key in {**before, **wanted} if before.get(key) != wanted.get(key)]
    if differing:
        listed = ", ".join(f"{key} was {before.get(key)!r}, now {wanted.get(key)!r}" for key in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"--out {out} belongs to another recipe ({listed}{more}): choose another folder or the same recipe"
        )
    if (out / RUN).exists():
        return "finished"
    last = last_checkpoint(out / CHECKPOINTS)
    if last is None:
        return "new"
    if not config.resume:
        raise UserError(
            f"--out {out} holds an unfinished run at {last.name}: add --resume to go on, or choose another folder"
        )
    return "resumed"


def _recipe(config: TrainConfig) -> dict[str, Any]:
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE}


def claim(config: TrainConfig) -> None:
    """Bind the folder to its recipe and data, unless it is already.

    Raises:
        UserError: the folder cannot be made.
    """
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {config.out} cannot be made: {error.strerror}") from error
    if not (config.out / RECIPE).exists():
        write_json(config.out / RECIPE, {"recipe": _recipe(config), "data_sha256": data_content(config)})


def data_content(config: TrainConfig) -> str:
    """Return the hash of what a run learns from: of the traces' file, or of the questions where answers are rewarded.

    Questions that are made or fetched by name (`nano:2`) are known by that name.

    Raises:
        UserError: there is no such file.
    """
    from distill.objective import loss_weights, needs

    if "rewards" not in needs(loss_weights(config)):
        return sha256(data_file(config.data))
    journal = config.data / JOURNAL
    if config.data.is_dir() and not journal.is_file():
        raise UserError(f"--data: the folder {config.data} has no {JOURNAL}: it is not a trace store")
    path = journal if journal.is_file() else config.data
    return sha256(path) if path.is_file() else content_hash(str(config.data))


def save_final(trainer: Any, out: Path) -> None:
    """Save model, tokenizer and chat template as a plain Hugging Face folder: written aside, then moved into place.

    What LoRA learnt is merged into the model; the adapter alone, and projectors, go into folders beside it.

    Args:
        trainer: a `distill.trainer.DistillTrainer`.

    Raises:
        RunError: the disk refused; the checkpoints stay.
    """
    aside = out / ".final"
    try:
        _write_model(trainer, aside)
        if trainer.is_world_process_zero():
            _move_into(aside, out)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(f"cannot write the model into {out}: {reason(error)}; run again with --resume") from error


def save_milestone(trainer: Any, out: Path, number: int, record: Mapping[str, Any]) -> None:
    """Save the model as it is now into OUT/milestones/NUMBER, with its own `run.json`: a folder like a finished run's.

    Raises:
        RunError: the disk refused.
    """
    folder = out / MILESTONES / str(number)
    aside = out / f".milestone-{number}"
    try:
        _write_model(trainer, aside)
        if trainer.is_world_process_zero():
            write_json(aside / RUN, dict(record))
            shutil.rmtree(folder, ignore_errors=True)  # of before a resume
            folder.parent.mkdir(exist_ok=True)
            aside.rename(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(f"cannot write {folder}: {reason(error)}; run again with --resume") from error


def _write_model(trainer: Any, aside: Path) -> None:
    """Write the model into a folder of its own, on the first rank; all take part."""
    from distill.lora import is_lora, save_merged

    if trainer.is_world_process_zero():
        shutil.rmtree(aside, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if is_lora(trainer.student):
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.is_world_process_zero():
            save_merged(trainer.student, aside, state)
            trainer.processing_class.save_pretrained(aside)
    else:
        trainer.save_model(str(aside))
    if trainer.is_world_process_zero():
        trainer.beside.save_weights(aside)
        (aside / "training_args.bin").unlink(missing_ok=True)  # a pickle; the recipe is in run.json


def _move_into(aside: Path, out: Path) -> None:
    mode = (out / RECIPE).stat().st_mode
    for path in aside.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # safetensors writes for its owner alone
    for path in sorted(aside.iterdir()):
        if path.is_dir():
            shutil.rmtree(out / path.name, ignore_errors=True)  # of a save that was interrupted
        path.replace(out / path.name)
    aside.rmdir()


def read_run(out: Path) -> dict[str, Any]:
    """Return `run.json` of a finished run.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return _read_json(out / RUN)


def _read_json(path: Path) -> dict[str, Any]:

    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): the run's folder is damaged") from error
