"""Tokens per second of a training step: `distill train` against transformers' own Trainer on the same batches.

Both train the same presets on the same random sequences, half of each trained, in turns (A B A B ...), and the table
quotes the ratio of medians: absolute figures belong to the machine. usage: python benchmarks/train_step.py [--steps N]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from distill.render import Example
from distill.trainer import DistillTrainer
from students import build_student
from teachers.nano.tokenizer import build_tokenizer

LENGTH, BATCH = 128, 16


class Clock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def arguments(folder: str, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
    )


def examples(vocabulary: int, count: int) -> list[Example]:
    rng = np.random.default_rng(0)
    weights = np.repeat(np.array([0.0, 1.0], dtype=np.float32), LENGTH // 2)
    return [Example(rng.integers(0, vocabulary, LENGTH, dtype=np.int32), weights) for _ in range(count)]


def plain_collate(rows: list[Example]) -> dict[str, torch.Tensor]:
    ids = torch.tensor(np.stack([row.input_ids for row in rows]), dtype=torch.int64)
    trained = torch.tensor(np.stack([row.weights for row in rows])) > 0
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.where(trained, ids, -100)}


def seconds_per_step(kind: str, preset: str, steps: int) -> float:
    tokenizer = build_tokenizer()
    student = build_student(preset, tokenizer=tokenizer)
    data, clock = examples(len(tokenizer), BATCH * steps), Clock()
    with tempfile.TemporaryDirectory() as folder:
        if kind == "transformers":
            trainer: Trainer = Trainer(
                student,
                arguments(folder, steps),
                data_collator=plain_collate,
                train_dataset=data,  # type: ignore[arg-type]
                callbacks=[clock],
            )
        else:
            mode = kind.replace("-", "_")
            teacher = build_student(preset, tokenizer=tokenizer, seed=1) if mode == "soft_logits" else None
            trainer = DistillTrainer(
                student,
                teacher,
                args=arguments(folder, steps),
                train_dataset=data,
                processing_class=tokenizer,
                loss=mode,
                loss_options={"num_outcomes": len(tokenizer)} if teacher else {},
                metrics_folder=Path(folder),
                callbacks=[clock],
            )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return statistics.median(clock.seconds[2:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of each run; the first two do not count")
    parser.add_argument("--rounds", type=int, default=3, help="times the contenders take turns")
    options = parser.parse_args()
    table = Table(title=f"{BATCH} x {LENGTH} tokens a step, half of them trained, {torch.get_num_threads()} threads")
    for column in ("student", "trainer", "ms/step", "tokens/s", "time against transformers"):
        table.add_column(column, justify="left" if column in ("student", "trainer") else "right")
    for preset in ("llama-nano", "llama-micro"):
        times: dict[str, list[float]] = {"transformers": [], "hard-labels": [], "soft-logits": []}
        for _ in range(options.rounds):
            for kind, measured in times.items():
                measured.append(seconds_per_step(kind, preset, options.steps))
        reference = statistics.median(times["transformers"])
        for kind, measured in times.items():
            step = statistics.median(measured)
            table.add_row(
                preset, kind, f"{step * 1e3:.1f}", f"{BATCH * LENGTH / step:,.0f}", f"{step / reference:.2f}x"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
