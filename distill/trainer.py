"""A `transformers.Trainer` that asks a sum of loss modes for (total, weight, metrics) and divides once.

    loss = sum of totals / trained-token mass of the whole optimizer step

over all micro-batches and ranks, so how a step is split, padded, packed or spread cannot change a gradient. Beyond
that it adds what a long run needs: a NaN stops it at once, a checkpoint appears whole or not at all, and a resumed run
is the uninterrupted one. On-policy modes have their batches rewritten by the student (`distill.rollouts`) before the
mass is counted, and reinforcement brings batches of its own (`distill.reinforce`); what modes train beside the student
is `distill.beside`. A run may be measured by what it spends (`distill.budget`). Data, recipes and folders are
`distill.train`.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from distill.alignment import Alignment
from distill.batch import Batch
from distill.beside import Beside
from distill.budget import FINE, Budget, Ending, follow
from distill.callbacks import METRICS, MetricsFile, keep_until
from distill.checkpoints import STATE, checkpoints, last_checkpoint, reason
from distill.errors import RunError, UserError
from distill.forward import Forward, read_head, run
from distill.ledger import forward_flops
from distill.losses.mixture import Mixture
from distill.models import context_length
from distill.reinforce.experience import Experience
from distill.reinforce.journal import ROLLOUTS
from distill.reinforce.reference import Readers
from distill.rollouts import Rollouts
from distill.tally import SQUARES, TOKENS, Tally

STAGING = ".saving"
EXPERIENCE = "experience-{}.pt"  # of a rank
TEACHER_TOKENS, TEACHER_SQUARES = "teacher_tokens", "teacher_squares"  # of a teacher that reads other ones


class DistillTrainer(Trainer):
    """Trains `model` by one loss mode, or a weighted sum of several.

    `args.remove_unused_columns` and `args.logging_nan_inf_filter` are switched off: the first would drop the weights,
    the second would hide a NaN.

    Args:
        model: the student, a causal language model.
        teacher: a causal language model, where a mode needs one; it is frozen. It stays on the device it is on where
            that is not the CPU, or where it is spread over several.
        args: `transformers.TrainingArguments`.
        train_dataset: what `collate` takes, with a length.
        collate: a list of the dataset's items to a `Batch`.
        processing_class: the tokenizer, saved into every checkpoint.
        loss: a name of `LOSSES`, or mode -> weight.
        loss_options: mode -> its keyword-only arguments.
        rollouts: writes the batches of on-policy modes.
        experience: writes and rewards the batches of reinforcement modes, and takes the place of the dataset's items.
        budget: what the run may spend; it then ends where `args.max_steps` or the budget does.
        metrics_folder: where `metrics.jsonl` and `timings.jsonl` go; None writes none.
        alignment: of a teacher with another tokenizer, whose tokens the batches then bring along; None where teacher
            and student have one vocabulary.

    Raises:
        UserError: unknown mode or option; a model whose logits cannot be reproduced; a missing teacher.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the mass of the whole step

    def __init__(
        self,
        model: Any,
        teacher: Any = None,
        *,
        args: TrainingArguments,
        train_dataset: Sequence[Any],
        collate: Callable[[Sequence[Any]], Batch],
        processing_class: Any,
        loss: str | Mapping[str, float],
        loss_options: Mapping[str, Mapping[str, Any]] | None = None,
        rollouts: Rollouts | None = None,
        experience: Experience | None = None,
        budget: Budget | None = None,
        metrics_folder: Path | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        alignment: Alignment | None = None,
    ) -> None:
        self.loss = Mixture(
            {loss: 1.0} if isinstance(loss, str) else loss,
            loss_options or {},
            student=model,
            teacher=teacher,
            num_outcomes=len(processing_class),
            rollouts=rollouts if experience is None else experience.rollouts,
            stand_ins=None if alignment is None else alignment.modes,
        )
        self.alignment = alignment
        if "teacher" in self.loss.needs and teacher is None:
            raise UserError(f"the loss ({loss}) needs a teacher that runs")
        if teacher is not None and self.loss.needs.isdisjoint({"teacher", "teacher_logits"}):
            raise UserError(f"the loss ({loss}) asks no teacher, and one was given")
        if ("rewards" in self.loss.needs) != (experience is not None):
            raise UserError(f"the loss ({loss}) " + ("takes no rewards" if experience else "needs rewards"))
        if ("rollouts" in self.loss.needs and experience is None) != (rollouts is not None):
            raise UserError(f"the loss ({loss}) " + ("takes no rollouts" if rollouts else "needs rollouts"))
        head = model.get_output_embeddings()
        if not self.loss.reads_head and head.weight is not model.get_input_embeddings().weight:
            head.requires_grad_(False)  # data parallelism would wait for a gradient that never comes
        if args.fp16 and len(self.loss.modules):
            raise UserError("fp16 scales the loss, which projectors are not prepared for: use bf16")
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=partial(_as_tensors, collate),
            callbacks=[*callbacks, *([MetricsFile(metrics_folder)] if metrics_folder else [])],
        )
        self.model_accepts_loss_kwargs = True  # what transformers before `loss_is_scaled_for_ga` asks
        for printer in (PrinterCallback, ProgressCallback):  # stdout belongs to the command
            self.remove_callback(printer)
        self.beside = Beside(self.loss.modules, args, self.accelerator)
        self.add_callback(self.beside)
        self.rollouts = rollouts
        self.experience = experience
        self.budget = budget or None
        if self.budget is not None:
            self.add_callback(Ending(self.progress))
        self.metrics_folder = metrics_folder
        self.checkpoints_folder = Path(str(self.args.output_dir))
        self.student: Any = self.model
        self.student_head = read_head(self.student, "student")
        self.readers = None
        if experience is not None:
            self.readers = Readers(
                self.student,
                self.student_head,
                num_outcomes=len(processing_class),
                temperature=experience.rollouts.temperature,
                reference=experience.recipe.beta > 0,
                sync_steps=experience.recipe.ref_model_sync_steps,
                autocast=self.accelerator.autocast,
            )
        sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
        self.trained_share = sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            if getattr(teacher, "hf_device_map", None) is None and teacher.device.type == "cpu":
                teacher.to(self.args.device)
            self.teacher_head = read_head(teacher, "teacher")
            self.teacher_head_here = self.teacher_head
            if teacher.device != self.args.device:  # a chunk of logits is larger than all hidden states: project here
                linear = copy.deepcopy(self.teacher_head.linear).to(self.args.device)
                self.teacher_head_here = replace(self.teacher_head, linear=linear)
        self.tally = Tally(partial(self.accelerator.reduce, reduction="sum"))
        self.broken = torch.zeros((), dtype=torch.int64, device=self.args.device)  # first step with a NaN or inf
        self.staging: Path | None = None

    # -- the loss

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return the micro-batches of one optimizer step and their trained-token mass, over all ranks."""
        batches, mass = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.experience is not None and self.readers is not None and batches:
            self.readers.after(self.state.global_step)
            step = self.experience.step(self.state.global_step, self.readers, device, reduce=self.tally.reduce)
            self.tally.add(step.metrics, step.counts)
            total = self.accelerator.reduce(torch.tensor(step.mass, device=device), "sum")
            # Where every completion was cut and cut ones teach nothing there is no mass, and the sum is 0.
            return [batch.tensors() for batch in step.batches], total.clamp(min=1.0)
        if self.rollouts is None or not batches:
            return batches, mass
        rolled = []
        for number, inputs in enumerate(batches):
            # Rows are numbered through the whole step, so it may be split over micro-batches and ranks at will.
            before = number * self.args.world_size + self.args.process_index
            batch = Batch.from_tensors(inputs).to(device)
            with self.accelerator.autocast():
                written = self.rollouts.roll(
                    batch,
                    step=self.state.global_step,
                    first_row=before * self.args.per_device_train_batch_size,
                )
            self.tally.add(written.metrics, written.counts)
            paired = written.batch
            if self.alignment is not None and paired is not batch:
                most = None if self.teacher is None else context_length(self.teacher.config)
                paired, in_part = self.alignment.pair_rollouts(paired, batch, teacher_length=most)
                self.tally.add({"aligned_in_part": in_part.to(device)}, {})
            rolled.append(paired.tensors())
        return rolled, self._get_num_items_in_batch(rolled, device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Return the trained-token mass of one optimizer step, over its micro-batches and all ranks."""
        if not batch_samples or "weights" not in batch_samples[0]:
            return None
        mass = torch.stack([inputs["weights"][:, 1:].sum() for inputs in batch_samples]).sum().to(device)
        return self.accelerator.reduce(mass, "sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this micro-batch's share of the step's loss."""
        batch = Batch.from_tensors(inputs)
        with self.accelerator.autocast():
            student = run(model, self.student_head, batch, self.loss.student_capture)
            teacher = None if self.teacher is None else self._teach(batch)
            output = self.loss(student, teacher, batch, progress=self.progress())
        if self.student.training:
            self.tally.step(batch, output)
            if batch.other is not None and teacher is not None:
                lengths = batch.other.attention_mask.sum(1).to(torch.float64)
                self.tally.add({}, {TEACHER_TOKENS: lengths.sum(), TEACHER_SQUARES: lengths.square().sum()})
        mass = output.weight if num_items_in_batch is None else num_items_in_batch
        # Data parallelism averages gradients over ranks; the mass is already global, so undo the average.
        loss = output.total / mass * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _teach(self, batch: Batch) -> Forward:
        """Run the teacher where it is, and bring what it says to the student's device."""
        device = self.args.device
        read = batch if batch.other is None else batch.other.batch()
        with torch.no_grad():
            said = run(self.teacher, self.teacher_head, read.to(self.teacher.device), self.loss.teacher_capture)
        attention = {number: tuple(each.to(device) for each in kept) for number, kept in said.attention.items()}
        layers = {number: kept.to(device) for number, kept in said.layers.items()}
        return Forward(said.hidden.to(device), self.teacher_head_here, layers, attention)  # type: ignore[arg-type]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._watch(loss)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self._watch(torch.as_tensor(norm, device=self.args.device))
        return norm

    def _watch(self, value: Tensor) -> None:
        """Note the first step with a value that is not finite; on a GPU it is read at the next line or checkpoint."""
        value = value.full_tensor() if isinstance(value, DTensor) else value  # the norm of gradients that are sharded
        bad = ~torch.isfinite(value.detach()) & (self.broken == 0)
        self.broken = torch.where(bad, self.state.global_step + 1, self.broken)
        if self.args.device.type == "cpu":
            self._stop_if_broken()

    def _stop_if_broken(self) -> None:
        if step := int(self.accelerator.gather(self.broken.reshape(1)).max()):  # any rank's stops all
            raise RunError(f"the loss or its gradient is not finite (NaN or inf) at step {step}; {self._last_kept()}")

    def _last_kept(self) -> str:
        last = last_checkpoint(self.checkpoints_folder)
        return f"the last checkpoint is {last}" if last else "no checkpoint had been written yet"

    # -- how far it is

    def progress(self) -> float:
        """Return the share of the run that is done: of its steps, or of its budget where that is nearer its end."""
        done = self.state.global_step / max(self.state.max_steps, 1)
        if self.budget is None:
            return done
        ledger = self.ledger()
        # Clocks differ between ranks, and all must come to one answer.
        seconds = torch.tensor(ledger["seconds"], dtype=torch.float64, device=self.args.device)
        ledger["seconds"] = float(self.accelerator.reduce(seconds, "mean"))
        return max(done, self.budget.share(ledger))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule, which follows the budget where there is one."""
        if self.budget is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            used = optimizer or self.optimizer
            assert used is not None, "transformers makes the optimizer first"
            self.lr_scheduler = follow(super().create_scheduler(FINE, optimizer), used, self.progress)
        return self.lr_scheduler

    # -- what is counted

    def ledger(self) -> dict[str, Any]:
        """Return what training cost so far on all ranks: see `Tally.ledger`."""
        teacher = None if self.teacher is None else self.teacher.config.get_text_config()
        own = self.student.config.get_text_config()
        if self.alignment is None:
            return self.tally.ledger(own, teacher, trained_share=self.trained_share)
        ledger = self.tally.ledger(own, None, trained_share=self.trained_share)
        total, squares = (
            float(self.tally.reduce(self.tally.totals[name])) if name in self.tally.totals else 0.0
            for name in (TEACHER_TOKENS, TEACHER_SQUARES)
        )
        if total:  # it reads its own tokens
            ledger["flops"] += forward_flops(teacher, total, squares / total / 2)
            ledger["teacher_tokens"] = int(total)
            read = {"student": (TOKENS, SQUARES), "teacher": (TEACHER_TOKENS, TEACHER_SQUARES)}
            for config, whose in self.loss.scorers:
                count, square = (float(self.tally.reduce(self.tally.totals[name])) for name in read[whose])
                ledger["flops"] += forward_flops(config, count, square / count / 2)
        return ledger

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log means over the steps since the last line, per unit of weight, and running totals."""
        if "loss" in logs:
            self._stop_if_broken()
            logs |= self.tally.means()
            logs |= {name: value for name, value in self.ledger().items() if name != "seconds"}
        super().log(logs, start_time)

    # -- checkpoints

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Train; `resume_from_checkpoint` is a checkpoint's folder, or True for the last one."""
        if resume_from_checkpoint is True:
            last = last_checkpoint(self.checkpoints_folder)
            resume_from_checkpoint = str(last) if last else None
        self.tally.started = time.perf_counter()
        if resume_from_checkpoint and self._restore(Path(resume_from_checkpoint)):
            # Only the last save was missed. transformers would take one step more before it notices.
            self._load_from_checkpoint(str(resume_from_checkpoint))
            self.state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            return TrainOutput(self.state.global_step, self.state.log_history[-1]["loss"], {})
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _restore(self, checkpoint: Path) -> bool:
        """Take up the counts of a checkpoint; return whether it is the last one of the run that was asked for."""
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        self.tally.seconds_before = state["seconds"]
        self.beside.load(checkpoint)
        if self.is_world_process_zero():  # the sums were added over ranks when saved: one rank takes them all
            self.tally.restore(state, self.args.device)
            if self.metrics_folder is not None:
                keep_until(self.metrics_folder / METRICS, state["step"])
        if self.experience is not None and self.readers is not None:
            kept = torch.load(checkpoint / EXPERIENCE.format(self.args.process_index), weights_only=True)
            self.experience.restore(kept["experience"])
            self.readers.restore(kept["reference"])
            if self.is_world_process_zero() and self.metrics_folder is not None:
                keep_until(self.metrics_folder / ROLLOUTS, state["step"])
        return state["progress"] >= 1.0 and state["length"] == self._length()

    def _length(self) -> list[float]:
        return [self.args.max_steps, self.args.num_train_epochs]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            super()._save(output_dir, state_dict)
        finally:
            if shown:
                logging.enable_progress_bar()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.staging) if self.staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside the finished ones and rename it when it is whole."""
        self._stop_if_broken()
        folder = self.checkpoints_folder
        name = f"checkpoint-{self.state.global_step}"
        state = {
            "step": self.state.global_step,
            "progress": self.progress(),
            "length": self._length(),
            **self.tally.state(),
            "seconds": self.ledger()["seconds"],
        }
        self.staging = folder / STAGING
        if self.is_world_process_zero():
            shutil.rmtree(self.staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            if self.is_world_process_zero():
                (self.staging / name / STATE).write_text(json.dumps(state), encoding="utf-8")
                self.beside.save(self.staging / name)
            if self.experience is not None and self.readers is not None:
                kept = {"experience": self.experience.state(), "reference": self.readers.state()}
                torch.save(kept, self.staging / name / EXPERIENCE.format(self.args.process_index))
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self.staging, ignore_errors=True)
            raise RunError(f"cannot write {folder / name}: {reason(error)}; {self._last_kept()}") from error
        finally:
            staged, self.staging = self.staging / name, None
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            shutil.rmtree(folder / name, ignore_errors=True)
            staged.rename(folder / name)
            shutil.rmtree(staged.parent, ignore_errors=True)
            limit = self.args.save_total_limit
            for old in checkpoints(folder)[: -limit if limit else 0]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


def _as_tensors(collate: Callable[[Sequence[Any]], Batch], items: Sequence[Any]) -> dict[str, Tensor]:
    return collate(items).tensors()
