"""Nothing is lost and nothing is drawn twice: runs killed at any moment, extended, and their views."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted_server import ScriptedServer

from cli import app
from distill.config import GenerateConfig
from distill.records import Prompt
from distill.signals import SignalReader
from teachers import nano
from teachers.backend import Request
from teachers.plan import Author, FixedPlan
from teachers.prompts import read_prompts

ROOT = Path(__file__).parent.parent
CLI = [sys.executable, str(ROOT / "cli.py")]
MARK = "DISTILL_TEST_RUN"  # every process that a killed run started carries it in its environment


def start(arguments: Sequence[str], mark: str) -> subprocess.Popen[str]:
    environment = {**os.environ, MARK: mark, "VLLM_CPU_KVCACHE_SPACE": "1"}
    return subprocess.Popen(
        [*CLI, *arguments], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def alive(mark: str) -> list[str]:
    """Return the command lines of the processes that carry the mark."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it ended
    return found


def gone(mark: str, seconds: float = 20.0) -> list[str]:
    """Wait until no process carries the mark; return those that still do."""
    limit = time.monotonic() + seconds
    while (left := alive(mark)) and time.monotonic() < limit:
        time.sleep(0.05)
    return left


def kill_when(arguments: Sequence[str], mark: str, ready: Callable[[], bool]) -> bool:
    """Run a command and kill it without warning once `ready`; return whether it was still running."""
    process = start(arguments, mark)
    try:
        while not ready() and process.poll() is None:
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert gone(mark) == []
    return process.returncode == -signal.SIGKILL


def run(arguments: Sequence[str]) -> None:
    """Run a command line in this process; it must succeed."""
    with pytest.raises(SystemExit) as stop:
        app(list(arguments))
    assert not stop.value.code


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check(store: Path, samples: int) -> set[str]:
    """Return the uids of a finished store, whose files must agree with each other."""
    journal, kept, rejected = (rows(store / name) for name in ("traces.jsonl", "kept.jsonl", "rejected.jsonl"))
    uids = [row["uid"] for row in journal]
    assert max(Counter(uids).values()) == 1
    assert len(uids) == samples
    assert sorted(row["uid"] for row in [*kept, *rejected]) == sorted(uids)
    funnel = json.loads((store / "funnel.json").read_text())
    assert funnel["samples"] == samples == funnel["kept"] + sum(funnel["rejected"].values())
    assert funnel["kept"] == len(kept)
    assert sum(funnel["rejected"].values()) == len(rejected)
    assert all(row["reasons"] for row in rejected)
    assert json.loads((store / "manifest.json").read_text())["recipe"]["seed"] == 0
    return set(uids)


def test_killed_at_any_moment_it_ends_as_if_never_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """20 times: while starting, at the first line, in mid-writing; the rest is drawn once, no process is left."""
    common = ["generate", "--prompts", "nano", "--max-completion-length", "64"]
    size = ["--limit", "100", "-n", "2"]
    run([*common, *size, "--out", str(tmp_path / "whole")])
    whole = {row["uid"]: row["completion"] for row in rows(tmp_path / "whole" / "traces.jsonl")}
    store = tmp_path / "killed"
    journal = store / "traces.jsonl"
    line = [*common, *size, "--out", str(store), "--concurrency", "4"]
    moments = random.Random(20)
    for index in range(8):
        limit = time.monotonic() + moments.uniform(0.2, 3.0)
        kill_when(line, f"{tmp_path}-start-{index}", lambda limit=limit: time.monotonic() > limit)
    for index, lines in enumerate((1, *sorted(moments.sample(range(5, 140), 11)))):
        assert kill_when(line, f"{tmp_path}-{index}", lambda lines=lines: count(journal) >= lines)
        assert lines <= count(journal) < 200
    with journal.open("ab") as stream:
        stream.write(b'{"uid": "torn in mid-')
    done = count(journal)
    capsys.readouterr()
    run([*common, *size, "--out", str(store)])
    said = capsys.readouterr().err
    assert "dropped a torn last line of 21 bytes" in said
    assert f"{done} samples are already in" in said
    assert check(store, 200) == set(whole)
    assert {row["uid"]: row["completion"] for row in rows(journal)} == whole


