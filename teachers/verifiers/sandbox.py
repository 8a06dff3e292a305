"""The outside of the sandbox: hostile code in processes of its own, with what it may use counted and taken back.

A cell is a forked process of an interpreter that was started with an empty environment and without site-packages
(jail.py). What holds on every Linux: limits on CPU time, memory and open files of each process, on their number, on the
size of each file and on the wall clock; an own, empty folder as home and working folder, removed at the end; no
descriptor but its own; no gain of privileges; a result that only its tests can report (exam.py). What holds where the
OS allows it is told by `isolation()`: a PID namespace (nothing outlives the cell), no network, no IPC, a bound on all
of its files together, Landlock (no file but the system's programs and Python's library can be read, none but its own
written), a user that owns nothing (where we are root).

What it is not: a virtual machine. The kernel is shared, and no filter of system calls is set, so a hole in the kernel
is a hole in this. Memory is limited for each process and not for the cell as a whole, processor caches and clocks can
be watched, and where `isolation()` names something that the OS did not grant, nothing else replaces it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill.errors import RunError, UserError

JAIL = Path(__file__).with_name("jail.py")
GRACE_SECONDS = 20.0  # for a cell to be cleared away after its end, on a busy machine
# name -> what it means that the OS grants it, and that it does not
PROTECTIONS = {
    "pid": ("processes: sees and signals its own only, none outlives it", "processes: no own PID namespace"),
    "net": ("network: none", "network: not closed, except for TCP where tcp is granted"),
    "tcp": ("network: no TCP (Landlock)", "network: TCP not refused by Landlock"),
    "ipc": ("IPC: its own", "IPC: shares System V objects and message queues with its user"),
    "files": (
        "files: reads the system's programs and Python's library, writes its own folder (Landlock)",
        "files: reads and writes all that its user may",
    ),
    "disk": ("disk: an own file system of bounded size", "disk: only the size of each file is bounded"),
    "nobody": ("user: one that owns nothing", "user: the one that runs us"),
    "signals": ("signals: to its own processes only (Landlock)", "signals: to whatever its user may"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one cell may use. Seconds are of the wall clock; every process may use that much CPU time too."""

    seconds: float = 8.0
    memory_bytes: int = 1 << 30  # of each process
    file_bytes: int = 16 << 20  # of each file
    disk_bytes: int = 64 << 20  # of all files together, where the OS grants a file system of its own
    processes: int = 8  # threads counted
    output_bytes: int = 8 << 20


@dataclass(frozen=True, slots=True)
class Ending:
    """How a cell ended: `why` is ended, timeout or let go; `code` as subprocess has it, None where it was killed."""

    why: str
    code: int | None
    granted: tuple[str, ...]
    refused: str | None = None


class Cell:
    """One running cell; `end` clears it away, and must be called."""

    def __init__(self, leash: socket.socket, wire: socket.socket, output: int | None, deadline: float) -> None:
        self.leash, self.wire, self.output, self.deadline = leash, wire, output, deadline

    def send(self, message: Any) -> None:
        """Send one message; a cell that is gone, or does not read until its deadline, gets none."""
        self.wire.settimeout(max(0.01, self.deadline - time.monotonic()))
        with contextlib.suppress(OSError):
            self.wire.sendall(json.dumps(message).encode() + b"\n")

    def read_wire(self, limit: int) -> bytes:
        """Return what the cell sends until it has sent all, `limit` bytes or its deadline has come."""
        return _read(self.wire.fileno(), limit, self.deadline)

    def read_output(self, limit: int) -> bytes:
        """Return what the cell prints, in the same manner."""
        assert self.output is not None
        return _read(self.output, limit, self.deadline)

    def end(self, *, now: bool) -> Ending:
        """Wait for the cell's own end or its deadline, or end it now; return how it ended when nothing is left of it.

        Raises:
            RunError: it could not be closed before the code was to run, or nobody reports its end.
        """
        try:
            if not now:
                select.select([self.leash], [], [], max(0.0, self.deadline - time.monotonic()))
            with contextlib.suppress(OSError):
                self.leash.shutdown(socket.SHUT_WR)
            words = _read(self.leash.fileno(), 1 << 16, time.monotonic() + GRACE_SECONDS)
        finally:
            self.leash.close()
            self.wire.close()
            if self.output is not None:
                os.close(self.output)
        if not words:
            raise RunError("the sandbox's process died without a report")
        report = json.loads(words)
        if "refused" in report:
            raise RunError(f"the sandbox cannot be closed: {report['refused']}")
        why = "timeout" if report["why"] == "let go" and not now else report["why"]
        return Ending(why, report.get("code"), tuple(report.get("granted", ())))


