"""Seconds and memory of one distillation loss and its gradients: `distill.fused` against TRL, Liger and full logits.

Everyone gets the same tensors (the same seed): hidden states of the trained half of the tokens, two heads, float32 on a
CPU and bfloat16 on a GPU; everyone returns the loss and its gradients by the student's hidden states and head. That is
kind to TRL, whose trainer projects the untrained half as well where it has no triton. The contenders take turns, each
time in a process of its own, and the table quotes the medians of their ratios: absolute figures belong to the machine.

Memory is the peak beyond the tensors given and the gradients returned: the process's high-water mark, or on a GPU the
allocator's. The floor is the four products that no loss can avoid (student, teacher, both gradients), made with
torch.mm in pieces of 512 rows; the column `roofline` is its time by a contender's.

usage: python benchmarks/loss.py [--tokens N] [--width D ...] [--vocabulary V ...] [--divergence NAME ...] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

BETA = {"forward_kl": 0.0, "jsd": 0.5}  # what TRL and Liger call them
ROWS = 512  # of a piece of the floor's products


class Inputs(NamedTuple):
    """hidden (N, D) and weight (V, D) of the student, with gradients; then the teacher's, without."""

    hidden: Tensor
    weight: nn.Parameter
    teacher_hidden: Tensor
    teacher_weight: Tensor


def make_inputs(rows: int, width: int, vocabulary: int) -> Inputs:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    made = [
        torch.randn(count, width, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32).mul_(size)
        for count, size in ((rows, 1.0), (vocabulary, 2.0 * width**-0.5)) * 2
    ]
    return Inputs(made[0].requires_grad_(), nn.Parameter(made[1]), made[2], made[3])


def ours(inputs: Inputs, divergence: str) -> Tensor:
    from distill.fused import TeacherHidden, fused_loss
    from distill.head import Head

    student, teacher = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    student.weight, teacher.weight = inputs.weight, nn.Parameter(inputs.teacher_weight, requires_grad=False)
    rows, device = len(inputs.hidden), inputs.hidden.device
    total, _ = fused_loss(
        inputs.hidden,
        Head(student),
        torch.zeros(rows, dtype=torch.int64, device=device),
        torch.full((rows,), 1 / rows, device=device),
        TeacherHidden(inputs.teacher_hidden, Head(teacher)),
        divergence=divergence,
    )
    return total


def trl(inputs: Inputs, divergence: str) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, weight, teacher_hidden, teacher_weight = inputs
    values, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, teacher_hidden, teacher_weight, None, BETA[divergence]
    )
    return values.mean()


def liger(inputs: Inputs, divergence: str) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[divergence], compiled=inputs.hidden.is_cuda
    )
    labels = torch.zeros(len(inputs.hidden), dtype=torch.int64, device=inputs.hidden.device)
    return loss(*inputs, labels)


def full_logits(inputs: Inputs, divergence: str) -> Tensor:
    from distill.divergences import DIVERGENCES

    hidden, weight, teacher_hidden, teacher_weight = inputs
    with torch.no_grad():
        teacher = (teacher_hidden @ teacher_weight.t()).float().log_softmax(-1)
    return DIVERGENCES[divergence]((hidden @ weight.t()).float().log_softmax(-1), teacher).mean()


def floor(inputs: Inputs, divergence: str) -> Tensor:
    hidden, weight, teacher_hidden, teacher_weight = (tensor.detach() for tensor in inputs)
    by_hidden, by_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    logits = hidden.new_empty(ROWS, len(weight))
    for start in range(0, len(hidden), ROWS):
        piece = slice(start, start + ROWS)
        out = logits[: len(hidden[piece])]
        torch.mm(teacher_hidden[piece], teacher_weight.t(), out=out)
        torch.mm(hidden[piece], weight.t(), out=out)
        torch.mm(out, weight, out=by_hidden[piece])
        by_weight.addmm_(out.t(), hidden[piece])
    return by_hidden.sum()


