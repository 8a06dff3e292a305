"""What a run learns from: traces as rows, or questions whose answers are rewarded, and who writes where a student does.

Everything that can be refused about data is refused here, before anything is trained or written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from distill.alignment import Alignment
from distill.batch import collate
from distill.config import TrainConfig
from distill.dataset import load_examples
from distill.errors import UserError
from distill.models import context_length, end_token_ids
from distill.objective import Objective, signal_folder
from distill.packing import check_packing, pack
from distill.progress import say
from distill.records import Prompt
from distill.reinforce.experience import Experience
from distill.reinforce.questions import Questions
from distill.reinforce.recipes import LOSS_OPTIONS, recipe_of
from distill.reinforce.rewards import Scorer
from distill.reinforce.setup import Places, Slots, open_experience
from distill.render import Example
from distill.rollouts import Rollouts, Writer
from distill.signal_data import SignalData


@dataclass(frozen=True, slots=True)
class Rewarded:
    """Questions, and what judges the answers to them."""

    prompts: Sequence[Prompt]
    scorer: Scorer


@dataclass(frozen=True, slots=True)
class Material:
    """What a run learns from.

    Attributes:
        rows, collate: the data set that transformers walks over, and what makes batches of it.
        facts: what `run.json` says of it.
        rollouts, experience: who writes the batches, where the student does.
    """

    rows: Sequence[Any]
    collate: Callable[[Sequence[Any]], Any]
    facts: Mapping[str, Any]
    rollouts: Rollouts | None = None
    experience: Experience | None = None


def traces_to_learn(
    config: TrainConfig,
    objective: Objective,
    model: Any,
    tokenizer: Any,
    teacher: Any,
    alignment: Alignment | None,
    max_length: int | None,
    writer: Writer | None,
) -> Material:
    """Read the traces, and say what of them cannot be used."""
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
    rollouts = _rollouts(config, model, tokenizer, max_length, writer) if "rollouts" in objective.needs else None
    if rollouts is not None:
        rollouts.check(dataset.examples)
    facts: dict[str, Any] = {
        "sequences": len(dataset.examples),
        "dropped_overlong": dataset.dropped,
        "cut_overlong": dataset.cut,
        "without_signal": dataset.unmatched,
        "trained_share": dataset.trained_share,
    }
    if alignment is not None:
        facts["alignment"] = {"method": alignment.name, "why": alignment.why}
        facts |= {"unaligned": dataset.unaligned, "aligned_in_part": dataset.in_part}
    pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = _rows(config, model, dataset.examples, max_length)
    return Material(rows, partial(collate, pad_id=pad_id, signals=signals), facts, rollouts)


def questions_to_answer(
    config: TrainConfig,
    objective: Objective,
    model: Any,
    tokenizer: Any,
    rewarded: Rewarded,
    max_length: int | None,
    writer: Writer | None,
    args: Any,
) -> Material:
    """Render the questions, and set up who answers and rewards."""
    recipe = replace(recipe_of(config), **_set_beside(objective))
    questions = Questions(rewarded.prompts, tokenizer, seed=config.seed)
    experience = open_experience(
        config,
        recipe,
        questions,
        rewarded.scorer,
        tokenizer=tokenizer,
        rollouts=_rollouts(config, model, tokenizer, max_length, writer),
        alone=objective.weights.keys() == {"grpo"},
        world=args.world_size,
        rank=args.process_index,
    )
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * args.world_size
    facts = {
        "questions": len(questions),
        "reinforcement": {**asdict(recipe), "rewards": dict(rewarded.scorer.weights)},
    }
    return Material(Slots.of(len(questions), recipe, rows), Places, facts, experience=experience)


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


def _set_beside(objective: Objective) -> dict[str, Any]:
    """Return what `--set grpo.NAME` says of the recipe's settings: a reference is read where a beta asks for one."""
    chosen = objective.options.get("grpo", {})
    return {name: chosen[name] for name in LOSS_OPTIONS if name in chosen}


def _rollouts(
    config: TrainConfig, model: Any, tokenizer: Any, max_length: int | None, writer: Writer | None
) -> Rollouts:
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
        writer=writer,
    )
