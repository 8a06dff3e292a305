"""Which method brings how much of a teacher across vocabularies? The experiment behind the ablation in the documents.

In the world of align_world.py a student goes on from first weights that know the words and the arithmetic, and learns
a writer's habits from a few of its solutions. The floor is sequence-level distillation: hard labels on these
solutions, no teacher beside them. The ceiling is a teacher that has the student's own tokenizer. In between stand the
methods that ask the other teacher, which has another vocabulary, and has read the same text for as many steps. All
arms of a seed and direction start from the same weights, see the same solutions in the same order and take as many
optimizer steps; each is one `distill train` and one `distill eval`. A seed has first weights, solutions and an order of
its own. What is measured on problems that nobody was trained on: the bits per byte that the student needs beyond the
writer's own (an estimate of the KL from the true text), and greedy accuracy.

The rate was chosen for the hard labels, in trials on a forerunner of this world; no arm has a rate or a weight of its
own. Closing the gap: 100 % is the ceiling, 0 % the floor. Its 95 % interval is Fieller's, over seeds paired.

usage: python benchmarks/align_study.py                     the tables of what is there
       python benchmarks/align_study.py --run [--part I/N]  do what is missing, or the I-th of N parts side by side
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from align_world import World
from rich.console import Console
from rich.table import Table
from study import Estimate, estimate, read

from distill.statistics import holm, student_t_quantile

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "data" / "align-study.jsonl"
SEEDS = 5
TRACES, STEPS, BATCH, RATE = 150, 150, 16, 7e-4
TEXTS, QUESTIONS, COMPLETION = 200, 50, 80  # read for bits per byte; answered
DIRECTIONS = {"digits < merged": ("digits", "merged"), "merged < digits": ("merged", "digits")}  # student < teacher
FLOOR, CEILING, DEFAULT = "hard labels", "same vocabulary", "cspc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What `--align` is told (None: no teacher is asked), options of `--set`, the weight of hard labels beside it."""

    align: str | None = None
    options: tuple[str, ...] = field(default=())
    hard: float = 0.0


CROSSING = {
    "uld": Arm(align="uld"),
    "gold": Arm(align="gold"),
    "mined": Arm(align="mined"),
    "xtoken": Arm(align="xtoken"),
    "dskd": Arm(align="dskd"),
    "alm": Arm(align="alm"),
    "shared_kl": Arm(align="shared_kl"),
    "bpm": Arm(align="bpm", options=("soft_logits.completion=false",)),
    "escd": Arm(align="bpm", options=("soft_logits.completion=true",)),
    "cspc": Arm(align="cspc"),
}
HARD_WEIGHTS = (0.0, 1.0)
# What each part of our own brings: without it.
WITHOUT = {
    "cspc, no labels": Arm(align="cspc", options=("soft_logits.labels=false",)),
    "cspc, plain roots": Arm(align="cspc", options=("soft_logits.covered=false",)),
    "cspc, nothing inside": Arm(align="cspc", options=("soft_logits.interior=false",)),
}


def arms() -> dict[str, Arm]:
    """Return the arms by name: floor, ceiling, every method with and without hard labels beside it, and our parts."""
    found = {FLOOR: Arm(), CEILING: Arm(align="identity")}
    for name, arm in ((CEILING, found[CEILING]), *CROSSING.items()):
        for weight in HARD_WEIGHTS:
            label = f"{name} + hard" if weight else name
            found[label] = Arm(align=arm.align, options=arm.options, hard=weight)
    return found | WITHOUT


# -- running


