"""Where does it matter which loss a student learns by? The experiment behind docs/study.md, on the embedded teacher.

A student that has learnt the problems of 1 and 2 operations in part goes on with a few traces. Each of `SETTINGS`
differs in one thing from the first: how many traces, who wrote them, the student's shape, the learning rate. Within a
setting all arms start from the same weights, see the same traces in the same order and take as many optimizer steps. A
seed decides the order and which traces: each has problems of its own. Students of one shape start from one trained
model, whatever the seed, so the intervals over seeds speak of other traces and another order, not of other first
weights. All answer the same held-out problems, greedily, judged by the `math` verifier.

A finished run is one line of docs/data/study.jsonl, and what is there is not done again.

usage: python benchmarks/study.py                    the tables of what is there
       python benchmarks/study.py --run [--part I/N] do what is missing, or the I-th of N parts side by side
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from distill.reasoning import split_reasoning
from distill.records import Prompt, Trace
from distill.statistics import holm, student_t_quantile
from teachers import nano
from teachers.nano.problems import solved

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "data" / "study.jsonl"
SEEDS = 5
QUESTIONS = 200
STEPS, BATCH = 100, 16
BASE_STEPS, BASE_RATE = 1200, 3e-3
LEVELS = (1, 2)
WEIGHT_NOISE = 0.3  # of the weak teacher, in standard deviations of each matrix
COMPLETION = 48  # tokens; a right trace has at most about 25
START, REFERENCE = "start", "hard"  # what all arms of a setting start from, and what they are compared with

# What `distill generate` is told. The embedded teacher is nearly always right, so noise has to be made: by sampling so
# hot that many traces are wrong while the teacher that runs beside the student is right, or by a teacher whose weights
# are damaged, so that its traces and its distributions are wrong alike. Nothing wrong is rejected in either.
# The clean traces are the worked solutions, which is what the teacher writes.
STORES: dict[str, str] = {
    "hot": f"--max-completion-length {COMPLETION} --temperature 2.2 --top-p 1 --keep any --drop none",
    "weak": f"--max-completion-length {COMPLETION} --keep any --drop none",
}

ARMS: dict[str, dict[str, Any]] = {
    "hard": {"mode": "hard-labels"},
    "soft": {"mode": "soft-logits"},
    "soft at T=3 + hard": {"loss": "soft_logits=1,hard_labels=0.5", "temperature": 3.0},
    "features + hard": {"loss": "features=1,hard_labels=1"},
    "relations + hard": {"loss": "relations=1,hard_labels=1"},
    "on-policy": {"mode": "on-policy", "student_share": 0.5, "max_completion_length": COMPLETION},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What `arms` are compared under: `traces` of `store` for each seed, a `student`, and a peak learning `rate`."""

    traces: int = 400
    store: str = "clean"
    student: str = "llama-nano"
    rate: float = 1e-3
    arms: tuple[str, ...] = tuple(ARMS)

    @property
    def teacher(self) -> str:
        return "weak" if self.store == "weak" else "nano"


SETTINGS: dict[str, Setting] = {
    "400 traces": Setting(),
    "100 traces": Setting(traces=100),
    "weak teacher": Setting(store="weak"),
    "three times the rate": Setting(rate=3e-3, arms=("hard", "features + hard")),
    "hot traces": Setting(store="hot"),
    "half the width": Setting(student="llama-nano:hidden_size=32,intermediate_size=96"),
    "twice the depth": Setting(student="llama-nano:num_hidden_layers=4"),
    "other architecture": Setting(student="qwen3-nano"),
}


# -- running


