"""`distill demo`: the whole road on the built-in problems, as the commands a user would type.

The demo has no machinery of its own: it runs `distill generate`, `train`, `eval` and `compare` as processes, a few
side by side, and shows each command line, so that any of them can be copied and changed. What is finished is not done
again, so an interrupted demo goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config import DemoConfig
from distill.errors import RunError
from distill.progress import say
from distill.watchdog import guard

REFERENCE_SECONDS = 300.0  # the budget that the steps below were measured for, on two slow cores
BASE_STEPS, ARM_STEPS = 1000, 2000  # optimizer steps at the reference budget
TRACES = 4000  # of either kind of problem, at most
QUESTIONS = 500

# Every arm starts from the same base student and takes as many optimizer steps over the same traces.
ARMS: dict[str, list[str]] = {
    "answers-only": ["--mode", "hard-labels", "--target", "answer"],
    "hard-labels": ["--mode", "hard-labels"],
    "soft-logits": ["--mode", "soft-logits", "--teacher", "nano"],
}
OPTIMIZER = ["--per-device-train-batch-size", "16", "--save-steps", "500"]
BASE_RATE, ARM_RATE = ["--learning-rate", "3e-3"], ["--learning-rate", "5e-3"]


@dataclass(frozen=True, slots=True)
class Step:
    """One command line of the demo, and the steps that must be finished before it."""

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()


def plan_demo(config: DemoConfig) -> list[Step]:
    """Return the demo's command lines in an order in which they could be typed."""
    out, scale = config.out, config.budget / REFERENCE_SECONDS
    base_steps, arm_steps = (str(max(1, round(steps * scale))) for steps in (BASE_STEPS, ARM_STEPS))
    traces = max(200, round(TRACES * min(scale, 1.0)))  # a longer training is worth more than more of the same traces
    sampling = f"--limit {traces} --max-completion-length 64"
    steps = [
        Step(
            "base-traces",
            _line(f"generate --prompts nano:1-2 {sampling}", out / "base-traces"),
        ),
        Step("traces", _line(f"generate --prompts nano {sampling}", out / "traces")),
    ]
    evaluations = []
    for seed in range(config.seeds):
        base = out / "students" / f"base-{seed}"
        settings = ["--max-steps", base_steps, *BASE_RATE, *OPTIMIZER, "--seed", str(seed), "--resume"]
        line = _line("train --mode hard-labels --student llama-nano --data", out / "base-traces", *settings)
        steps.append(Step(f"train base-{seed}", _to(line, base), ("base-traces",)))
        for arm, mode in ARMS.items():
            settings = ["--max-steps", arm_steps, *ARM_RATE, *OPTIMIZER, "--seed", str(seed), "--resume"]
            line = _line("train --student", base, "--data", str(out / "traces"), *mode, *settings)
            needs = ("traces", f"train base-{seed}")
            steps.append(Step(f"train {arm}-{seed}", _to(line, out / "students" / f"{arm}-{seed}"), needs))
        for arm in ("base", *ARMS):
            line = _line(f"eval --prompts nano --limit {QUESTIONS} --temperature 0 --arm {arm} --train-seed {seed}")
            line = _to((*line, "--model", str(out / "students" / f"{arm}-{seed}")), out / "evals" / f"{arm}-{seed}")
            steps.append(Step(f"eval {arm}-{seed}", line, (f"train {arm}-{seed}",)))
            evaluations.append(steps[-1])
    folders = [step.arguments[-1] for step in evaluations]
    line = ("compare", *folders, "--store", str(out / "traces"), "--out", str(out))
    steps.append(Step("compare", line, tuple(step.name for step in evaluations)))
    return steps


def _line(words: str, *more: str | Path) -> tuple[str, ...]:
    """Split fixed words; for `generate` the one path that follows is its --out."""
    arguments = [*words.split(), *map(str, more)]
    return _to(tuple(arguments[:-1]), Path(arguments[-1])) if words.startswith("generate") else tuple(arguments)


def _to(arguments: tuple[str, ...], out: Path) -> tuple[str, ...]:
    return (*arguments, "--out", str(out))


def run_demo(config: DemoConfig, command: Sequence[str]) -> dict[str, Any]:
    """Run the steps, as many side by side as there are cores, and return the comparison.

    Args:
        command: how to start `distill`, such as `[python, cli.py]`.

    Raises:
        RunError: a step failed; its log is named.
    """
    guard()
    began = time.monotonic()
    (config.out / "logs").mkdir(parents=True, exist_ok=True)
    waiting = {step.name: step for step in plan_demo(config)}
    total, finished = len(waiting), set[str]()
    running: dict[Future[float], Step] = {}
    with ThreadPoolExecutor(max_workers=max(1, min(4, os.cpu_count() or 1))) as pool:
        try:
            while waiting or running:
                for step in [step for step in waiting.values() if finished.issuperset(step.needs)]:
                    running[pool.submit(_run, step, config.out / "logs", command)] = waiting.pop(step.name)
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    step = running.pop(future)
                    seconds = future.result()
                    finished.add(step.name)
                    say(f"  [{len(finished)}/{total}] {step.name}: {seconds:.0f} s")
        except BaseException:  # a step failed, or Ctrl-C: what runs may finish, nothing new starts
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    say(f"demo finished in {time.monotonic() - began:.0f} s")
    result: dict[str, Any] = json.loads((config.out / "compare.json").read_text(encoding="utf-8"))
    return result


def _run(step: Step, logs: Path, command: Sequence[str]) -> float:
    """Run one command line unless it is finished; return its seconds."""
    log, mark = (logs / f"{step.name.replace(' ', '-')}{suffix}" for suffix in (".log", ".done"))
    line = json.dumps(step.arguments)
    if mark.exists() and mark.read_text(encoding="utf-8") == line:
        return 0.0
    say(f"$ distill {' '.join(step.arguments)}")
    began = time.monotonic()
    # One thread each: models this small gain nothing from two, and the steps share the cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.run(
            [*command, *step.arguments], stdout=stream, stderr=stream, env=environment, check=False
        )
    if process.returncode:
        last = [row for row in log.read_text(encoding="utf-8", errors="replace").splitlines() if row.strip()]
        raise RunError(
            f"the step `distill {' '.join(step.arguments)}` failed ({log}): {last[-1] if last else 'no output'}"
        )
    mark.write_text(line, encoding="utf-8")
    return time.monotonic() - began
