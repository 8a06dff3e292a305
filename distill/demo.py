"""`distill demo`: the whole road on the built-in problems, as the commands a user would type.

The demo has no machinery of its own: it runs `distill generate`, `train`, `eval` and `compare` as processes, a few
side by side (`distill.pipeline.processes`), and shows each command line, so that any of them can be copied and changed.
What is finished is not done again, so an interrupted demo goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.config import DemoConfig
from distill.pipeline.processes import Step, run_steps
from distill.progress import say

REFERENCE_SECONDS = 300.0  # the budget that the steps below were measured for, on two slow cores
BASE_STEPS, ARM_STEPS = 1000, 2000  # optimizer steps at the reference budget
TRACES = 4000  # of either kind of problem, at most
QUESTIONS = 500
ARM_FLOPS = 1.7e12  # what ARM_STEPS of hard labels cost

# Every arm starts from the same base student. Those that are taught take as many optimizer steps over the same traces;
# the one that is rewarded answers the questions of the traces, and may spend the FLOPs of hard labels.
TAUGHT: dict[str, list[str]] = {
    "answers-only": ["--mode", "hard-labels", "--target", "answer"],
    "hard-labels": ["--mode", "hard-labels"],
    "soft-logits": ["--mode", "soft-logits", "--teacher", "nano"],
}
REWARDED = "grpo"
REWARDED_MODE = ["--mode", "grpo", "--preset", "dapo", "--num-generations", "8", "--dynamic-sampling", "2"]
REWARDED_MODE += ["--per-device-train-batch-size", "256", "--learning-rate", "3e-4", "--max-completion-length", "64"]
ARMS = (*TAUGHT, REWARDED)
OPTIMIZER = ["--per-device-train-batch-size", "16", "--save-steps", "500"]
BASE_RATE, ARM_RATE = ["--learning-rate", "3e-3"], ["--learning-rate", "5e-3"]


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
        taught = ["--max-steps", arm_steps, *ARM_RATE, *OPTIMIZER]
        rewarded = [*REWARDED_MODE, "--max-flops", f"{ARM_FLOPS * scale:g}"]
        for arm, settings in {**{arm: [*mode, *taught] for arm, mode in TAUGHT.items()}, REWARDED: rewarded}.items():
            common = ["--student", str(base), "--data", str(out / "traces"), "--seed", str(seed), "--resume"]
            line = _line("train", *common, *settings)
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
    began = time.monotonic()
    # One thread each: models this small gain nothing from two, and the steps share the cores.
    run_steps(plan_demo(config), command, logs=config.out / "logs", jobs=min(4, os.cpu_count() or 1), threads=1)
    say(f"demo finished in {time.monotonic() - began:.0f} s")
    result: dict[str, Any] = json.loads((config.out / "compare.json").read_text(encoding="utf-8"))
    return result
