"""Tokens per second of a whole training step: `distill train` against TRL, DistillKit and transformers' own Trainer.

Every contender is a process that holds the same student, teacher and batches (token ids, weights and padding), in
float32, with the same optimizer, schedule and clipping, and waits for its turn: the processes take one step each, in
turns, the others asleep. A step is all that lies between two ends of optimizer steps: collating, both models, loss,
gradients, clipping, update. The table quotes medians of ratios of steps on the same batch: absolute figures belong to
the machine; beside them the ratio of CPU time, which a busy machine disturbs less. Contenders of one objective must
report the same losses, or the benchmark stops.

The objectives are forward KL to a teacher and cross-entropy, both on completions only. TRL's GKDTrainer is off-policy
(`lmbda=0`). TRL's DistillationTrainer always generates: here the one method that does is replaced by one that lays out
the given completions as it would its own, so its loss and everything around are measured and its generation is not.
DistillKit has requirements of its own and is no package: name the Python of a virtual environment that holds it with
`--distillkit-python`. It masks tokens where it means the predictions of them, so its labels are moved by one.

Without options: small models with random weights on random sequences. `--teacher`, `--student` and `--data` take what
`distill train` takes.

usage: python benchmarks/train_step.py [--teacher MODEL --student SPEC --data STORE_OR_JSONL] [--steps N] [--batch B]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

LENGTH = 128  # of a random sequence, half of it trained
WARM_UP = 1  # steps that do not count
TOLERANCES = 1e-3, 1e-2  # of losses, relative: at the first step, and where the students have parted by rounding
Row = dict[str, list]  # input_ids, weights: of one sequence
Batch = dict[str, torch.Tensor]


# -- what the peers are given


def padded(rows: list[Row]) -> Batch:
    """Return (B, T) input ids, attention mask and labels, -100 where nothing is trained; padded on the right."""
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    for number, row in enumerate(rows):
        own = torch.tensor(row["input_ids"])
        ids[number, : len(own)], mask[number, : len(own)] = own, 1
        labels[number, : len(own)] = torch.where(torch.tensor(row["weights"]) > 0, own, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def parted(rows: list[Row]) -> Batch:
    """Return the same as TRL lays out what it generated: prompts padded on the left, completions on the right."""
    begins = [next(place for place, weight in enumerate(row["weights"]) if weight > 0) for row in rows]
    before, after = max(begins), max(len(row["weights"]) - begin for row, begin in zip(rows, begins, strict=True))
    ids, mask, trained = (torch.zeros((len(rows), before + after), dtype=torch.int64) for _ in range(3))
    for number, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        own = slice(before - begin, before - begin + len(row["input_ids"]))
        ids[number, own], mask[number, own] = torch.tensor(row["input_ids"]), 1
        trained[number, own] = (torch.tensor(row["weights"]) > 0).long()
    return {
        "prompt_ids": ids[:, :before],
        "prompt_mask": mask[:, :before],
        "completion_ids": ids[:, before:],
        "completion_mask": mask[:, before:],
        "tool_mask": trained[:, before:],
        "num_items_in_batch": trained.sum(),
    }


def moved(rows: list[Row]) -> Batch:
    """Return `padded` with every label at the token that predicts it, where DistillKit's mask looks for it."""
    batch = padded(rows)
    batch["labels"] = torch.cat([batch["labels"][:, 1:], batch["labels"][:, :1]], dim=1)
    return batch


# -- contenders: f(student, teacher, tokenizer, rows, settings of a transformers Trainer) -> Trainer


def distill_trainer(loss: str) -> Callable[..., Trainer]:
    def make(student: Any, teacher: Any, tokenizer: Any, rows: list[Row], settings: dict[str, Any]) -> Trainer:
        from distill.batch import collate
        from distill.render import Example
        from distill.trainer import DistillTrainer

        return DistillTrainer(
            student,
            teacher,
            args=TrainingArguments(**settings),
            train_dataset=[
                Example(np.array(row["input_ids"], np.int32), np.array(row["weights"], np.float32)) for row in rows
            ],
            collate=lambda items: collate(items, pad_id=0),
            processing_class=tokenizer,
            loss=loss,
            metrics_folder=Path(settings["output_dir"]),
        )

    return make


