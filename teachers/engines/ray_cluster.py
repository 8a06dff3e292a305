"""The Ray cluster an engine works on: joined where one runs, otherwise started on this machine and ended with us.

Ray knows one cluster per process. One of our own dies with us, however we end (distill/watchdog.py): its daemons, its
workers, and the processes that vLLM starts in those. What runs on it is in teachers/engines/ray_stream.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.errors import RunError, UserError
from distill.watchdog import guard

OBJECT_STORE = 512 << 20  # bytes of shared memory that a cluster of our own sets aside for rows on their way
ERROR = re.compile(r"[\w.]+(Error|Exception)\b.*:")  # the last lines of a traceback begin so
CLUSTER = "DISTILL_RAY_CLUSTER"  # in the environment of every process of a cluster of our own


def set_environment() -> None:
    """Set what Ray reads from the environment when it is imported, where the user has not."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry unless the user turns it on
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray lets everything else go first, ourselves included
    if not debugging():
        os.environ.setdefault("RAY_DATA_LOG_LEVEL", "CRITICAL")  # what ends a run is told once, by us
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


@dataclass(slots=True)
class _Membership:
    """The cluster we have joined: Ray knows one per process, and several engines may work on it."""

    engines: int = 0
    mark: str | None = None  # of a cluster of our own


_membership = _Membership()


def join(address: str | None) -> bool:
    """Join the cluster at `address`, or start one on this machine; return whether it is to be left again.

    A cluster that the calling program has joined itself is used as it is.

    Raises:
        RunError: there is none, or it does not start.
    """
    import ray

    if ray.is_initialized() and not _membership.engines:
        return False
    if not _membership.engines:
        _membership.mark = None if address else secrets.token_hex(8)
        try:
            _init(address)
        except Exception as error:  # Ray's errors share no base class
            _shut_down()
            where = f"at {address}" if address else "on this machine"
            raise RunError(f"no Ray cluster {where}: {cause(error)}") from error
    _membership.engines += 1
    return True


def _init(address: str | None) -> None:
    import ray

    level = logging.INFO if debugging() else logging.ERROR
    settings: dict[str, Any] = {"log_to_driver": debugging(), "logging_level": level}
    if address:
        # Machines that run already do not see our environment. What may be a secret stays here: Ray shows it around.
        names = [key for key in os.environ if key.startswith("VLLM_") and "KEY" not in key and "TOKEN" not in key]
        ray.init(address, runtime_env={"env_vars": {key: os.environ[key] for key in names}}, **settings)
        return
    guard()
    os.environ[CLUSTER] = str(_membership.mark)
    try:
        ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE, **settings)
    finally:
        del os.environ[CLUSTER]  # what others start later is no part of it


def leave() -> None:
    """Leave the cluster that `join` joined, if no other engine works on it, and end it where it is our own."""
    _membership.engines -= 1
    if not _membership.engines:
        _shut_down()


def _shut_down() -> None:
    import psutil
    import ray

    ray.shutdown()
    mark, _membership.mark = _membership.mark, None
    for process in psutil.process_iter() if mark else ():  # vLLM's own children, which Ray does not know
        with contextlib.suppress(psutil.Error):  # another user's, or one that just ended
            if process.environ().get(CLUSTER) == mark:
                process.kill()


def bundle(options: Mapping[str, Any], engines: int, on_cpu: bool) -> dict[str, float] | None:
    """Return what each device of an engine takes of a machine, None where Ray Data's own choice is right: a GPU each.

    Raises:
        UserError: the cluster does not have it free, and would keep us waiting without a word.
    """
    import ray

    devices = int(options.get("tensor_parallel_size") or 1) * int(options.get("pipeline_parallel_size") or 1)
    kind, needed = "CPU" if on_cpu else "GPU", engines * devices
    free = int(ray.available_resources().get(kind, 0))
    if needed > free:
        what = f"{engines} engine{'s' * (engines > 1)} of {devices} {kind}{'s' * (devices > 1)}"
        raise UserError(
            f"{what} need {needed}, and the Ray cluster has {free} free: lower --data-parallel-size or "
            "--tensor-parallel-size, wait, or let the cluster grow first"
        )
    if not on_cpu:
        return None
    # A share of the cores each, so that engines settle on different machines; Ray gives an engine as many threads.
    largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    return {"CPU": max(1.0, min(free // needed, largest // devices))}


def cause(error: BaseException) -> str:
    """Return what an error of Ray's is about, on one line: its text is a remote traceback, the cause at its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [place for place, line in enumerate(lines) if ERROR.match(line)]
    return " ".join(lines[named[-1] if named else -1 :])[:600] or type(error).__name__


def debugging() -> bool:
    """Return whether the user wants to see what Ray and its engines say."""
    return bool(os.environ.get("DISTILL_DEBUG"))
