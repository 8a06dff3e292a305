"""What a recipe asks to be learnt: loss modes with weights and options, and where the teacher's word comes from.

Everything is checked before anything is loaded or a folder taken, as far as it can be known without the models.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill.config import TrainConfig, key_values
from distill.divergences import DIVERGENCES
from distill.errors import UserError
from distill.losses import LOSSES, LossMode
from distill.losses.mixture import GIVEN, check_weights, find_mode
from distill.reinforce.recipes import LOSS_OPTIONS, RECIPE, recipe_of
from distill.store import SIGNAL
from distill.tables import bind, lookup, suggest

if TYPE_CHECKING:
    from distill.alignment import Alignment

TRAINER = "trainer"  # the section of --set that is not a loss mode
FLAGS = ("divergence", "temperature", "hard_label_weight")  # options of a mode that have flags of their own
REWARDED = ("preset", "reward", "reward_option", "verifier_option", *RECIPE)  # flags that only rewards give a meaning


@dataclass(frozen=True, slots=True)
class Objective:
    """What a recipe asks to be learnt.

    Attributes:
        weights: mode -> weight.
        options: mode -> its keyword-only arguments.
        needs: what any of the modes needs: see `LossMode.needs`.
        source: where the teacher's word comes from.
    """

    weights: dict[str, float]
    options: dict[str, dict[str, Any]]
    needs: frozenset[str]
    source: Literal["model", "signal"] | None


def read_objective(config: TrainConfig, alignment: Alignment | None = None) -> Objective:
    """Return what a recipe asks to be learnt.

    Args:
        alignment: of a teacher with another tokenizer, whose modes have options of their own.

    Raises:
        UserError: what `loss_weights`, `loss_options` and `teacher_source` refuse; settings that exclude each other.
    """
    weights = loss_weights(config)
    modes = None if alignment is None else alignment.modes
    objective = Objective(weights, loss_options(config, modes), needs(weights, modes), teacher_source(config))
    if config.packing and alignment is not None:
        raise UserError("--packing needs one tokenizer: a teacher of another one reads rows of other lengths")
    written = objective.needs & {"rollouts", "rewards"}
    if config.packing and written:
        writing = ", ".join(name.replace("_", "-") for name in weights if find_mode(name, modes).needs & written)
        raise UserError(f"--packing and {writing} do not go together: rollouts are written one sequence to a row")
    if config.rollout_backend == "vllm":
        if not written:
            raise UserError(f"--rollout-backend says nothing to {', '.join(weights)}: the student writes nothing")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "--rollout-backend vllm works in one process: start without a launcher, or use transformers"
            )
    elif config.rollout_engine_arg:
        raise UserError("--rollout-engine-arg is for --rollout-backend vllm")
    if "rewards" in objective.needs and alignment is not None:
        raise UserError(
            "grpo beside a teacher of another tokenizer is not supported: take a teacher with the student's tokenizer, "
            "or train by grpo alone and distil before or after"
        )
    if config.teacher_tokenizer is not None and objective.source != "signal":
        raise UserError("--teacher-tokenizer says whose tokens stored numbers are of, and none are read here")
    if config.load_in_4bit and config.lora_r is None:
        raise UserError("--load-in-4bit freezes the student's weights: give --lora-r to train adapters beside them")
    return objective


def loss_weights(config: TrainConfig) -> dict[str, float]:
    """Return mode -> weight, modes as `LOSSES` spells them.

    Raises:
        UserError: neither or both of --mode and --loss, an unknown mode, or weights that are none.
    """
    if (config.mode is None) == (config.loss is None):
        given = "neither" if config.mode is None else "both"
        raise UserError(f"name what is learnt with --mode, or with --loss for several modes; {given} was given")
    if config.mode is not None:
        return {mode_name(config.mode): 1.0}
    weights: dict[str, float] = {}
    for name, value in key_values(str(config.loss).split(","), "--loss").items():
        name = mode_name(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"--loss takes mode=number, not {name}={value!r}")
        if name in weights:
            raise UserError(f"--loss names {name} twice")
        weights[name] = float(value)
    check_weights(weights)
    return weights


def mode_name(mode: str) -> str:
    """Return the table name of a mode as a person spells it.

    Raises:
        UserError: unknown; the nearest is suggested.
    """
    known = [name.replace("_", "-") for name in LOSSES]
    name = mode.strip().replace("-", "_")
    if name in LOSSES:
        return name
    if ":" not in mode:
        raise UserError(f"unknown mode {mode!r}: known are {', '.join(known)}{suggest(mode, known)}")
    return mode.strip()


def needs(weights: Iterable[str], stand_ins: Mapping[str, LossMode] | None = None) -> frozenset[str]:
    """Return what any of the modes needs: see `LossMode.needs`."""
    return frozenset().union(*(find_mode(name, stand_ins).needs for name in weights))


def teacher_source(config: TrainConfig) -> Literal["model", "signal"] | None:
    """Say where the teacher's word comes from: a model that runs, stored numbers, or nowhere.

    Raises:
        UserError: the modes need what the recipe does not name, or both are named.
    """
    weights = loss_weights(config)
    wanted = needs(weights)
    listed = ", ".join(name.replace("_", "-") for name in weights)
    if config.signal is not None and "teacher_logits" not in wanted:
        raise UserError(f"--signal says nothing to {listed}: stored numbers serve soft-logits")
    if "teacher" in wanted:
        if config.teacher is None:
            raise UserError(f"{listed} needs a teacher that runs: name one with --teacher")
        if config.signal is not None:
            raise UserError(f"{listed} needs a teacher that runs, so give --teacher without --signal")
        return "model"
    if "teacher_logits" not in wanted:
        return None
    if config.teacher is not None and config.signal is not None:
        raise UserError("--teacher and --signal both say what the teacher thinks: give one")
    if config.teacher is not None:
        return "model"
    if not (signal_folder(config) / "header.json").is_file():
        raise UserError(
            f"{listed} learns from a teacher's distribution: name a model with --teacher, or store its numbers first "
            "(generate --top-logprobs K or --sample-logprobs N, or distill score) and give them with --signal"
        )
    return "signal"


def signal_folder(config: TrainConfig) -> Path:
    """Return where stored numbers are: as told, or beside the traces."""
    return config.signal or config.data / SIGNAL


def loss_options(config: TrainConfig, stand_ins: Mapping[str, LossMode] | None = None) -> dict[str, dict[str, Any]]:
    """Return mode -> options, from flags and `--set MODE.NAME=VALUE`.

    Args:
        stand_ins: modes for a teacher of another tokenizer, where it has one.

    Raises:
        UserError: a flag or section that no mode takes, an option a mode has not, an unknown divergence.
    """
    functions = {name: find_mode(name, stand_ins).fn for name in loss_weights(config)}
    rewarded = "rewards" in needs(functions, stand_ins)
    stray = [name for name in REWARDED if getattr(config, name) not in (None, [])]
    if stray and not rewarded:
        raise UserError(f"--{stray[0].replace('_', '-')} says nothing to {', '.join(functions)}: it is for grpo")
    options: dict[str, dict[str, Any]] = {name: {} for name in functions}
    accepted = {name: _options_of(function) for name, function in functions.items()}

    def give(option: str, value: Any, flag: str) -> None:
        takers = [name for name in functions if option in accepted[name]]
        if not takers:
            raise UserError(f"{flag} says nothing to {', '.join(functions)}")
        for name in takers:
            options[name][option] = value

    for option in FLAGS:
        if (value := getattr(config, option)) is not None:
            give(option, value, "--" + option.replace("_", "-"))
    if config.divergence_option:
        numbers = key_values(config.divergence_option, "--divergence-option")
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise UserError(f"--divergence-option takes name=number, not {name}={value!r}")
        give("divergence_options", numbers, "--divergence-option")
    recipe = recipe_of(config) if rewarded else None
    for option in LOSS_OPTIONS if recipe is not None else ():
        if (value := getattr(recipe, option)) is not None:
            give(option, value, "--" + option.replace("_", "-"))
    for section, values in _sections(config.set, functions).items():
        options[section] |= values
    for name, chosen in options.items():
        bind(functions[name], chosen, f"mode {name!r}")
        _check_divergence(name, functions[name], chosen)
    return options


def _options_of(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.name not in GIVEN]


def _sections(pairs: Iterable[str], functions: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        section, dot, rest = pair.partition("=")[0].strip().rpartition(".")
        section = section.replace("-", "_")
        if section == TRAINER:
            continue
        if not dot or section not in functions:
            sections = ", ".join([TRAINER, *functions])
            raise UserError(f"--set takes SECTION.NAME=VALUE with a section of {sections}, not {pair!r}")
        value = pair.partition("=")[2]
        found.setdefault(section, {}).update(
            key_values(
                [f"{rest}={value}" if "=" in pair else rest], f"--set {section}", _options_of(functions[section])
            )
        )
    return found


def _check_divergence(name: str, function: Any, chosen: Mapping[str, Any]) -> None:
    parameter = inspect.signature(function).parameters.get("divergence")
    if parameter is None:
        return
    divergence = chosen.get("divergence", parameter.default)
    compare = lookup(DIVERGENCES, divergence, "divergence")
    bind(compare, chosen.get("divergence_options") or {}, f"divergence {divergence!r}")