def test_more_samples_and_prompts_draw_only_the_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there stays byte for byte; the uids are those of the plan, whichever way the store grew."""
    store = tmp_path / "store"
    common = ["generate", "--prompts", "nano", "--max-completion-length", "64", "--out", str(store)]
    before, done = b"", 0
    for limit, n in ((3, 1), (3, 3), (8, 3), (8, 3)):
        capsys.readouterr()
        run([*common, "--limit", str(limit), "-n", str(n)])
        said = capsys.readouterr().err
        assert (f"{done} samples are already in" in said) == (done > 0)
        assert ("backend: " in said) == (done < limit * n)
        now = (store / "traces.jsonl").read_bytes()
        assert now.startswith(before)
        before, done = now, limit * n
        uids = check(store, done)
        config = GenerateConfig(prompts="nano", out=store, n=n, limit=limit, max_completion_length=64)
        prompts, _ = read_prompts("nano", limit=limit)
        author = rows(store / "traces.jsonl")[0]["teacher"]
        assert uids == {request.uid for request in requests(prompts, n, author, config.sampling(), 0)}
    runs = json.loads((store / "manifest.json").read_text())["runs"]
    assert sum(run["ledger"]["tokens"] for run in runs) == sum(
        row["num_completion_tokens"] for row in rows(store / "traces.jsonl")
    )


def requests(prompts: list[Prompt], n: int, identity: str, sampling: dict[str, Any], seed: int) -> list[Request]:
    """Return all a fresh plan asks for."""
    plan = FixedPlan(prompts, n, Author(name="", location="", identity=identity), sampling, seed)
    return list(iter(plan.next, None))


def test_another_seed_is_another_sample_of_the_same_plan() -> None:
    """The seed decides the draw, not the identity; every sample has its own."""
    prompts, _ = read_prompts("nano", limit=5)
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_completion_length": None}
    one, other = (requests(prompts, 4, "teacher", sampling, seed) for seed in (0, 1))
    assert [request.uid for request in one] == [request.uid for request in other]
    assert len({request.uid for request in one}) == len({request.seed for request in one}) == 20
    assert not {request.seed for request in one} & {request.seed for request in other}


def test_a_failed_sample_is_drawn_again(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    """A prompt beyond the context fails, is counted, leaves the others alone, and is tried again by the next run."""
    good = next(iter(nano.problems(levels=nano.parse_levels(""), split="train", limit=1)))
    asked = {"question": good.messages[0]["content"], "answer": good.gold}
    prompts = write_jsonl("rows.jsonl", [asked, {"question": "books " * 600, "answer": "1"}])
    store = tmp_path / "store"
    for times in (1, 2):
        run(["generate", "--prompts", str(prompts), "--teacher", "nano", "--out", str(store)])
        journal = rows(store / "traces.jsonl")
        assert [bool(row["error"]) for row in journal].count(True) == times
        funnel = json.loads((store / "funnel.json").read_text())
        assert (funnel["samples"], funnel["kept"], funnel["rejected"]) == (2, 1, {"failed": 1})
        assert rows(store / "rejected.jsonl")[0]["reasons"] == ["failed"]


def test_as_many_samples_as_it_takes(tmp_path: Path) -> None:
    """Killed in the middle and finished: every prompt is solved or exhausted, and the funnel says what was saved."""
    store = tmp_path / "store"
    line = ["generate", "--prompts", "nano", "--limit", "40", "--temperature", "1.6", "--max-completion-length", "64"]
    line += ["--until-correct", "2", "--max-samples", "5", "--concurrency", "4", "--out", str(store)]
    kill_when(line, f"{tmp_path}-adaptive", lambda: count(store / "traces.jsonl") >= 20)
    run(line)
    traces = rows(store / "traces.jsonl")
    assert max(Counter(row["uid"] for row in traces).values()) == 1
    asked: dict[str, list[bool]] = {}
    for row in traces:
        asked.setdefault(row["prompt_uid"], []).append(row["verdicts"][-1]["score"] == 1.0)
    assert len(asked) == 40
    assert all(sum(right) == 2 or len(right) == 5 for right in asked.values())
    saved = json.loads((store / "funnel.json").read_text())["adaptive"]
    assert saved["samples"] == len(traces) < 200
    assert saved["samples_saved"] == 200 - len(traces)
    assert saved["solved"] + saved["exhausted"] == 40
    before = (store / "traces.jsonl").read_bytes()
    run(line)
    assert (store / "traces.jsonl").read_bytes() == before


def test_log_probabilities_are_there_for_every_trace(tmp_path: Path) -> None:
    """Killed while drawing and finished: each journaled trace has its numbers, of its own tokens."""
    store = tmp_path / "store"
    line = ["generate", "--prompts", "nano", "--limit", "30", "--max-completion-length", "64", "--top-logprobs", "4"]
    line += ["--concurrency", "4", "--out", str(store)]
    kill_when(line, f"{tmp_path}-signal", lambda: count(store / "traces.jsonl") >= 9)
    run(line)
    reader = SignalReader(store / "signal")
    reader.verify()
    traces = rows(store / "traces.jsonl")
    assert {row["uid"] for row in traces} <= set(reader.uids)
    assert all(len(reader[row["uid"]]) == row["num_completion_tokens"] for row in traces)
    for refused in (["--top-logprobs", "8"], []):
        with pytest.raises(SystemExit) as stop:
            app([*line[: line.index("--top-logprobs")], *refused, "--out", str(store)])
        assert stop.value.code == 2


def test_a_run_against_a_server_is_killed_and_goes_on(tmp_path: Path) -> None:
    """Killed six times while the server fails now and then: every sample is there once, as without it all."""

    def script(body: Any, times: int) -> str | None:
        return "500" if body["seed"] % 5 == 0 and times == 0 else f"slow:{0.02 + body['seed'] % 7 / 100}"

    common = ["generate", "--prompts", "nano", "--limit", "40", "-n", "3", "--keep", "any", "--concurrency", "3"]
    with ScriptedServer() as calm:
        run([*common, "--base-url", calm.url, "--out", str(tmp_path / "whole")])
    whole = {row["uid"]: row["completion"] for row in rows(tmp_path / "whole" / "traces.jsonl")}
    store = tmp_path / "killed"
    with ScriptedServer(script=script) as server:
        line = [*common, "--base-url", server.url, "--out", str(store)]
        for index, lines in enumerate((1, 9, 24, 47, 70, 95)):
            kill_when(line, f"{tmp_path}-{index}", lambda lines=lines: count(store / "traces.jsonl") >= lines)
        run(line)
        assert server.most <= 3
    assert check(store, 120) == set(whole)
    assert {row["uid"]: row["completion"] for row in rows(store / "traces.jsonl")} == whole


REFUSED = {
    "--max-samples is for --until-correct": ["--max-samples", "3"],
    "-n draws a fixed number": ["-n", "2", "--until-correct", "1", "--max-samples", "3"],
    "needs --max-samples, at least as many": ["--until-correct", "2", "--max-samples", "1"],
    "needs a verifier that judges one trace": [
        "--until-correct",
        "1",
        "--max-samples",
        "3",
        "--verifier",
        "self-consistency",
    ],
    "exclude each other": ["--top-logprobs", "1", "--sample-logprobs", "1"],
    "needs thinking_budget, and the transformers backend provides": ["--thinking-budget", "9"],
    "--tensor-parallel-size is not for the transformers backend": ["--tensor-parallel-size", "2"],
    "--base-url is for the server backend": ["--backend", "vllm", "--base-url", "http://127.0.0.1:9/v1"],
    "asks a model: name it with --judge": ["--verifier", "judge"],
    "--judge is for judge": ["--judge", "nano"],
    "--length takes LO:HI": ["--length", "long"],
    "string should match pattern": ["--loop-stop", "often"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str
) -> None:
    """One line, and nothing is written."""
    with pytest.raises(SystemExit) as stop:
        app(["generate", "--prompts", "nano", "--limit", "2", "--out", str(tmp_path / "s"), *REFUSED[message]])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "s").exists()


@pytest.mark.vllm
def test_a_killed_vllm_leaves_no_process_and_the_run_goes_on(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    """Killed while vLLM generates from a folder and a file of problems; the same command ends the run."""
    problems = nano.problems(levels=nano.parse_levels(""), split="train", limit=40)
    prompts = write_jsonl("rows.jsonl", [{"problem": p.messages[0]["content"], "solution": p.gold} for p in problems])
    store = tmp_path / "store"
    line = ["generate", "--prompts", str(prompts), "--teacher", str(nano.model_path()), "--backend", "vllm", "-n", "3"]
    line += ["--concurrency", "2", "--max-completion-length", "64", "--out", str(store)]
    mark, seen = f"{tmp_path}-vllm", []

    def ready() -> bool:
        if count(store / "traces.jsonl") < 5:
            return False
        seen.extend(title for title in alive(mark) if title.startswith("VLLM"))
        return True

    assert kill_when(line, mark, ready)
    assert seen
    done = count(store / "traces.jsonl")
    assert 5 <= done < 120
    process = start(line, mark)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"{done} samples are already in" in err
    assert out.startswith("kept ")
    check(store, 120)
    assert gone(mark) == []
    assert {row["backend"] for row in rows(store / "traces.jsonl")} == {"vllm"}
