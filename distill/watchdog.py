"""No orphans: child processes die with us, even when we are killed with SIGKILL.

An engine's processes do not notice that their parent is gone: they keep gigabytes of weights, and the resumed run
finds no memory. So the first user of child processes calls `guard()`: children started from then on inherit a mark in
their environment, and a tiny process holding the other end of a pipe kills whatever bears the mark when we end,
however we end. Processes must be started by spawn, not fork, to bear it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

MARK = "DISTILL_GUARD"
_watchers: dict[int, subprocess.Popen[bytes]] = {}  # by pid, so that a forked copy of us starts its own


def guard() -> None:
    """Tie every child process started from now on to the life of this one. Calling it again changes nothing."""
    if os.getpid() in _watchers:
        return
    token = secrets.token_hex(8)
    watcher = subprocess.Popen(
        [sys.executable, "-m", "distill.watchdog", token],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # Our own guardian's mark must not be on it: the two would be killed at once, and what we started would stay.
        env={name: value for name, value in child_environment().items() if name != MARK},
    )
    _watchers[os.getpid()] = watcher
    os.environ[MARK] = token
    os.environ["SPT_NOENV"] = "1"  # setproctitle would write a process's title over its environment, mark and all


def child_environment(**settings: str) -> dict[str, str]:
    """Return our environment for a Python child that must import what we import, installed or not."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return {**os.environ, "PYTHONPATH": path, **settings}


def marked(token: str) -> list[int]:
    """Return the processes whose environment carries the mark (Linux: read from /proc)."""
    wanted = f"{MARK}={token}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # another user's process, or one that just ended
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def main() -> None:
    """Wait until the parent's end of the pipe closes, then kill what bears the mark until nothing does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.buffer.read()
    while pids := marked(sys.argv[1]):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
