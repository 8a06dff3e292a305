"""A `transformers.Trainer` that asks a loss mode for (total, weight, metrics) and divides once.

    loss = sum of totals / trained-token mass of the whole optimizer step

over all micro-batches and ranks, so how a step is split, padded or spread cannot change a gradient. Beyond that it
adds what a long run needs: a NaN stops it at once, a checkpoint appears whole or not at all, and a resumed run is the
uninterrupted one. Data, recipes and output folders are `distill.train`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from distill.batch import Batch, collate
from distill.callbacks import METRICS, MetricsFile, keep_until
from distill.checkpoints import STATE, checkpoints, last_checkpoint, reason
from distill.errors import RunError
from distill.forward import read_head, run
from distill.ledger import forward_flops
from distill.losses import LOSSES, LossMode, LossOutput
from distill.render import Example
from distill.tables import bind, lookup

STAGING = ".saving"


class DistillTrainer(Trainer):
    """Trains `model` by one loss mode.

    `args.remove_unused_columns` and `args.logging_nan_inf_filter` are switched off: the first would drop the weights,
    the second would hide a NaN.

    Args:
        model: the student, a causal language model.
        teacher: a causal language model of the same vocabulary, where the mode needs one; it is frozen.
        args: `transformers.TrainingArguments`.
        train_dataset: `Example`s with a length.
        processing_class: the tokenizer, saved into every checkpoint.
        loss: a name of `LOSSES`.
        loss_options: keyword-only arguments of the mode.
        metrics_folder: where `metrics.jsonl` and `timings.jsonl` go; None writes none.

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
        train_dataset: Sequence[Example],
        processing_class: Any,
        loss: str,
        loss_options: Mapping[str, Any] | None = None,
        metrics_folder: Path | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.mode: LossMode = lookup(LOSSES, loss, "loss mode")
        self.loss_fn = bind(self.mode.fn, loss_options or {}, f"loss mode {loss!r}")
        if ("teacher_logits" in self.mode.needs) != (teacher is not None):
            raise ValueError(f"loss mode {loss!r} " + ("needs a teacher" if teacher is None else "takes no teacher"))
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False
        pad_id = processing_class.pad_token_id
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=partial(_collate_tensors, pad_id=0 if pad_id is None else pad_id),
            callbacks=[*callbacks, *([MetricsFile(metrics_folder)] if metrics_folder else [])],
        )
        self.model_accepts_loss_kwargs = True  # what transformers before `loss_is_scaled_for_ga` asks
        for printer in (PrinterCallback, ProgressCallback):  # stdout belongs to the command
            self.remove_callback(printer)
        self.metrics_folder = metrics_folder
        self.checkpoints_folder = Path(str(self.args.output_dir))
        self.student: Any = self.model
        self.student_head = read_head(self.student, "student")
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            if getattr(teacher, "hf_device_map", None) is None:
                teacher.to(self.args.device)
            self.teacher_head = read_head(teacher, "teacher")
        self.window: dict[str, Tensor] = {}  # sums since the last line of metrics.jsonl
        self.totals: dict[str, Tensor] = {}  # sums since the run began
        self.seconds_before = 0.0
        self.started = time.perf_counter()
        self.broken = torch.zeros((), dtype=torch.int64, device=self.args.device)  # first step with a NaN or inf
        self.staging: Path | None = None

    # -- the loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Return the trained-token mass of one optimizer step, over its micro-batches and all ranks."""
        if not batch_samples:
            return None
        mass = torch.stack([inputs["weights"][:, 1:].sum() for inputs in batch_samples]).sum().to(device)
        return self.accelerator.reduce(mass, "sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this micro-batch's share of the step's loss."""
        batch = Batch(**inputs)
        with self.accelerator.autocast():
            student = run(model, self.student_head, batch.input_ids, batch.attention_mask)
            teacher = None
            if self.teacher is not None:
                with torch.no_grad():
                    teacher = run(self.teacher, self.teacher_head, batch.input_ids, batch.attention_mask)
            output = self.loss_fn(student, teacher, batch)
        if self.student.training:
            self._count(batch, output)
        mass = output.weight if num_items_in_batch is None else num_items_in_batch
        # Data parallelism averages gradients over ranks; the mass is already global, so undo the average.
        loss = output.total / mass * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

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

    # -- what is counted

    def _count(self, batch: Batch, output: LossOutput) -> None:
        lengths = batch.attention_mask.sum(1, dtype=torch.float64)
        sums = {"loss": output.total.detach(), "weight": output.weight, **output.metrics}
        counts = {"tokens": lengths.sum(), "squares": lengths.square().sum(), "trained": (batch.weights > 0).sum()}
        for table, values in ((self.window, sums), (self.totals, counts)):
            for name, value in values.items():
                value = value.to(torch.float64)
                table[name] = table[name] + value if name in table else value

    def ledger(self) -> dict[str, Any]:
        """Return what training cost so far on all ranks: flops, seconds, tokens, trained_tokens."""
        tokens, squares, trained = (self._global(self.totals, name) for name in ("tokens", "squares", "trained"))
        context = squares / tokens / 2 if tokens else 0.0
        flops = 3 * forward_flops(
            self.student.config.get_text_config(), tokens, context
        )  # a backward pass costs two forward passes
        if self.teacher is not None:
            flops += forward_flops(self.teacher.config.get_text_config(), tokens, context)
        seconds = self.seconds_before + time.perf_counter() - self.started
        return {"flops": flops, "seconds": seconds, "tokens": int(tokens), "trained_tokens": int(trained)}

    def _global(self, table: Mapping[str, Tensor], name: str) -> float:
        return float(self.accelerator.reduce(table[name], "sum")) if name in table else 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log per-token means over the steps since the last line, and running totals."""
        if "loss" in logs:
            self._stop_if_broken()
            means = {name: self._global(self.window, name) for name in self.window}
            weight = means.pop("weight")
            ledger = self.ledger()
            logs |= {name: value / weight for name, value in means.items()}
            logs |= {name: ledger[name] for name in ("tokens", "trained_tokens", "flops")}
            self.window = {}
        super().log(logs, start_time)

    # -- checkpoints

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Train; `resume_from_checkpoint` is a checkpoint's folder, or True for the last one."""
        if resume_from_checkpoint is True:
            last = last_checkpoint(self.checkpoints_folder)
            resume_from_checkpoint = str(last) if last else None
        self.started = time.perf_counter()
        if resume_from_checkpoint and self._restore(Path(resume_from_checkpoint)):
            # Only the last save was missed. transformers would take one step more before it notices.
            self._load_from_checkpoint(str(resume_from_checkpoint))
            self.state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            return TrainOutput(self.state.global_step, self.state.log_history[-1]["loss"], {})
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _restore(self, checkpoint: Path) -> bool:
        """Take up the counts of a checkpoint; return whether it is the last one of the run that was asked for."""
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        self.seconds_before = state["seconds"]
        if self.is_world_process_zero():  # the sums were added over ranks when saved: one rank takes them all
            self.window, self.totals = (
                {
                    name: torch.tensor(v, dtype=torch.float64, device=self.args.device)
                    for name, v in state[table].items()
                }
                for table in ("window", "totals")
            )
            if self.metrics_folder is not None:
                keep_until(self.metrics_folder / METRICS, state["step"])
        return state["step"] >= state["max_steps"] and state["length"] == self._length()

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
            "max_steps": self.state.max_steps,
            "length": self._length(),
            "window": {key: self._global(self.window, key) for key in self.window},
            "totals": {key: self._global(self.totals, key) for key in self.totals},
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


def _collate_tensors(examples: Sequence[Example], *, pad_id: int) -> dict[str, Tensor]:
    return collate(examples, pad_id=pad_id).tensors()