def gkd(student: Any, teacher: Any, tokenizer: Any, rows: list[Row], settings: dict[str, Any]) -> Trainer:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    return GKDTrainer(
        student,
        teacher,
        args=GKDConfig(lmbda=0.0, seq_kd=False, beta=0.0, temperature=1.0, max_length=None, **settings),
        data_collator=padded,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def distillation(student: Any, teacher: Any, tokenizer: Any, rows: list[Row], settings: dict[str, Any]) -> Trainer:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class OffPolicy(DistillationTrainer):
        def _prepare_inputs(self, generation_batch: Any) -> Any:
            return Trainer._prepare_inputs(self, parted(generation_batch))

    return OffPolicy(
        student,
        teacher,
        args=DistillationConfig(beta=0.0, temperature=1.0, shuffle_dataset=False, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def distillkit(student: Any, teacher: Any, tokenizer: Any, rows: list[Row], settings: dict[str, Any]) -> Trainer:
    from datasets import Dataset
    from distillkit.configuration import DistillationRunConfig
    from distillkit.signals import OnlineSignalSource
    from distillkit.trainer import DistillationTrainer
    from trl import SFTConfig

    config = {
        "model": "student",
        "dataset": {"train_dataset": {"disk_path": "rows"}},
        "teacher": {"kind": "hf", "path": "teacher"},
        "sequence_length": max(len(row["input_ids"]) for row in rows),
        "output_path": settings["output_dir"],
        "use_flash_attention": False,
        "loss_functions": [{"function": "kl", "weight": 1.0, "temperature": 1.0}],
    }
    return DistillationTrainer(
        student,
        DistillationRunConfig.model_validate(config),
        OnlineSignalSource(teacher, vocab_size=len(tokenizer)),
        len(tokenizer),
        args=SFTConfig(max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **settings),
        data_collator=moved,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def plain(student: Any, teacher: Any, tokenizer: Any, rows: list[Row], settings: dict[str, Any]) -> Trainer:
    return Trainer(student, TrainingArguments(**settings), data_collator=padded, train_dataset=rows)


# objective -> contender -> its maker; the first is ours
CONTENDERS: dict[str, dict[str, Callable[..., Trainer]]] = {
    "forward KL": {
        "distill soft-logits": distill_trainer("soft_logits"),
        "TRL GKDTrainer": gkd,
        "TRL DistillationTrainer": distillation,
        "DistillKit": distillkit,
    },
    "cross-entropy": {"distill hard-labels": distill_trainer("hard_labels"), "transformers Trainer": plain},
}


# -- one contender's process


class Turns(TrainerCallback):
    """Waits for a line on stdin before every optimizer step, and answers with what the step took.

    Args:
        answer: writes one JSON object to the parent process.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], None]) -> None:
        self.answer = answer
        self.loss: torch.Tensor | None = None

    def watch(self, trainer: Trainer) -> None:
        """Take part in a training, and see its losses."""
        step = trainer.training_step

        def training_step(*given: Any, **named: Any) -> torch.Tensor:
            self.loss = step(*given, **named)
            return self.loss

        trainer.training_step = training_step  # type: ignore[method-assign]
        trainer.add_callback(self)

    def wait(self) -> None:
        sys.stdin.readline()
        self.began = time.perf_counter(), time.process_time()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.wait()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, busy = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        assert self.loss is not None
        self.answer({"seconds": seconds, "busy": busy, "loss": float(self.loss), "bytes": peak_bytes()})
        if state.global_step < state.max_steps:
            self.wait()


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def take_part(name: str, objective: str, folder: Path) -> None:
    """Be a contender: everything is in `folder`."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer

    def answer(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=channel, flush=True)

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    teacher = None
    if objective == "forward KL":
        teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    settings = job["settings"] | {"output_dir": str(folder / name), "use_cpu": not torch.cuda.is_available()}
    trainer = CONTENDERS[objective][name](student, teacher, tokenizer, job["rows"], settings)
    Turns(answer).watch(trainer)
    answer({"threads": torch.get_num_threads()})
    trainer.train()


# -- the race


def told(batch: int, steps: int, optimizer: str) -> dict[str, Any]:
    """Return what every trainer is told; the defaults of TRL's differ from transformers'."""
    return {
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "optim": optimizer,
        "bf16": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def write_job(folder: Path, student: Any, teacher: Any, tokenizer: Any, job: dict[str, Any]) -> None:
    for name, model in (("student", student), ("teacher", teacher)):
        # Some trainers compare the logits of padding rows and some do not: there shall be none.
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")


class Contender:
    """A process that waits for its turn; what it writes to stderr is shown where it fails."""

    def __init__(self, name: str, objective: str, folder: Path, python: str) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        line = [python, __file__, "--take-part", name, objective, str(folder)]
        pipe = subprocess.PIPE
        with self.log.open("w") as log:
            self.process = subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=log, text=True)

    def hear(self) -> dict[str, Any]:
        """Return its next answer."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        sys.exit(f"{self.name} ended:\n{self.log.read_text()[-4000:]}")

    def step(self) -> dict[str, Any]:
        """Let it take one optimizer step."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return self.hear()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def race(objective: str, folder: Path, steps: int, pythons: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Return what every contender answered at every step.

    Args:
        pythons: contender -> the interpreter that runs it.
    """
    running: list[Contender] = []
    try:
        for name, python in pythons.items():
            running.append(Contender(name, objective, folder, python))
        threads = {each.name: each.hear()["threads"] for each in running}
        if len(set(threads.values())) > 1:
            sys.exit(f"the contenders have different numbers of threads: {threads}")
        answers: dict[str, list[dict[str, Any]]] = {each.name: [] for each in running}
        for step in range(steps):
            for each in running:
                answers[each.name].append(each.step())
            losses = {name: given[-1]["loss"] for name, given in answers.items()}
            ours, tolerance = losses[running[0].name], TOLERANCES[step > 0]
            if any(abs(loss - ours) > tolerance * abs(ours) for loss in losses.values()):
                sys.exit(f"{objective}: the contenders do not compute the same loss at step {step + 1}: {losses}")
    finally:
        for each in running:
            each.end()
    return answers


def show(title: str, answers: dict[str, list[dict[str, Any]]], tokens: list[int]) -> None:
    """Print a table: ms, tokens/s, time and CPU time against ours, peak memory."""
    from rich.console import Console
    from rich.table import Table

    counted = {name: given[WARM_UP:] for name, given in answers.items()}
    ours = next(iter(counted.values()))
    ratios = {
        name: [
            statistics.median(each[kind] / own[kind] for each, own in zip(given, ours, strict=True))
            for kind in ("seconds", "busy")
        ]
        for name, given in counted.items()
    }
    best = min(list(ratios)[1:], key=lambda name: ratios[name][0])
    table = Table(title=title, caption=f"{ratios[best][0]:.2f} times as fast as the best other, {best}")
    for column in ("trainer", "ms/step", "tokens/s", "time", "CPU time", "peak MiB"):
        table.add_column(column, justify="left" if column == "trainer" else "right")
    for name, given in counted.items():
        step = statistics.median(each["seconds"] for each in given)
        rate = statistics.median(n / each["seconds"] for n, each in zip(tokens[WARM_UP:], given, strict=True))
        cells = [f"{step * 1e3:,.0f}", f"{rate:,.0f}", *(f"{ratio:.2f}x" for ratio in ratios[name])]
        table.add_row(name, *cells, f"{given[-1]['bytes'] / 2**20:,.0f}")
    Console().print(table)


def random_rows(vocabulary: int, count: int) -> list[Row]:
    rng = np.random.default_rng(0)
    weights = [0.0] * (LENGTH // 2) + [1.0] * (LENGTH // 2)
    return [{"input_ids": rng.integers(0, vocabulary, LENGTH).tolist(), "weights": weights} for _ in range(count)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a model; without one, presets with random weights")
    parser.add_argument("--student", help="a model, preset or prune:MODEL?layers=N")
    parser.add_argument("--data", type=Path, help="a trace store, or a .jsonl file")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=8, help=f"optimizer steps; the first {WARM_UP} do not count")
    parser.add_argument("--objective", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--optimizer", default="adamw_torch_fused", help="of every contender; transformers' own")
    parser.add_argument("--against", nargs="+", help="only these contenders beside ours, where memory is short")
    parser.add_argument("--distillkit-python", help="a Python that has distillkit installed")
    parser.add_argument("--take-part", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.take_part:
        name, objective, folder = options.take_part
        take_part(name, objective, Path(folder))
        return
    given = [options.teacher, options.student, options.data]
    if any(given) and not all(given):
        parser.error("--teacher, --student and --data belong together")

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    for spec in [options.student] if options.student else ["llama-nano", "llama-micro"]:
        student, teacher, tokenizer, rows = models_and_rows(spec, options)
        batches = [rows[start : start + options.batch] for start in range(0, len(rows), options.batch)]
        tokens = [sum(len(row["input_ids"]) for row in batch) for batch in batches]
        job = {"rows": rows, "settings": told(options.batch, options.steps, options.optimizer)}
        for objective in options.objective:
            pythons = dict.fromkeys(CONTENDERS[objective], sys.executable)
            if options.distillkit_python:
                pythons |= {"DistillKit": options.distillkit_python} if "DistillKit" in pythons else {}
            else:
                pythons.pop("DistillKit", None)
            if options.against:
                ours, *others = pythons
                if unknown := set(options.against) - set(others):
                    parser.error(f"--against {', '.join(sorted(unknown))}: there are {', '.join(others)}")
                pythons = {name: pythons[name] for name in (ours, *options.against)}
            with tempfile.TemporaryDirectory() as folder:
                write_job(Path(folder), student, teacher, tokenizer, job)
                answers = race(objective, Path(folder), options.steps, pythons)
            show(f"{spec}, {objective}, {options.batch} sequences a step, float32, {device}", answers, tokens)


def models_and_rows(spec: str, options: argparse.Namespace) -> tuple[Any, Any, Any, list[Row]]:
    """Return student, teacher, tokenizer, and as many sequences as all steps take."""
    from distill.dataset import load_examples
    from distill.models import load_model, load_tokenizer
    from students import build_student
    from teachers.nano.tokenizer import build_tokenizer

    count = options.batch * options.steps
    if options.teacher is None:
        tokenizer = build_tokenizer()
        student, teacher = (build_student(spec, tokenizer=tokenizer, seed=seed) for seed in (0, 1))
        return student, teacher, tokenizer, random_rows(len(tokenizer), count)
    tokenizer = load_tokenizer(options.teacher)
    examples = load_examples(options.data, tokenizer).examples
    rows = [{"input_ids": each.input_ids.tolist(), "weights": each.weights.tolist()} for each in examples]
    student, teacher = build_student(spec, tokenizer=tokenizer), load_model(options.teacher)
    return student, teacher, tokenizer, [rows[number % len(rows)] for number in range(count)]


if __name__ == "__main__":
    main()
