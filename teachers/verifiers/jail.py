"""The inside of the sandbox: `python -P -s -S -B jail.py FD`, a server that forks a cell for each piece of code.

Standard library only: the server is started with an empty environment and without site-packages, and learns nothing
but limits, so that no secret and no test is in the memory its cells inherit. For each order on the socket FD it forks a
keeper, which makes namespaces where the OS allows, forks the cell inside them, and ends it at the deadline or when
sandbox.py lets go. The cell gives up every right before it reads the code. What is not held is said in sandbox.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

# By plain names, as nothing else of ours can be imported here; and now, as a cell cannot read the files.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import exam
import rights

sys.path.pop(0)

WIRE, PEER, LIBRARY = 3, 4, 5  # a cell's descriptors, after the three of every process


def serve() -> None:
    """Fork a keeper for each order until the caller is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers that ended need nobody
    library = os.open(os.path.dirname(os.__file__), os.O_RDONLY | os.O_DIRECTORY)
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        while True:
            try:
                message, descriptors, _, _ = socket.recv_fds(channel, 1 << 16, 8)
            except ConnectionError:
                return
            if not message:
                return
            if not os.fork():
                status = 1
                try:
                    channel.close()
                    keep(json.loads(message), descriptors, library)
                    status = 0
                finally:
                    os._exit(status)
            for descriptor in descriptors:
                os.close(descriptor)


def keep(order: Mapping[str, Any], descriptors: list[int], library: int) -> None:
    """Run one cell to its end, clear up behind it and tell the caller how it ended: the last words on the leash.

    Args:
        order: `role`, `seconds` (wall clock), `memory_bytes`, `file_bytes`, `disk_bytes`, `processes`, `temporary`.
        descriptors: the leash, the cell's input, its output, its wire and perhaps its peer.
        library: the folder of the standard library, which an unprivileged user might not reach by its path.
    """
    leash, given = socket.socket(fileno=descriptors[0]), descriptors[1:]
    deadline = time.monotonic() + order["seconds"]
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    rights.prctl(rights.PR_SET_CHILD_SUBREAPER, 1)
    root = os.geteuid() == 0
    # A user of its own for each cell, who owns nothing and has no other process; the second, where ids are few.
    uids = (1_000_000_000 + os.getpid(), 40_000 + os.getpid() % 20_000) if root else ()
    granted = rights.separate(root)
    folder = tempfile.mkdtemp(prefix="distill-code-", dir=order["temporary"])
    if "mount" in granted and rights.own_disk(folder, order["disk_bytes"]):
        granted.append("disk")
    status_read, status_write = os.pipe()
    init = os.fork()
    if not init:
        try:
            os.close(status_read)
            leash.close()
            _init(order, given, library, folder, uids, granted, status_write)
        finally:
            os._exit(1)
    os.close(status_write)
    for descriptor in given:
        os.close(descriptor)
    why = _watch(leash, init, deadline)
    with contextlib.suppress(ProcessLookupError):
        os.kill(init, signal.SIGKILL)
    os.waitpid(init, 0)
    if "pid" not in granted:
        _end_family(uids)
    report = os.read(status_read, 4096)
    if "disk" in granted:
        rights.give_disk_back(folder)
    shutil.rmtree(folder, ignore_errors=True)
    ended = {**json.loads(report or b"{}"), "why": why}
    with contextlib.suppress(OSError):
        leash.sendall(json.dumps(ended).encode())


def _watch(leash: socket.socket, init: int, deadline: float) -> str:
    """Wait for the cell's end, the deadline, or the caller's letting go; return which it was."""
    handle = os.pidfd_open(init)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.register(leash, select.POLLIN | select.POLLHUP)
    ready = {descriptor for descriptor, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)}
    os.close(handle)
    return "ended" if handle in ready else "let go" if ready else "timeout"


def _init(
    order: Mapping[str, Any],
    given: list[int],
    library: int,
    folder: str,
    uids: tuple[int, ...],
    granted: list[str],
    status: int,
) -> None:
    """Be the first process of the cell: fork the one that runs the code, and report how that ended.

    When this process ends, the kernel kills all others of its PID namespace.
    """
    rights.prctl(rights.PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    report_read, report_write = os.pipe()
    program = os.fork()
    if not program:
        try:
            os.close(report_read)
            os.close(status)
            run = _confine(order, given, library, folder, uids, granted, report_write)
        except BaseException as error:  # a cell that cannot be closed is not used
            os.write(report_write, json.dumps({"refused": f"{type(error).__name__}: {error}"}).encode())
            os._exit(1)
        try:
            os._exit(run())
        finally:
            os._exit(1)
    os.close(report_write)
    for descriptor in given:
        os.close(descriptor)
    confined = json.loads(os.read(report_read, 4096) or b"{}")
    while True:
        ended, code = os.wait()
        if ended == program:
            break
    os.write(status, json.dumps({**confined, "code": os.waitstatus_to_exitcode(code)}).encode())
    os._exit(0)


def _confine(
    order: Mapping[str, Any],
    given: list[int],
    library: int,
    folder: str,
    uids: tuple[int, ...],
    granted: list[str],
    report: int,
) -> Any:
    """Give up every right of this process; return what it shall run."""
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    # First out of the way of the fixed numbers, then to them; what is not given is empty.
    held = [_above(descriptor) for descriptor in (given[0], given[1], null, given[2], *given[3:4])]
    library, report = _above(library), _above(report)
    for number, descriptor in enumerate(held):
        os.dup2(descriptor, number)
    if len(held) < 5:
        os.dup2(null, PEER)
    os.dup2(library, LIBRARY)
    os.dup2(report, LIBRARY + 1)
    os.closerange(LIBRARY + 2, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    report = LIBRARY + 1
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as stream:
        stream.write("1000")  # where memory runs out, it is the hostile code that goes
    os.chdir(folder)
    os.umask(0o077)
    os.environ.clear()
    os.environ.update(HOME=folder, TMPDIR=folder, PATH="/usr/bin:/bin", LANG="C.UTF-8", PYTHONHASHSEED="0")
    tempfile.tempdir = None
    if uids and "disk" not in granted:
        os.chmod(folder, 0o777)
    rights.limits(order, granted, own_user=bool(uids))
    rights.prctl(rights.PR_SET_NO_NEW_PRIVS, 1)
    granted = granted + rights.landlock(folder, library=f"/proc/self/fd/{LIBRARY}/.")
    _find_library_by_number()
    if rights.become(uids):
        granted.append("nobody")
    else:
        rights.drop_capabilities()
    rights.prctl(rights.PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.write(report, json.dumps({"granted": granted}).encode())
    os.close(report)
    return lambda: exam.ROLES[order["role"]](WIRE, PEER)


def _find_library_by_number() -> None:
    """Import from an open folder: an unprivileged user may not be allowed to walk to where the interpreter lies."""
    known, number = os.path.dirname(os.__file__), f"/proc/self/fd/{LIBRARY}"
    sys.path[:] = [number, f"{number}/lib-dynload"]
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        if isinstance(getattr(module, "__path__", None), list):  # a package, whose other parts are still to be found
            module.__path__ = [path.replace(known, number, 1) for path in module.__path__]


def _above(descriptor: int) -> int:
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 100)


def _end_family(uids: tuple[int, ...]) -> None:
    """Kill every process that came of the cell: orphans are ours, because we are their subreaper."""
    if uids and not os.fork():  # as the cell's own user, all at once: no fork escapes between two kills
        if rights.become(uids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        os._exit(0)
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as stream:
            for child in stream.read().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


if __name__ == "__main__":
    serve()
