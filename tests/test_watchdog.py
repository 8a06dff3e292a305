"""No orphans: what is started after `guard()` dies with its parent, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PARENT = """
import os, subprocess, sys, time
from distill.watchdog import guard
before = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
guard()
guard()
after = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(before.pid, after.pid, flush=True)
if sys.argv[1] == "exit":
    sys.exit()
if sys.argv[1] == "raise":
    raise RuntimeError
time.sleep(60)
"""

# A guarded process that starts a guarded process that starts a child.
NESTED = """
import subprocess, sys, time
from distill.watchdog import guard
guard()
if sys.argv[1] == "outer":
    subprocess.Popen([sys.executable, "-c", open(sys.argv[2]).read(), "inner"])
else:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    print(child.pid, flush=True)
time.sleep(60)
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def running(pid: int) -> bool:
    """A process that ended and was not reaped (a zombie) runs no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends_within(pid: int, seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while running(pid) and time.monotonic() < limit:
        time.sleep(0.05)
    return not running(pid)


@pytest.mark.parametrize("ending", ["exit", "raise", signal.SIGKILL, signal.SIGTERM])
def test_children_die_with_their_parent(ending: str | signal.Signals) -> None:
    parent = start(PARENT, ending)
    assert parent.stdout is not None
    before, after = map(int, parent.stdout.readline().split())
    try:
        if isinstance(ending, signal.Signals):
            assert running(after)
            parent.send_signal(ending)
        parent.wait(timeout=20)
        assert ends_within(after, 20)
        assert running(before)  # only what was started since is ours
    finally:
        os.kill(before, signal.SIGKILL)
        parent.stdout.close()


def test_a_guarded_process_inside_a_guarded_process_leaves_none_either(tmp_path: Path) -> None:
    code = tmp_path / "nested.py"
    code.write_text(NESTED)
    parent = start(NESTED, "outer", code)
    assert parent.stdout is not None
    grandchild = int(parent.stdout.readline())
    assert running(grandchild)
    parent.kill()
    parent.wait(timeout=20)
    try:
        assert ends_within(grandchild, 20)
    finally:
        parent.stdout.close()
