"""What `distill generate` costs: over a bare `vllm.LLM.generate`, and in tokens for every solved prompt.

First the overhead: the same prompts, sampling and seeds, on the same engine object, by turns (A B B A ...). The bare
call only generates; ours also renders, splits, verifies in another process and journals with fsync. Both start with an
empty prefix cache and a warm engine and verifier, and both must produce the same tokens, or nothing is compared. Then
what adaptive sampling saves: one verified trace a prompt, out of a fixed n samples or by `--until-correct 1`.

usage: python benchmarks/generate.py [--model DIR --prompts FILE] [--rounds N]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distill.records import Prompt
from distill.render import render_prompt
from distill.store import TraceStore, read_manifest, read_traces, write_json
from teachers import nano
from teachers.backend import Request
from teachers.engines.vllm_engine import VllmEngine
from teachers.plan import Author, FixedPlan
from teachers.prompts import read_prompts
from teachers.sampling import fill
from teachers.verifiers.pool import VerifierPool

ROOT = Path(__file__).resolve().parents[1]
AUTHOR = Author(name="benchmark", location="", identity="benchmark")


class Lent:
    """An engine that whoever borrows it cannot close."""

    def __init__(self, engine: VllmEngine) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def close(self) -> None:
        """The lender does."""


def cpu_seconds() -> dict[str, float]:
    """Return the processor time of this process ("here"), the engine's and the verifier's so far (Linux).

    Unlike the time on the clock it hardly depends on what else the machine is doing.
    """
    status: dict[int, list[str]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status[int(folder.name)] = (folder / "stat").read_text().rpartition(")")[2].split()
    total = {"here": time.process_time(), "engine": 0.0, "verifier": 0.0}

    def add(parent: int, part: str | None) -> None:
        for pid, (_, above, *rest) in status.items():
            if above == str(parent):
                command = Path("/proc", str(pid), "cmdline").read_text()
                kind = part or ("verifier" if "verifiers" in command else "engine")
                total[kind] += (int(rest[9]) + int(rest[10])) / os.sysconf("SC_CLK_TCK")
                add(pid, kind)

    add(os.getpid(), None)
    return total


def requests_of(plan: FixedPlan) -> Iterator[Request]:
    while (request := plan.next()) is not None:
        yield request


def bare(engine: VllmEngine, plan: FixedPlan, sampling: dict[str, Any]) -> tuple[float, int]:
    """Generate with vLLM alone; return seconds and tokens."""
    from vllm import SamplingParams

    requests = list(requests_of(plan))
    began = time.perf_counter()
    outputs = engine.engine.generate(
        [render_prompt(engine.tokenizer, request.prompt.messages)[0] for request in requests],
        [
            SamplingParams(
                temperature=sampling["temperature"],
                top_p=sampling["top_p"],
                max_tokens=sampling["max_completion_length"],
                seed=request.seed,
                stop_token_ids=engine.end_ids,
            )
            for request in requests
        ],
        use_tqdm=False,
    )
    return time.perf_counter() - began, sum(len(output.outputs[0].token_ids) for output in outputs)


def ours(engine: VllmEngine, plan: FixedPlan, sampling: dict[str, Any], pool: VerifierPool) -> tuple[float, int]:
    """Generate, verify and journal; return seconds and tokens."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "manifest.json", {})
        with TraceStore(Path(folder)) as store:
            began = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()):
                fill(
                    store,
                    plan,
                    lambda: Lent(engine),  # type: ignore[arg-type,return-value]
                    pool,
                    author=AUTHOR,
                    sampling=sampling,
                    verifier=pool.name,
                )
            seconds = time.perf_counter() - began
        traces = list(read_traces(Path(folder)))
        assert all(trace.verdicts and trace.error is None for trace in traces)
        return seconds, sum(trace.num_completion_tokens for trace in traces)