def _read(descriptor: int, limit: int, deadline: float) -> bytes:
    found = bytearray()
    while len(found) <= limit:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            break
        try:
            chunk = os.read(descriptor, 1 << 16)
        except ConnectionError:
            break
        if not chunk:
            break
        found += chunk
    return bytes(found)


class Sandbox:
    """The server process that forks the cells; it ends when we do."""

    def __init__(self) -> None:
        if not sys.platform.startswith("linux"):
            raise UserError(f"the sandbox for code needs Linux, not {sys.platform}")
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-B", str(JAIL), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # whoever kills our group must leave it the time to clear its cells away
                cwd="/",
            )

    def start(
        self, role: str, limits: Limits, *, text: bytes = b"", output: bool = False, peer: socket.socket | None = None
    ) -> Cell:
        """Open a cell in a role of exam.py.

        Args:
            text: what it reads on standard input.
            output: collect what it prints (else nobody does).
            peer: its end of a line to another cell; closed here.

        Raises:
            RunError: the server is gone.
        """
        order = {
            "role": role,
            "seconds": limits.seconds,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "disk_bytes": limits.disk_bytes,
            "processes": limits.processes,
            "temporary": tempfile.gettempdir(),
        }
        leash, their_leash = socket.socketpair()
        wire, their_wire = socket.socketpair()
        read, write = os.pipe() if output else (None, os.open(os.devnull, os.O_WRONLY))
        source = os.memfd_create("input")
        try:
            os.write(source, text)
            os.lseek(source, 0, os.SEEK_SET)
            given = [their_leash.fileno(), source, write, their_wire.fileno(), *([peer.fileno()] if peer else [])]
            socket.send_fds(self.channel, [json.dumps(order).encode()], given)
        except OSError as error:
            raise RunError(f"the sandbox's server is gone: {error}") from error
        finally:
            for end in (their_leash, their_wire, *([peer] if peer else [])):
                end.close()
            os.close(source)
            os.close(write)
        return Cell(leash, wire, read, time.monotonic() + limits.seconds)

    def close(self) -> None:
        """End the server; its cells end when their callers let go of them."""
        self.channel.close()
        self.process.wait()


_servers: dict[int, Sandbox] = {}  # by pid: a forked copy of us starts its own


def sandbox() -> Sandbox:
    """Return this process's sandbox, started on first use, and again when it died."""
    server = _servers.get(os.getpid())
    if server is None or server.process.poll() is not None:
        server = _servers[os.getpid()] = Sandbox()
    return server


@lru_cache(maxsize=1)
def granted() -> tuple[str, ...]:
    """Return what the OS grants a cell: a part of `PROTECTIONS`."""
    cell = sandbox().start("program", Limits(seconds=60))
    cell.send({"code": ""})
    found = cell.end(now=False).granted
    return tuple(name for name in PROTECTIONS if name in found)


def isolation() -> dict[str, str]:
    """Say for each protection whether this machine's OS grants it, in words."""
    held = granted()
    return {name: held_text if name in held else lacking for name, (held_text, lacking) in PROTECTIONS.items()}