CONTENDERS: dict[str, tuple[Callable[[Inputs, str], Tensor], str]] = {
    "distill": (ours, "torch"),
    "TRL": (trl, "trl"),
    "Liger": (liger, "liger_kernel"),
    "full logits": (full_logits, "torch"),
    "floor": (floor, "torch"),
}


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def one_run(name: str, rows: int, width: int, vocabulary: int, divergence: str) -> dict[str, float]:
    """Run in a process of its own: seconds, bytes beyond inputs and gradients, the loss and its gradients' norm."""
    function, _ = CONTENDERS[name]

    def step(inputs: Inputs) -> Tensor:
        total = function(inputs, divergence)
        if total.requires_grad:
            total.backward()
        if total.is_cuda:
            torch.cuda.synchronize()
        return total.detach()

    # What is loaded and started once is not the loss; kernels are compiled for a shape.
    step(make_inputs(rows, width, vocabulary) if torch.cuda.is_available() else make_inputs(64, 64, 512))
    inputs = make_inputs(rows, width, vocabulary)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    before, start = peak_bytes(), time.perf_counter()
    total = step(inputs)
    seconds = time.perf_counter() - start
    gradients = [tensor.grad for tensor in inputs[:2] if tensor.grad is not None]
    return {
        "seconds": seconds,
        "bytes": peak_bytes() - before - sum(tensor.nbytes for tensor in inputs[:2]),
        "loss": float(total),
        "norm": float(sum(gradient.float().square().sum() for gradient in gradients)) ** 0.5,
    }


def in_new_process(name: str, *case: object) -> dict[str, float] | str:
    """Return `one_run`'s numbers, or in a few words why there are none."""
    if find_spec(CONTENDERS[name][1]) is None:
        return "not installed"
    done = subprocess.run(
        [sys.executable, __file__, "--one", name, *map(str, case)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return "out of memory" if done.returncode == -9 or "out of memory" in done.stderr else "failed, see above"
    return json.loads(done.stdout.splitlines()[-1])


def compare(rows: int, width: int, vocabulary: int, divergence: str, rounds: int) -> list[list[str]]:
    """Return a table's lines for one case."""
    runs: dict[str, list[dict[str, float]]] = {}
    missing: dict[str, str] = {}
    for _ in range(rounds):
        for name in [name for name in CONTENDERS if name not in missing]:
            result = in_new_process(name, rows, width, vocabulary, divergence)
            if isinstance(result, str):
                missing[name] = result
            else:
                runs.setdefault(name, []).append(result)
    lines = []
    reference = runs["distill"]
    for name in CONTENDERS:
        case = [f"{width} x {vocabulary}, {divergence}", name]
        if name in missing:
            lines.append([*case, missing[name]])
            continue
        mine = runs[name]
        if name != "floor" and not torch.cuda.is_available():
            assert all(abs(run[key] / reference[0][key] - 1) < 1e-3 for run in mine for key in ("loss", "norm")), name
        times = statistics.median(run["seconds"] / ref["seconds"] for run, ref in zip(mine, reference, strict=True))
        share = statistics.median(ref["seconds"] / run["seconds"] for run, ref in zip(mine, runs["floor"], strict=True))
        size = statistics.median(run["bytes"] for run in mine)
        memory = size / statistics.median(run["bytes"] for run in reference)
        seconds = statistics.median(run["seconds"] for run in mine)
        lines.append(
            [*case, f"{seconds:.2f}", f"{times:.2f}x", f"{share:.0%}", f"{size / 2**20:,.0f}", f"{memory:.2f}x"]
        )
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="half of them are trained")
    parser.add_argument("--width", type=int, nargs="+", default=[576, 2048])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--divergence", nargs="+", choices=tuple(BETA), default=["forward_kl"])
    parser.add_argument("--rounds", type=int, default=1, help="times the contenders take turns")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, *shape, divergence = options.one
        print(json.dumps(one_run(name, *map(int, shape), divergence)))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    table = Table(title=f"loss and gradients of {options.tokens // 2} trained of {options.tokens} tokens, {device}")
    for column in ("width x vocabulary", "loss", "seconds", "time", "roofline", "extra MiB", "memory"):
        table.add_column(column, justify="left" if column in ("width x vocabulary", "loss") else "right", no_wrap=True)
    for width in options.width:
        for vocabulary in options.vocabulary:
            for divergence in options.divergence:
                for line in compare(options.tokens // 2, width, vocabulary, divergence, options.rounds):
                    table.add_row(*line)
                table.add_section()
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
