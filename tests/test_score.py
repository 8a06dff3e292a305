"""`distill score`: every trace once, by whoever scores, whatever interrupts it; the store says what it cost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.config import ScoreConfig
from distill.errors import RunError, UserError
from distill.ledger import forward_flops
from distill.models import fingerprint, load_tokenizer
from distill.records import Trace, Verdict, trace_uid
from distill.render import render
from distill.signals import SignalReader, SignalSpec, SignalWriter
from distill.store import MANIFEST, TraceStore, read_manifest, write_json, write_views
from distill.tables import load
from teachers import nano, open_backend
from teachers.plan import Author
from teachers.score import run_score, spec_of

ROOT = Path(__file__).resolve().parents[1]
NANO = Author(name="nano", location=str(nano.model_path()), identity="nano@test")


def trace_of(number: int, **changed: Any) -> Trace:
    prompt = next(iter(nano.problems(levels=nano.parse_levels(""), split="heldout", limit=1)))
    values: dict[str, Any] = {
        "uid": trace_uid(prompt.uid, "somebody", {}, number),
        "prompt_uid": prompt.uid,
        "messages": prompt.messages,
        "completion": "<think>\n" + "There are 3 books. " * (1 + number % 7) + "\n</think>\n\n\\boxed{3}",
        "reasoning": "",
        "answer": "",
        "finish_reason": "stop",
        "num_prompt_tokens": 1,
        "num_completion_tokens": 1,
        "sample_index": number,
        "seed": number,
        "teacher": "somebody",
        "backend": "server",
        "verdicts": (Verdict(verifier="math", version="1", score=float(number % 2 == 0)),),
    }
    return Trace(**{**values, **changed})


def make_store(folder: Path, traces: list[Trace]) -> Path:
    """A store whose even traces are kept."""
    from distill.records import Judgement

    with TraceStore(folder) as store:
        store.claim({"prompts": "nano"}, teacher_model="somebody")
        for trace in traces:
            store.append(trace)
        write_views(folder, folder, lambda t: Judgement((() if t.score else ("incorrect",)), ()))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store", [trace_of(number) for number in range(12)])


def config(store: Path, **changed: Any) -> ScoreConfig:
    return ScoreConfig(**{"store": store, "teacher": "nano", "top_logprobs": 5, **changed})


def opener(**options: Any) -> Callable[[], Any]:
    return lambda: open_backend("transformers", NANO.location, **options)


STORED = SignalSpec("top", 5).error + 1e-4  # nats


def never() -> Any:
    raise AssertionError("no engine is needed")


def contents(folder: Path) -> dict[str, Any]:
    reader = SignalReader(folder)
    reader.verify()
    return {uid: reader[uid] for uid in reader.uids}


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same traces with the same numbers, up to storing: a matrix product of another shape may tip a rounding."""
    assert sorted(one) == sorted(other)
    for uid, signal in one.items():
        assert np.array_equal(signal.token_ids, other[uid].token_ids)
        np.testing.assert_allclose(signal.token_logprobs, other[uid].token_logprobs, atol=2 * STORED)
        np.testing.assert_allclose(signal.logprobs, other[uid].logprobs, atol=2 * STORED)


def test_kept_traces_are_scored_as_a_student_would_be_trained_on_them(store: Path) -> None:
    """Token by token the numbers of a plain forward over the rendered conversation, end token included."""
    result = run_score(config(store), NANO, opener())
    assert (result["traces"], result["scored"], result["already"], result["too_long"]) == (6, 6, 0, 0)
    found, engine = contents(store / "signal"), open_backend("transformers", NANO.location)
    kept = [json.loads(line) for line in (store / "kept.jsonl").read_text().splitlines()]
    assert sorted(found) == sorted(row["uid"] for row in kept)
    flops = tokens = 0.0
    for row in kept:
        example, signal = render(engine.tokenizer, row["messages"], stop_ids=engine.end_ids), found[row["uid"]]
        trained = np.flatnonzero(example.weights)
        assert signal.token_ids.tolist() == example.input_ids[trained].tolist()
        assert signal.token_ids[-1] == engine.tokenizer.eos_token_id
        with torch.inference_mode():
            logits = engine.model(input_ids=torch.tensor(example.input_ids[None])).logits[0].float()
        truth = torch.log_softmax(logits, -1)[trained - 1].numpy()
        expected = truth[np.arange(len(signal)), signal.token_ids]
        np.testing.assert_allclose(signal.token_logprobs, expected, atol=STORED)
        np.testing.assert_allclose(signal.logprobs, -np.sort(-truth, -1)[:, :5], atol=STORED)
        flops += forward_flops(engine.config, len(example), len(example) / 2)
        tokens += len(trained)
    assert (result["flops"], result["tokens"]) == (pytest.approx(flops), tokens)
    reader = SignalReader(store / "signal")
    assert (reader.spec, reader.vocab_size) == (SignalSpec("top", 5), engine.config.vocab_size)
    assert (reader.teacher, reader.tokenizer) == ("nano@test", fingerprint(engine.tokenizer))
    (run,) = read_manifest(store)["scores"]
    assert (run["teacher"], run["kind"], run["size"], run["which"], run["scored"]) == ("nano@test", "top", 5, "kept", 6)
    assert run["flops"] == result["flops"]
    assert run["bytes_per_token"] == pytest.approx((store / "signal" / "records.bin").stat().st_size / tokens)
    assert "runs" not in read_manifest(store)  # what generating cost is another thing