def overhead(
    table: Table, name: str, model: str, prompts: list[Prompt], n: int, length: int, rounds: int, arguments: list[str]
) -> None:
    """Add two rows to the table: the bare engine's time, and ours."""
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_completion_length": length}
    engine = VllmEngine(model, engine_args=arguments)
    times: dict[str, list[float]] = {"vllm.LLM.generate": [], "distill generate": []}
    work: dict[str, list[dict[str, float]]] = {kind: [] for kind in times}
    tokens = 0
    with VerifierPool("math") as pool:
        for turn in range(-1, rounds):  # the first, with seeds of its own, warms everything up
            counted = []
            for kind in list(times)[:: 1 if turn % 2 else -1]:
                engine.engine.reset_prefix_cache()
                plan = FixedPlan(prompts, n, AUTHOR, sampling, seed=turn)
                before = cpu_seconds()
                if kind == "distill generate":
                    seconds, count = ours(engine, plan, sampling, pool)
                else:
                    seconds, count = bare(engine, plan, sampling)
                counted.append(count)
                if turn >= 0:
                    times[kind].append(seconds)
                    work[kind].append({part: spent - before[part] for part, spent in cpu_seconds().items()})
            if counted[0] != counted[1]:
                raise SystemExit(f"the same seeds gave {counted[0]} and {counted[1]} tokens: nothing to compare")
            tokens = counted[0]
    engine.close()
    reference = statistics.median(times["vllm.LLM.generate"])
    for kind, seconds_of in times.items():
        middle = statistics.median(seconds_of)
        table.add_row(
            f"{name}, {len(prompts)} x {n}",
            kind,
            f"{middle:.2f} ({min(seconds_of):.2f}..{max(seconds_of):.2f})",
            f"{tokens / middle:,.0f}",
            f"{middle / reference - 1:+.1%}",
            *(f"{statistics.median(each[part] for each in work[kind]):.1f}" for part in ("engine", "here", "verifier")),
        )


def adaptive(table: Table, prompts: str, teacher: str, limit: int, most: int, extra: list[str]) -> None:
    """Add two rows: what one verified trace a prompt takes out of `most` samples each, and as many as it takes."""
    spent = []
    for flags in (["-n", str(most)], ["--until-correct", "1", "--max-samples", str(most)]):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "cli.py"), "generate", "--prompts", prompts, "--teacher", teacher]
            command += ["--limit", str(limit), "--keep", "best-of:1", "--temperature", "1.0", "--top-p", "1.0"]
            run = subprocess.run([*command, *flags, *extra, "--out", folder], cwd=ROOT, capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(run.stderr)
            funnel = json.loads((Path(folder) / "funnel.json").read_text())
            tokens = read_manifest(Path(folder))["ledger"]["tokens"]
        spent.append(tokens / funnel["kept"])
        table.add_row(
            f"{Path(teacher).name}, {limit} prompts",
            " ".join(flags),
            f"{funnel['samples']}",
            f"{funnel['kept']}",
            f"{spent[-1]:,.0f}",
            f"{spent[-1] / spent[0] - 1:+.0%}",
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times the contenders take turns")
    parser.add_argument("--model", help="a model folder, beside the embedded teacher")
    parser.add_argument("--prompts", default=str(ROOT / "recipes/problems/gsm8k_train_300.jsonl"), help="for --model")
    parser.add_argument("--limit", type=int, default=64, help="prompts for --model")
    parser.add_argument("--max-completion-length", type=int, default=128, help="for --model")
    parser.add_argument("--engine-arg", action="append", default=[], help="for --model, as in distill generate")
    parser.add_argument("--only", choices=("overhead", "adaptive"), help="one of the two tables")
    options = parser.parse_args()
    easy = list(nano.problems(levels=nano.parse_levels(""), split="train", limit=256))
    if options.only != "adaptive":
        table = Table(title="samples generated, verified and journaled; medians (least..most)")
        columns = ("model, prompts x samples", "path", "seconds", "tokens/s", "time over bare vLLM")
        for column in (*columns, "CPU s: engine", "here", "verifier"):
            table.add_column(column, justify="left" if column in columns[:2] else "right")
        overhead(table, "nano", str(nano.model_path()), easy, 4, 64, options.rounds, ["dtype=float32"])
        if options.model:
            prompts, _ = read_prompts(options.prompts, limit=options.limit)
            length = options.max_completion_length
            overhead(
                table, Path(options.model).name, options.model, prompts, 1, length, options.rounds, options.engine_arg
            )
        Console(width=max(120, Console().width)).print(table)
    if options.only != "overhead":
        table = Table(title="one verified trace a prompt")
        for column in ("teacher", "sampling", "samples", "prompts solved", "tokens per solved prompt", "change"):
            table.add_column(column, justify="left" if column in ("teacher", "sampling") else "right")
        adaptive(table, "nano", "nano", 200, 8, [])
        if options.model:
            extra = ["--max-completion-length", str(options.max_completion_length)]
            extra += [flag for argument in options.engine_arg for flag in ("--engine-arg", argument)]
            adaptive(table, options.prompts, options.model, options.limit, 8, [*extra, "--backend", "vllm"])
        Console(width=max(120, Console().width)).print(table)


if __name__ == "__main__":
    main()