class Study:
    """What the runs share: models, questions, and a folder where whatever was made once is used again."""

    def __init__(self, work: Path) -> None:
        import torch

        from distill.models import load_model, load_tokenizer

        torch.set_num_threads(1)
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        self.tokenizer = load_tokenizer(str(nano.model_path()))
        self.folders = {"nano": nano.model_path(), "weak": work / "teacher-weak"}
        with self._alone():
            if not self.folders["weak"].exists():
                self._damage(load_model(str(nano.model_path())))
        self.teachers = {name: load_model(str(folder)) for name, folder in self.folders.items()}
        self.questions = list(nano.problems(LEVELS, split="heldout", limit=QUESTIONS))

    def run(self, setting: Setting, arm: str, seed: int) -> dict[str, Any]:
        """Train one student, have it answer, and return what its line of the results says."""
        with self._alone():
            base, data = self.base(setting.student), self._traces(setting, seed)
        if arm == START:
            return self._scores(base)
        asked = {} if arm == REFERENCE else {"teacher": setting.teacher}
        settings = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": setting.rate}
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            out = Path(folder) / "student"
            run = self._train(student=str(base), data=data, out=out, seed=seed, **settings, **asked, **ARMS[arm])
            return {**self._scores(out), "flops": run["ledger"]["flops"], "loss": run["metrics"]["loss"]}

    def base(self, student: str) -> Path:
        """Return the trained model that students of this shape start from."""
        data = self.work / "base.jsonl"
        if not data.exists():
            problems = solved(LEVELS, limit=BASE_STEPS * BATCH)  # none twice
            _write(data, (json.dumps(_solved(*each)) + "\n" for each in problems))
        out = self.work / f"base-{student.replace(':', '-')}"
        settings = {"max_steps": BASE_STEPS, "per_device_train_batch_size": BATCH, "learning_rate": BASE_RATE}
        # The rate stays up, so that the arms, which let it fall, go on from a student that is still on its way.
        self._train(
            student=student,
            data=data,
            out=out,
            mode="hard-labels",
            lr_scheduler_type="constant_with_warmup",
            resume=True,
            **settings,
        )
        return out

    def _train(self, **settings: Any) -> dict[str, Any]:
        from distill.config import TrainConfig
        from distill.run_folder import RUN, read_run
        from distill.train import run_training
        from students import build_student

        config = TrainConfig(save_steps=500, logging_steps=50, **settings)
        if (config.out / RUN).exists():
            return read_run(config.out)
        student = build_student(config.student, tokenizer=self.tokenizer, seed=config.seed)
        teacher = self.teachers[config.teacher] if config.teacher else None
        return run_training(config, model=student, tokenizer=self.tokenizer, teacher=teacher)

    def _scores(self, model: Path) -> dict[str, Any]:
        """Return which questions a model answers rightly, a digit each, and its bits per byte on their solutions."""
        from distill.evaluate import bits_per_byte
        from teachers.backend import Request
        from teachers.engines.transformers_engine import TransformersEngine
        from teachers.verifiers.math_answer import math as verdict_of

        engine = TransformersEngine(str(model), concurrency=QUESTIONS)
        requests = [
            Request(uid=str(number), prompt=prompt, sample_index=0, seed=number)
            for number, prompt in enumerate(self.questions)
        ]
        sampling = {"temperature": 0.0, "top_p": 1.0, "max_completion_length": COMPLETION}
        right = ["0"] * QUESTIONS
        for request, completion in engine.generate(requests, sampling):
            if completion.finish_reason == "stop":
                right[int(request.uid)] = str(int(verdict_of(_trace(request, completion)).score == 1.0))
        worked = solved(LEVELS, split="heldout", limit=QUESTIONS)
        texts = [_solved(*each)["messages"] for each in worked]
        bits = bits_per_byte(engine.model, self.tokenizer, texts, batch_size=64)["bits_per_byte"]
        return {"right": "".join(right), "bits_per_byte": round(bits, 5)}

    def _traces(self, setting: Setting, seed: int) -> Path:
        """Return the traces of a seed: as many as the setting says, of other problems than another seed's."""
        data = self.work / f"{setting.store}-{setting.traces}-{seed}.jsonl"
        if not data.exists():
            first = seed * setting.traces
            if setting.store == "clean":
                rows = [
                    json.dumps(_solved(*each)) + "\n" for each in solved(LEVELS, seed=1, limit=first + setting.traces)
                ]
            else:
                rows = self._store(setting.store, self.folders[setting.teacher])
            assert len(rows) >= first + setting.traces, f"{len(rows)} traces are too few"
            _write(data, rows[first : first + setting.traces])
        return data

    def _store(self, name: str, teacher: Path) -> list[str]:
        """Return the kept traces of a store, as lines; it is generated if it is not there."""
        store, prompts = self.work / f"store-{name}", self.work / "prompts.jsonl"
        if not prompts.exists():
            asked = nano.problems(LEVELS, seed=1, limit=SEEDS * Setting().traces)
            _write(prompts, (json.dumps({"messages": each.messages, "answer": each.gold}) + "\n" for each in asked))
        line = f"generate --backend transformers --prompts {prompts} --teacher {teacher} --out {store} {STORES[name]}"
        subprocess.run([sys.executable, str(ROOT / "cli.py"), *line.split()], check=True)
        return (store / "kept.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)

    def _damage(self, model: Any) -> None:
        """Save the weak teacher: the embedded one with Gaussian noise on every matrix."""
        import torch

        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in (each for each in model.parameters() if each.ndim == 2):
                weight += WEIGHT_NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
        aside = self.work / "teacher.making"
        model.save_pretrained(aside)
        self.tokenizer.save_pretrained(aside)
        aside.rename(self.folders["weak"])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other parts out while something shared is made."""
        with (self.work / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _solved(prompt: Prompt, solution: str) -> dict[str, Any]:
    return {"messages": [*prompt.messages, {"role": "assistant", "content": solution}]}


def _trace(request: Any, completion: Any) -> Trace:
    parts = split_reasoning(completion.text, required=False)
    return Trace(
        uid=request.uid,
        prompt_uid=request.prompt.uid,
        messages=request.prompt.messages,
        completion=completion.text,
        reasoning=parts.reasoning,
        answer=parts.answer,
        finish_reason=completion.finish_reason,
        num_prompt_tokens=completion.num_prompt_tokens,
        num_completion_tokens=completion.num_completion_tokens,
        sample_index=0,
        seed=request.seed,
        teacher="",
        backend="transformers",
        gold=request.prompt.gold,
    )


def _write(path: Path, lines: Iterable[str]) -> None:
    """Write a file that is there whole or not at all."""
    aside = path.with_suffix(".making")
    with aside.open("w", encoding="utf-8") as stream:
        stream.writelines(lines)
    aside.rename(path)


def jobs() -> Iterator[tuple[str, str, int]]:
    """Yield (setting, arm, seed) of the whole study, whole seeds first."""
    for name, setting in SETTINGS.items():
        yield name, START, 0
        for seed in range(SEEDS):
            yield from ((name, arm, seed) for arm in setting.arms)


def run_missing(results: Path, work: Path, part: int, parts: int) -> None:
    """Do every job that the results lack, and add a line for each as it is done."""
    done = {(row["setting"], row["arm"], row["seed"]) for row in read(results)}
    waiting = [job for job in list(jobs())[part - 1 :: parts] if job not in done]
    study = Study(work)
    results.parent.mkdir(parents=True, exist_ok=True)
    for name, arm, seed in waiting:
        began = time.process_time()
        found = study.run(SETTINGS[name], arm, seed)
        row = {"setting": name, "arm": arm, "seed": seed, **found, "cpu_seconds": round(time.process_time() - began, 1)}
        with results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


# -- reading


def read(results: Path) -> list[dict[str, Any]]:
    """Return the lines of the results; a part that runs beside may have added in any order."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over S seeds, its 95 % interval (low, high) and the p-value of a mean of 0, by Student's t."""

    mean: float
    low: float
    high: float
    p: float


def estimate(values: Sequence[float]) -> Estimate:
    """Return what S >= 2 seeds say; seeds that do not differ at all give no width and decide nothing (p = 1)."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    if error == 0:
        return Estimate(mean, mean, mean, 1.0)
    degrees = len(values) - 1
    half = error * float(student_t_quantile(0.975, degrees))
    low, high = 0.0, 1.0  # of the p-value: halved until it is known to 12 digits
    while high - low > 1e-12:
        middle = (low + high) / 2
        far = float(student_t_quantile(1 - middle / 2, degrees)) > abs(mean) / error
        low, high = (middle, high) if far else (low, middle)
    return Estimate(mean, mean - half, mean + half, high)


Measure = dict[tuple[str, str], dict[int, float]]  # (setting, arm) -> seed -> value


def measure(rows: Iterable[dict[str, Any]], of: str) -> Measure:
    """Return accuracies in points (of "right"), or bits per byte."""
    found: Measure = {}
    for row in rows:
        value = 100 * row["right"].count("1") / len(row["right"]) if of == "right" else row[of]
        found.setdefault((row["setting"], row["arm"]), {})[row["seed"]] = value
    return found


def gains(values: Measure, settings: Sequence[str]) -> dict[tuple[str, str], list[float]]:
    """Return each arm's differences to the reference of the same seed, in every setting and in the mean of several.

    The mean, under the setting "all", is taken seed by seed over the settings in which every arm takes part.
    """
    found: dict[tuple[str, str], list[float]] = {}
    whole = [name for name in settings if SETTINGS[name].arms == tuple(ARMS)]
    for arm in (arm for arm in ARMS if arm != REFERENCE):
        by_setting: dict[str, dict[int, float]] = {}
        for setting in settings:
            ours, theirs = values.get((setting, arm), {}), values.get((setting, REFERENCE), {})
            by_setting[setting] = {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}
            found[setting, arm] = list(by_setting[setting].values())
        seeds = set(range(SEEDS)).intersection(*(by_setting[setting] for setting in whole))
        if len(whole) > 1:
            found["all", arm] = [sum(by_setting[name][seed] for name in whole) / len(whole) for seed in sorted(seeds)]
    return {key: each for key, each in found.items() if len(each) > 1}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the tables."""
    present = {row["setting"] for row in rows}
    settings = [name for name in SETTINGS if name in present]
    accuracy, bits = measure(rows, "right"), measure(rows, "bits_per_byte")
    differences = {key: estimate(each) for key, each in gains(accuracy, settings).items()}
    bit_differences = {key: estimate(each) for key, each in gains(bits, settings).items()}
    adjusted = dict(zip(differences, holm([each.p for each in differences.values()]), strict=True))
    table = Table(
        "setting", "arm", "seeds", "accuracy", "minus hard labels", "Holm p", "bits/byte", "minus hard labels"
    )
    for setting in [*settings, "all"]:
        for arm in (START, *ARMS):
            values = accuracy.get((setting, arm))
            cells = [setting, arm, "", "", "", "", "", ""]
            if values:
                cells[2] = str(len(values))
                cells[3] = _shown(list(values.values()), 1)
                cells[6] = _shown(list(bits[setting, arm].values()), 3)
            if found := differences.get((setting, arm)):
                cells[4] = f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"
                cells[5] = f"{adjusted[setting, arm]:.3f}"
                found = bit_differences[setting, arm]
                cells[7] = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
            if any(cells[2:]):
                table.add_row(*cells)
        table.add_section()
    console.print(table)
    seconds = sum(row["cpu_seconds"] for row in rows)
    console.print(f"{len(rows)} runs, {seconds / 60:.0f} CPU minutes; {len(differences)} comparisons under Holm.")


def _shown(values: list[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    found = estimate(values)
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def main() -> None:
    """Run what is asked for, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="do what the results lack")
    parser.add_argument("--part", default="1/1", help="I/N: only the I-th of N parts, which may run side by side")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study", help="traces, models: made once")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.run:
        part, parts = map(int, options.part.split("/"))
        run_missing(options.results, options.work, part, parts)
    rows = read(options.results)
    if not rows:
        sys.exit(f"{options.results} holds no results yet: add --run")
    show(rows, Console(width=180))


if __name__ == "__main__":
    main()