def run_one(world: World, direction: str, name: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one student by the command line's own commands; return what its line of the results says."""
    arm, (student, other) = arms()[name], DIRECTIONS[direction]
    base, traces = world.base(student, seed), world.traces(seed, TRACES)
    (held, nats), (asked, _) = world.heldout(TEXTS), world.heldout(QUESTIONS)
    with tempfile.TemporaryDirectory(dir=world.work) as folder:
        out, judged = Path(folder) / "student", Path(folder) / "eval"
        words = ["train", "--student", base, "--data", traces, "--out", out, "--seed", seed]
        words += ["--max-steps", STEPS, "--per-device-train-batch-size", BATCH, "--learning-rate", RATE]
        words += ["--save-steps", STEPS, "--logging-steps", STEPS]
        if arm.align is None:
            words += ["--mode", "hard-labels"]
        else:
            teacher = world.teacher(student if arm.align == "identity" else other)
            words += ["--mode", "soft-logits", "--teacher", teacher, "--align", arm.align]
            words += ["--hard-label-weight", arm.hard] if arm.hard else []
            words += [word for option in arm.options for word in ("--set", option)]
        began = time.process_time()
        command(words)
        trained = time.process_time() - began
        words = ["eval", "--model", out, "--prompts", asked, "--text", held, "--out", judged]
        words += ["--backend", "transformers", "--temperature", 0, "--max-completion-length", COMPLETION]
        command([*words, "--concurrency", QUESTIONS])
        found = json.loads((judged / "eval.json").read_text(encoding="utf-8"))
    return {
        "excess": found["bits_per_byte"] - nats / math.log(2) / found["bytes"],
        "accuracy": found["pass@1"],
        "train_seconds": round(trained, 1),
    }


def command(words: Sequence[object]) -> None:
    """Run a command line of distill in this process; what it prints is shown only if it fails."""
    from cli import app

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            app([str(word) for word in words])
        except SystemExit as end:
            code = end.code
    if code:
        raise SystemExit(f"{said.getvalue()}\ndistill {' '.join(map(str, words))} ended with {code}")


def jobs() -> Iterator[tuple[str, str, int]]:
    """Yield (direction, arm, seed) of the whole study, whole seeds first."""
    for seed in range(SEEDS):
        yield from ((direction, name, seed) for direction in DIRECTIONS for name in arms())


def run_missing(results: Path, world: World, part: int, parts: int, only: Sequence[str]) -> None:
    """Do every job that the results lack, and add a line for each as it is done."""
    import torch

    torch.set_num_threads(1)
    done = {(row["direction"], row["arm"], row["seed"]) for row in read(results)}
    mine = list(jobs())[part - 1 :: parts]
    waiting = [job for job in mine if job not in done and (not only or job[1] in only)]
    results.parent.mkdir(parents=True, exist_ok=True)
    for direction, name, seed in waiting:
        began = time.monotonic()
        found = run_one(world, direction, name, seed)
        row = {
            "direction": direction,
            "arm": name,
            "seed": seed,
            **found,
            "seconds": round(time.monotonic() - began, 1),
        }
        with results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


# -- reading

Values = dict[tuple[str, str], dict[int, float]]  # (direction, arm) -> seed -> value


def closed(arm: Sequence[float], floor: Sequence[float], ceiling: Sequence[float]) -> tuple[float, float, float]:
    """Return the share of the gap between floor and ceiling that an arm closes, and its 95 % interval (Fieller 1954).

    The share r is of means over S paired seeds; the interval holds every r for which floor - arm and
    r (floor - ceiling) could have one mean, by Student's t. It is all numbers where the gap itself is not certain.
    """
    gain, gap = np.subtract(floor, arm), np.subtract(floor, ceiling)
    seeds = len(gain)
    quantile = float(student_t_quantile(0.975, seeds - 1)) ** 2 / seeds
    (var_gain, cov), (_, var_gap) = np.cov(gain, gap)
    # (mean_gain - r mean_gap)^2 <= q (var_gain - 2 r cov + r^2 var_gap), a quadratic in r
    a = gap.mean() ** 2 - quantile * var_gap
    b = gain.mean() * gap.mean() - quantile * cov
    c = gain.mean() ** 2 - quantile * var_gain
    share = float(gain.mean() / gap.mean())
    if a <= 0:
        return share, -math.inf, math.inf
    half = math.sqrt(max(b * b - a * c, 0.0))
    return share, float((b - half) / a), float((b + half) / a)


def collect(rows: Sequence[dict[str, Any]], measure: str) -> Values:
    """Return one measure by direction, arm and seed."""
    found: Values = {}
    for row in rows:
        found.setdefault((row["direction"], row["arm"]), {})[row["seed"]] = row[measure]
    return found


def paired(values: Values, direction: str, *names: str) -> list[list[float]]:
    """Return each arm's values on the seeds that all of these arms have."""
    each = [values.get((direction, name), {}) for name in names]
    seeds = sorted(set.intersection(*(set(one) for one in each)))
    return [[one[seed] for seed in seeds] for one in each]


def differences(values: Values, direction: str, reference: str) -> dict[str, tuple[Estimate, float]]:
    """Return every other arm's difference to the reference, and its p-value after Holm over all of them."""
    found = {}
    for name in arms():
        ours, theirs = paired(values, direction, name, reference)
        if name != reference and len(ours) > 1:
            found[name] = estimate(np.subtract(ours, theirs).tolist())
    adjusted = holm([each.p for each in found.values()])
    return {name: (each, p) for (name, each), p in zip(found.items(), adjusted, strict=True)}


def pooled(values: Values, name: str) -> tuple[list[float], list[float], list[float]] | None:
    """Return an arm's, the floor's and the ceiling's means of both directions, on the seeds that all have."""
    each = {
        (direction, arm): values.get((direction, arm), {}) for direction in DIRECTIONS for arm in (name, FLOOR, CEILING)
    }
    seeds = sorted(set.intersection(*(set(one) for one in each.values())))
    if len(seeds) < 2:
        return None
    means = {
        arm: [sum(each[way, arm][seed] for way in DIRECTIONS) / len(DIRECTIONS) for seed in seeds]
        for arm in (name, FLOOR, CEILING)
    }
    return means[name], means[FLOOR], means[CEILING]


def show(rows: Sequence[dict[str, Any]], console: Console, reference: str) -> None:
    """Print a table for each direction: what each arm reaches, what it closes, and how it stands to `reference`."""
    excess, accuracy = collect(rows, "excess"), collect(rows, "accuracy")
    for direction in DIRECTIONS:
        table = Table(
            "arm", "seeds", "excess bits/byte", "gap closed, %", f"minus {reference}", "Holm p", "accuracy, %"
        )
        to_reference = differences(excess, direction, reference)
        for name in arms():
            values = list(excess.get((direction, name), {}).values())
            if not values:
                continue
            cells = [name, str(len(values)), f"{np.mean(values):.4f}", "", "", "", ""]
            right = [100 * value for value in accuracy[direction, name].values()]
            cells[6] = f"{np.mean(right):.1f}"
            if len(values) > 1:
                found = estimate(right)
                cells[6] += f" [{found.low:.1f}, {found.high:.1f}]"
                found = estimate(values)
                cells[2] += f" [{found.low:.4f}, {found.high:.4f}]"
            arm, floor, ceiling = paired(excess, direction, name, FLOOR, CEILING)
            if len(arm) > 1 and name != FLOOR:
                share, low, high = closed(arm, floor, ceiling)
                cells[3] = f"{100 * share:.0f} [{100 * low:.0f}, {100 * high:.0f}]"
            if name in to_reference:
                found, p = to_reference[name]
                cells[4] = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
                cells[5] = f"{p:.3f}"
            table.add_row(*cells)
        console.print(f"student < teacher: {direction}")
        console.print(table)
    for name in arms():
        if (both := pooled(excess, name)) is not None and name in (DEFAULT, CEILING + " + hard"):
            share, low, high = closed(*both)
            console.print(
                f"{name}, both directions: {100 * share:.0f} % of the gap [{100 * low:.0f}, {100 * high:.0f}]"
            )
    console.print(f"{len(rows)} runs, {sum(row['seconds'] for row in rows) / 60:.0f} minutes")


def main() -> None:
    """Run what is asked for, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="do what the results lack")
    parser.add_argument("--part", default="1/1", help="I/N: only the I-th of N parts, which may run side by side")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "align-study", help="the world: made once")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="arms to run, with commas")
    parser.add_argument("--reference", default="cspc", help="the arm that the others are compared with")
    options = parser.parse_args()
    if options.run:
        part, parts = map(int, options.part.split("/"))
        only = [name.strip() for name in options.only.split(",") if name.strip()]
        run_missing(options.results, World(options.work), part, parts, only)
    found = read(options.results)
    if not found:
        print(f"{options.results} holds no results yet: add --run")
        return
    show(found, Console(width=180), options.reference)


if __name__ == "__main__":
    main()