def test_scoring_twice_does_nothing_and_all_adds_the_rest(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_score(config(store), NANO, opener())
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    result = run_score(config(store), NANO, never)
    assert (result["scored"], result["already"], result["flops"]) == (0, 6, 0.0)
    assert "6 of 6 traces are already scored" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    result = run_score(config(store, which="all"), NANO, opener())
    assert (result["traces"], result["scored"], result["already"]) == (12, 6, 6)
    assert len(contents(store / "signal")) == 12
    assert [run["scored"] for run in read_manifest(store)["scores"]] == [6, 6]


def test_all_means_what_came_to_its_end(tmp_path: Path) -> None:
    """A failed sample has nothing to score; one cut at the limit has no end token that anybody wrote."""
    failed = trace_of(1, completion="", finish_reason="error", error="timeout")
    cut = trace_of(3, finish_reason="length")
    store = make_store(tmp_path / "store", [trace_of(0), failed, cut, trace_of(4)])
    run_score(config(store, which="all"), NANO, opener())
    assert sorted(contents(store / "signal")) == sorted([trace_of(0).uid, trace_of(4).uid])


def test_random_draws_into_a_folder_of_their_own(store: Path) -> None:
    """Two teachers' or two kinds of numbers do not share a folder, and the refusal comes before an engine."""
    run_score(config(store), NANO, opener())
    drawn = {"top_logprobs": None, "sample_logprobs": 9}
    for changed, author, what in (
        (drawn, NANO, "kind is 'top' there and 'sampled' here"),
        ({"top_logprobs": 6}, NANO, "size is 5 there and 6 here"),
        ({}, Author(name="x", location="x", identity="other@1"), "teacher is 'nano@test' there and 'other@1' here"),
    ):
        with pytest.raises(UserError, match=what):
            run_score(config(store, **changed), author, never)
    result = run_score(config(store, out=store.parent / "drawn", **drawn), NANO, opener())
    assert result["out"] == str(store.parent / "drawn")
    for signal in contents(store.parent / "drawn").values():
        assert signal.counts is not None
        assert (signal.counts.sum(-1) == 9).all()
    assert [run["kind"] for run in read_manifest(store)["scores"]] == ["top", "sampled"]


def test_a_trace_beyond_the_context_is_counted_never_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(NANO.location)
    context = json.loads((nano.model_path() / "config.json").read_text())["max_position_embeddings"]
    longer = trace_of(2, completion="<think>\n" + "books " * context)
    store = make_store(tmp_path / "store", [trace_of(0), longer, trace_of(4)])
    result = run_score(config(store), NANO, opener())
    assert (result["scored"], result["too_long"]) == (2, 1)
    assert "left out 1 traces" in capsys.readouterr().err
    found = contents(store / "signal")
    assert longer.uid not in found
    messages = [*trace_of(0).messages, {"role": "assistant", "content": trace_of(0).completion}]
    assert len(found[trace_of(0).uid]) == int(render(tokenizer, messages).weights.sum())
    only = make_store(tmp_path / "only", [longer])
    with pytest.raises(RunError, match="none of 1 traces fits"):
        run_score(config(only), NANO, opener())


def test_what_generate_captured_is_not_scored_again(store: Path) -> None:
    """A folder begun by another writer of the same teacher, here by hand, is filled up."""
    engine = open_backend("transformers", NANO.location)
    (item,) = engine.score([(trace_of(0).uid, [1, 2], [3, 4])], SignalSpec("top", 5))
    whose = {"vocab_size": engine.config.vocab_size, "tokenizer": fingerprint(engine.tokenizer)}
    with SignalWriter(store / "signal", SignalSpec("top", 5), teacher=NANO.identity, **whose) as writer:
        writer.append(*item)
    result = run_score(config(store), NANO, opener())
    assert (result["scored"], result["already"]) == (5, 1)
    assert contents(store / "signal")[trace_of(0).uid].token_ids.tolist() == [3, 4]


def test_what_cannot_be_scored_is_refused(store: Path, tmp_path: Path) -> None:
    for changed, what in (
        ({"top_logprobs": None}, "--top-logprobs K or --sample-logprobs N"),
        ({"sample_logprobs": 3}, "exclude each other"),
        ({"store": tmp_path / "nothing"}, "is not a trace store"),
    ):
        with pytest.raises(UserError, match=what):
            run_score(config(**{"store": store, **changed}), NANO, never)
    assert not (tmp_path / "nothing").exists()
    with TraceStore(store), pytest.raises(UserError, match="another process is writing"):
        run_score(config(store), NANO, never)
    empty = make_store(tmp_path / "empty", [trace_of(1)])
    with pytest.raises(RunError, match="holds no trace to score"):
        run_score(config(empty), NANO, never)
    with (store / "kept.jsonl").open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(UserError, match="line 7 is not a kept trace"):
        run_score(config(store), NANO, never)
    (store / "kept.jsonl").unlink()
    with pytest.raises(UserError, match=r"cannot read .*kept\.jsonl"):
        run_score(config(store), NANO, never)
    assert spec_of(None, None) is None


# Everything is imported once and each run is a fork of that: nothing has computed yet, so no thread is lost.
KILLED = """
import os, signal, sys, time
from pathlib import Path
import distill.forward, distill.models, teachers.engines.transformers_engine
from distill.config import ScoreConfig
from teachers import open_backend
from teachers.plan import Author
from teachers.score import run_score

store, model = Path(sys.argv[1]), sys.argv[2]
records = store / "signal" / "records.bin"
config = ScoreConfig(store=store, teacher="nano", top_logprobs=5, which="all")
author = Author(name="nano", location=model, identity="nano@test")
for _ in range(3):
    before = records.stat().st_size if records.exists() else 0
    child = os.fork()
    if not child:
        run_score(config, author, lambda: open_backend("transformers", model, concurrency=1))
        os._exit(0)
    while not records.exists() or records.stat().st_size < before + 2000:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL at three moments of one run; then every trace is there once, with an uninterrupted run's numbers."""
    store = make_store(tmp_path / "store", [trace_of(number) for number in range(60)])
    shutil.copytree(store, tmp_path / "whole")
    run_score(config(tmp_path / "whole", which="all"), NANO, opener(concurrency=1))
    records = store / "signal" / "records.bin"
    command = [sys.executable, "-c", KILLED, str(store), NANO.location]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=300)
    there = len(SignalReader(store / "signal"))
    assert 3 <= there < 60
    with records.open("ab") as stream:
        stream.write(records.read_bytes()[:30])  # as if killed within a write
    result = run_score(config(store, which="all"), NANO, opener(concurrency=1))
    assert (result["scored"], result["already"]) == (60 - there, there)
    assert_equal(contents(store / "signal"), contents(tmp_path / "whole" / "signal"))
    size, whole = records.stat().st_size, (tmp_path / "whole" / "signal" / "records.bin").stat().st_size
    assert abs(size - whole) < 40  # nothing is there twice
    runs = read_manifest(store)["scores"]
    assert len(runs) == 4  # a killed one is not free of charge
    assert runs[-1]["scored"] == 60 - there


def test_the_manifest_keeps_what_others_wrote(store: Path) -> None:
    write_json(store / MANIFEST, {**read_manifest(store), "runs": [{"ledger": {}}], "set_aside": [1]})
    run_score(config(store), NANO, opener())
    manifest = read_manifest(store)
    assert (manifest["runs"], manifest["set_aside"]) == ([{"ledger": {}}], [1])
    assert manifest["recipe"] == {"prompts": "nano"}


def test_the_table_of_backends_can_be_asked_who_scores() -> None:
    assert "score" in load("teachers.engines.transformers_engine:TransformersEngine").provides
