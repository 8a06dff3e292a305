"""Does a teacher of another vocabulary teach real models more than its text does? The experiment in the documents.

A teacher answers GSM8K problems through vLLM, which also gives its likeliest tokens; what is right is kept. A student
of another family then learns from these traces in three ways, by equally many steps on the same traces in the same
order: hard labels (sequence-level distillation), `--align auto` from the stored top-k, and `--align auto` with the
teacher running beside it. A seed decides which of the traces come and in which order. Measured before and after: bits
per byte of the teacher's right answers to other problems, and greedy accuracy on these problems.

A finished run is one line of the results, and what is there is not done again.

usage: python benchmarks/align_real.py [--results FILE]     the tables of what is there
       python benchmarks/align_real.py --run --teacher MODEL --students MODEL=RATE ... [--work DIR]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from align_study import command
from rich.console import Console
from rich.table import Table
from study import estimate, read

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "data" / "align-real.jsonl"
PROBLEMS = ROOT / "recipes" / "problems"
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
START, FLOOR = "before", "hard labels"
ARMS: dict[str, list[str]] = {
    FLOOR: ["--mode", "hard-labels"],
    "auto, stored top-k": ["--mode", "soft-logits", "--align", "auto", "--unmatched", "drop"],
    "auto, teacher runs": ["--mode", "soft-logits", "--align", "auto", "--teacher"],
}


def traces(options: argparse.Namespace, name: str, problems: str, limit: int, *further: object) -> Path:
    """Return a store of the teacher's answers; what is missing of it is generated."""
    out: Path = options.work / name
    if len(read(out / "traces.jsonl")) < limit:
        words = ["generate", "--teacher", options.teacher, "--prompts", PROBLEMS / problems, "--limit", limit]
        words += ["--backend", "vllm", "--engine-arg", "dtype=bfloat16", "--engine-arg", "max_model_len=1024"]
        words += ["--concurrency", 64, "--temperature", 0.6, "--max-completion-length", 320, "--system-prompt", SYSTEM]
        command([*words, *further, "--out", out])
    return out


def run_one(options: argparse.Namespace, student: str, rate: str, arm: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one student; return what its line of the results says."""
    asked, trained = PROBLEMS / "gsm8k_test_100.jsonl", 0.0
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        model, judged = student, Path(folder) / "eval"
        if arm != START:
            model = str(Path(folder) / "student")
            words = ["train", "--student", student, "--data", options.work / "traces", "--out", model, "--seed", seed]
            words += ["--max-steps", options.steps, "--per-device-train-batch-size", options.batch]
            words += ["--learning-rate", rate, "--warmup-steps", 2, "--save-steps", 1000, "--logging-steps", 1]
            words += [*ARMS[arm], *([options.teacher, "--teacher-dtype", "bfloat16"] if "runs" in arm else [])]
            began = time.monotonic()
            command(words)
            trained = time.monotonic() - began
        words = ["eval", "--model", model, "--prompts", asked, "--limit", options.questions, "--out", judged]
        words += ["--text", options.work / "heldout", "--backend", "vllm", "--engine-arg", "max_model_len=1024"]
        words += ["--temperature", 0, "--max-completion-length", 256, "--concurrency", 64, "--system-prompt", SYSTEM]
        command(words)
        found = json.loads((judged / "eval.json").read_text(encoding="utf-8"))
    return {"bits": found["bits_per_byte"], "accuracy": found["pass@1"], "train_seconds": round(trained, 1)}


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a table for each student."""
    for student in dict.fromkeys(row["student"] for row in rows):
        mine = [row for row in rows if row["student"] == student]
        table = Table("arm", "seeds", "bits per byte", f"minus {FLOOR}", "right, %", title=student)
        floor = {row["seed"]: row["bits"] for row in mine if row["arm"] == FLOOR}
        for arm in (START, *ARMS):
            values = {row["seed"]: row["bits"] for row in mine if row["arm"] == arm}
            if not values:
                continue
            right = 100 * np.mean([row["accuracy"] for row in mine if row["arm"] == arm])
            cells = [arm, str(len(values)), f"{np.mean(list(values.values())):.4f}", "", f"{right:.1f}"]
            seeds = sorted(values.keys() & floor.keys())
            if len(seeds) > 1 and arm not in (START, FLOOR):
                found = estimate([values[seed] - floor[seed] for seed in seeds])
                cells[3] = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
            table.add_row(*cells)
        console.print(table)


def main() -> None:
    """Run what is asked for, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="do what the results lack")
    parser.add_argument("--teacher", default="models/qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--students", nargs="+", default=["models/smollm2-135m-instruct=2e-4"], metavar="MODEL=RATE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--problems", type=int, default=150, help="that the teacher answers")
    parser.add_argument("--questions", type=int, default=50, help="that students answer, and the teacher for the bits")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "align-real")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.run:
        options.work.mkdir(parents=True, exist_ok=True)
        traces(options, "traces", "gsm8k_train_300.jsonl", options.problems, "--top-logprobs", 64)
        traces(options, "heldout", "gsm8k_test_100.jsonl", options.questions)
        options.results.parent.mkdir(parents=True, exist_ok=True)
        done = {(row["student"], row["arm"], row["seed"]) for row in read(options.results)}
        jobs = [(pair, START, 0) for pair in options.students]
        jobs += [(pair, arm, seed) for seed in range(options.seeds) for arm in ARMS for pair in options.students]
        for pair, arm, seed in jobs:
            student, _, rate = pair.partition("=")
            name = Path(student).name
            if (name, arm, seed) in done:
                continue
            began = time.monotonic()
            row = {"student": name, "arm": arm, "seed": seed, **run_one(options, student, rate, arm, seed)}
            row["seconds"] = round(time.monotonic() - began, 1)
            with options.results.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
    found = read(options.results)
    if not found:
        print(f"{options.results} holds no results yet: add --run")
        return
    show(found, Console(width=120))


if __name__ == "__main__":
    main()
