"""Replay: stored traces answer, and never pass for what they are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli import app
from distill.errors import UserError
from distill.records import Prompt
from distill.store import read_traces
from teachers import choose_backend, open_backend
from teachers.backend import Request
from teachers.engines.replay import ReplayEngine


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        app([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


COMMON = ("generate", "--prompts", "nano", "--max-completion-length", 64, "-n", 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replay") / "store"
    assert run(*COMMON, "--limit", 12, "--out", out) == 0
    return out


def test_a_replayed_store_is_the_same_store(store: Path, tmp_path: Path) -> None:
    """The same uids, texts, seeds and verdicts, from the same author; only the backend is another."""
    out = tmp_path / "again"
    assert run(*COMMON, "--limit", 12, "--backend", "replay", "--teacher", store, "--out", out) == 0
    (one, other) = ({trace.uid: trace.to_json() for trace in read_traces(folder)} for folder in (store, out))
    assert {row.pop("backend") for row in other.values()} == {"replay"}
    assert {row.pop("backend") for row in one.values()} == {"transformers"}
    assert one == other
    ledger = json.loads((out / "manifest.json").read_text())["ledger"]
    assert ledger["flops"] is None
    assert ledger["tokens"] == sum(row["num_completion_tokens"] for row in one.values())


def test_what_is_not_stored_fails_alone(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "more"
    assert run(*COMMON, "--limit", 14, "--backend", "replay", "--teacher", store, "--out", out) == 0
    traces = list(read_traces(out))
    assert len(traces) == 28
    missing = [trace for trace in traces if trace.error is not None]
    assert len(missing) == 4
    assert all("holds no sample" in str(trace.error) for trace in missing)


def test_other_settings_are_another_sample(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (*COMMON, "--limit", 2, "--backend", "replay", "--teacher", store, "--out", tmp_path / "hot")
    assert run(*line, "--temperature", 1.3) == 2
    assert "was sampled with" in capsys.readouterr().err


def test_what_cannot_be_replayed_is_refused(store: Path, tmp_path: Path) -> None:
    for model in (None, str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="trace store"):
            ReplayEngine.identify(model)
    with pytest.raises(UserError, match="nothing: leave"):
        open_backend("replay", str(store), chat_template="x")
    with pytest.raises(UserError, match="allowed are none"):
        open_backend("replay", str(store), engine_args=["dtype=float32"])


def test_a_torn_last_line_is_passed_over_and_the_last_line_of_a_sample_counts(store: Path, tmp_path: Path) -> None:
    lines = (store / "traces.jsonl").read_bytes().splitlines(keepends=True)
    failed = {**json.loads(lines[0]), "error": "dead", "completion": ""}
    (tmp_path / "traces.jsonl").write_bytes(json.dumps(failed).encode() + b"\n" + b"".join(lines) + lines[0][:40])
    (tmp_path / "manifest.json").write_bytes((store / "manifest.json").read_bytes())
    engine = open_backend("replay", str(tmp_path))
    first = next(read_traces(store))
    prompt = Prompt(messages=first.messages, gold=first.gold)
    request = Request(uid=first.uid, prompt=prompt, sample_index=first.sample_index, seed=first.seed)
    ((_, completion),) = engine.generate(iter([None, request]), engine.sampling)
    assert (completion.text, completion.error) == (first.completion, None)


def test_base_url_chooses_the_server_and_nothing_else() -> None:
    assert choose_backend("auto", None, ["http://host/v1"])[0] == "server"
    with pytest.raises(UserError, match="--base-url is for the server backend"):
        choose_backend("vllm", "x", ["http://host/v1"])
