"""Does the memory of `distill generate` stay flat? Prints the resident size of the parent process as a store grows.

    python benchmarks/generate_memory.py [--prompts 10000]

The parent reads prompts, feeds the engine, judges (in a child) and journals; what it holds must not grow with the
number of traces. It runs the command a user types, on the embedded teacher, and reads /proc (Linux).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

CLI = Path(__file__).parent.parent / "cli.py"
ROWS = 20


def resident(pid: int) -> float:
    """Return a process's resident memory in MB, 0 where it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * 4096 / 1e6


def watch(prompts: int, out: Path) -> list[tuple[float, int, float]]:
    """Return (seconds, bytes journaled, MB resident) every quarter of a second of one run."""
    line = [sys.executable, str(CLI), "generate", "--prompts", "nano", "--limit", str(prompts)]
    process = subprocess.Popen([*line, "--max-completion-length", "64", "--out", str(out)])
    journal, seen, began = out / "traces.jsonl", [], time.monotonic()
    while process.poll() is None:
        size = journal.stat().st_size if journal.exists() else 0
        seen.append((time.monotonic() - began, size, resident(process.pid)))
        time.sleep(0.25)
    if process.returncode:
        sys.exit(process.returncode)
    return seen


def main() -> None:
    """Print the curve, and how much the second half of the run added."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000)
    count = parser.parse_args().prompts
    with tempfile.TemporaryDirectory() as folder:
        seen = watch(count, Path(folder) / "store")
        traces = (Path(folder) / "store" / "traces.jsonl").read_bytes().count(b"\n")
    whole = seen[-1][1]
    running = [row for row in seen if row[1] > 0 and row[2] > 0]
    table = Table(
        "seconds", "traces", "parent, MB", title=f"distill generate, {count} nano prompts", title_justify="left"
    )
    for place in range(ROWS + 1):
        seconds, size, memory = running[min(len(running) - 1, place * len(running) // ROWS)]
        table.add_row(f"{seconds:.0f}", f"{traces * size / whole:.0f}", f"{memory:.0f}")
    Console().print(table)
    half = max(row[2] for row in running if row[1] <= whole / 2)
    most = max(row[2] for row in running)
    print(f"most in the first half {half:.0f} MB, in all {most:.0f} MB: {(most - half) / half:+.1%}")


if __name__ == "__main__":
    main()
