"""The ray backend beyond the contract of tests/test_backends.py: a real cluster of this machine, vLLM on its CPU.

What Ray Data passes on of vLLM's answers is less than vLLM says (no finish reason, log-probabilities as dicts), so
what is made of it here is held against transformers' own numbers, and against the tokens themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.errors import UserError
from distill.records import Completion, Prompt
from distill.render import render_prompt
from distill.signals import SignalSpec
from distill.watchdog import child_environment
from teachers import nano
from teachers.backend import Request
from teachers.engines import ray_cluster
from teachers.engines.ray_cluster import CLUSTER, cause
from teachers.engines.ray_engine import RayEngine

ray = pytest.importorskip("ray")

CONTEXT, IN_FLIGHT = 320, 8
GREEDY = {"temperature": 0.0, "top_p": 1.0, "max_completion_length": 64}
HOT = {"temperature": 1.5, "top_p": 0.9, "max_completion_length": 40}
PATIENCE = 300  # seconds

STARTING = """
import sys
from teachers.engines.ray_engine import RayEngine
RayEngine(sys.argv[1], concurrency=2, engine_args=["dtype=float32"])
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded teacher, with a context that is soon full."""
    folder = tmp_path_factory.mktemp("teacher") / "nano"
    shutil.copytree(nano.model_path(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return folder


@pytest.fixture(scope="module")
def engine(teacher: Path) -> Iterator[RayEngine]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    opened = RayEngine(str(teacher), concurrency=IN_FLIGHT, engine_args=["dtype=float32"], wants=("thinking_budget",))
    mark = ray_cluster._membership.mark
    assert any(_title(process) == "VLLM::EngineCore" for process in _of_cluster(mark))
    yield opened
    opened.close()
    opened.close()
    assert not ray.is_initialized()
    assert _ended(mark)


def _of_cluster(mark: str | None) -> list[psutil.Process]:
    """The running processes of one cluster of ours."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(CLUSTER) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""


def _ended(mark: str | None) -> bool:
    limit = time.monotonic() + 30
    while (left := _of_cluster(mark)) and time.monotonic() < limit:
        time.sleep(0.1)
    return not left


def _requests(count: int) -> list[Request]:
    prompts = nano.problems(levels=nano.parse_levels(""), split="heldout", limit=count)
    return [Request(uid=f"{index}", prompt=prompt, sample_index=0, seed=index) for index, prompt in enumerate(prompts)]


def _nonsense(count: int) -> list[Request]:
    """What the teacher was never asked, so that it wanders."""
    prompts = [Prompt(messages=({"role": "user", "content": "Coins? " * (1 + index)},)) for index in range(count)]
    return [Request(uid=f"{index}", prompt=prompt, sample_index=0, seed=index) for index, prompt in enumerate(prompts)]


def _answers(engine: RayEngine, requests: list[Request], sampling: Any, **options: Any) -> dict[str, Completion]:
    answered = list(engine.generate(iter(requests), sampling, **options))
    assert sorted(request.uid for request, _ in answered) == sorted(request.uid for request in requests)
    return {request.uid: completion for request, completion in answered}


@pytest.mark.vllm
@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "hot"])
def test_log_probabilities_are_the_raw_models(engine: RayEngine, teacher: Path, sampling: Any) -> None:
    """Before temperature and top-p, one row per token, the end token included: transformers' own log-softmax."""
    size = 30
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype="float32").eval()
    requests = _requests(4)
    answers = _answers(engine, requests, sampling, signal=SignalSpec("top", size))
    for request in requests:
        completion = answers[request.uid]
        assert completion.error is None
        signal = completion.signal
        text, _ = render_prompt(engine.tokenizer, request.prompt.messages)
        prompt, ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"], signal.token_ids.tolist()
        assert len(ids) == completion.num_completion_tokens
        assert (ids[-1] in engine.end_ids) == (completion.finish_reason == "stop")
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + ids])).logits[0]
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
        own = expected.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        np.testing.assert_allclose(signal.token_logprobs, own.numpy(), atol=1e-3)
        np.testing.assert_allclose(signal.logprobs, expected.topk(size).values.numpy(), atol=1e-3)
        found = expected.gather(-1, torch.from_numpy(signal.ids).long())
        np.testing.assert_allclose(found.numpy(), signal.logprobs, atol=1e-3)


@pytest.mark.vllm
def test_a_completion_that_repeats_itself_is_ended(engine: RayEngine) -> None:
    """Cut where the first pattern came the third time in a row, and named so; the others are what they were."""
    size, count, spec = 3, 3, SignalSpec("top", 1)
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_completion_length": 60}
    requests = _nonsense(10)
    seen = set()
    for request in requests:  # one at a time: on CPU a batch's numbers depend on its size
        free = _answers(engine, [request], sampling, signal=spec)[request.uid]
        cut = _answers(engine, [request], {**sampling, "loop_stop": [size, count]}, signal=spec)[request.uid]
        ids, whole = cut.signal.token_ids.tolist(), free.signal.token_ids.tolist()
        ends = [end for end in range(1, len(whole) + 1) if _loops(whole[:end], size, count)]
        assert ids == (whole[: ends[0]] if ends else whole)
        ended = "stop" if ids[-1] in engine.end_ids else "length" if len(ids) == 60 else "loop"
        assert cut.finish_reason == ended
        seen.add(ended)
    assert seen >= {"loop", "stop"}


def _loops(ids: list[int], size: int, count: int) -> bool:
    return any(
        len(ids) >= width * count and ids[-width * count :] == ids[-width:] * count for width in range(1, size + 1)
    )


@pytest.mark.vllm
def test_a_thinking_budget_ends_the_reasoning(engine: RayEngine) -> None:
    requests, budget = _requests(4), 4
    close = engine.tokenizer.convert_tokens_to_ids("</think>")
    answers = _answers(engine, requests, {**GREEDY, "thinking_budget": budget}, signal=SignalSpec("top", 1))
    for completion in answers.values():
        ids = completion.signal.token_ids.tolist()
        assert ids.index(close) == 1 + budget  # the opening tag is not counted
        assert completion.text.partition("</think>")[2].startswith("\\boxed{")


@pytest.mark.vllm
def test_new_requests_join_when_answers_come(engine: RayEngine) -> None:
    """Answers come one by one, not when all of them are there: the source waits for one before it goes on."""
    requests = _requests(12)
    held, asked_in_vain = 0, 0

    def source() -> Iterator[Request | None]:
        nonlocal held, asked_in_vain
        for place, request in enumerate(requests):
            while held > place % 3:
                asked_in_vain += 1
                yield None
            held += 1
            yield request

    answered = {}
    for request, completion in engine.generate(source(), GREEDY):
        held -= 1
        answered[request.uid] = completion.text
    assert answered == {uid: completion.text for uid, completion in _answers(engine, requests, GREEDY).items()}
    assert asked_in_vain > 0


@pytest.mark.vllm
def test_a_caller_that_leaves_early_leaves_nothing_to_the_next(engine: RayEngine) -> None:
    """The next run's answers are its own, also under the same uids; two callers may take turns."""
    stream = engine.generate(iter(_nonsense(IN_FLIGHT)), GREEDY)
    next(stream)
    assert engine.awaited or engine.finished
    stream.close()
    assert not engine.awaited
    assert not engine.finished
    requests = _requests(IN_FLIGHT)
    expected = _answers(engine, requests, GREEDY)
    one, other = engine.generate(iter(requests), GREEDY), engine.generate(iter(requests), GREEDY)
    taken: list[dict[str, Completion]] = [{}, {}]
    for _ in requests:
        for answers, stream in zip(taken, (one, other), strict=True):
            request, completion = next(stream)
            answers[request.uid] = completion
    assert list(one) == list(other) == []
    assert {uid: c.text for uid, c in taken[0].items()} == {uid: c.text for uid, c in expected.items()}
    assert taken[0] == taken[1]


@pytest.mark.vllm
def test_what_vllm_refuses_of_one_row_fails_alone(engine: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts too long are seen here first; were one sent all the same, only that row would fail."""
    with monkeypatch.context() as patch:
        patch.setattr(engine, "context", 10 * CONTEXT)
        long = Request(
            uid="long",
            prompt=Prompt(messages=({"role": "user", "content": "books " * CONTEXT},)),
            sample_index=0,
            seed=0,
        )
        answers = _answers(engine, [long, *_requests(3)], GREEDY)
    assert str(CONTEXT) in str(answers.pop("long").error)
    assert {completion.finish_reason for completion in answers.values()} == {"stop"}


@pytest.mark.vllm
def test_what_cannot_be_done_is_refused_in_one_line(engine: RayEngine, teacher: Path, monkeypatch: Any) -> None:
    requests = _requests(1)
    with pytest.raises(UserError, match="use --top-logprobs"):
        _answers(engine, requests, GREEDY, signal=SignalSpec("sampled", 4))
    with pytest.raises(UserError, match="--top-logprobs 9999"):
        _answers(engine, requests, GREEDY, signal=SignalSpec("top", 9999))
    with pytest.raises(UserError, match="refuses the sampling settings"):
        _answers(engine, requests, {**GREEDY, "loop_stop": [4, 1]})
    with pytest.raises(UserError, match="the Ray cluster has 0 free"):  # the engine has all of this machine
        RayEngine(str(teacher), data_parallel_size=2)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "wants", frozenset())
        with pytest.raises(UserError, match="not started for a thinking budget"):
            _answers(engine, requests, {**GREEDY, "thinking_budget": 4})
    assert _answers(engine, requests, GREEDY)


@pytest.mark.vllm
def test_an_engine_that_dies_is_started_again_and_no_sample_is_lost(engine: RayEngine) -> None:
    requests = _requests(2 * IN_FLIGHT)
    expected = _answers(engine, requests, GREEDY)
    stream = engine.generate(iter(requests), GREEDY)
    answered = [next(stream)]
    (core,) = [p for p in _of_cluster(ray_cluster._membership.mark) if _title(p) == "VLLM::EngineCore"]
    core.kill()
    answered += stream
    assert sorted(request.uid for request, _ in answered) == sorted(expected)
    assert {request.uid: completion.text for request, completion in answered} == {
        uid: completion.text for uid, completion in expected.items()
    }


@pytest.mark.vllm
def test_nothing_is_left_of_a_cluster_whose_owner_is_killed(teacher: Path) -> None:
    """SIGKILL while vLLM starts: daemons, workers and the engine's processes go too."""
    environment = child_environment(VLLM_CPU_KVCACHE_SPACE="1")
    with subprocess.Popen(
        [sys.executable, "-c", STARTING, str(teacher)], env=environment, stdout=subprocess.DEVNULL
    ) as owner:
        try:
            mark = _engine_mark(owner.pid)
            assert len(_of_cluster(mark)) > 3
        finally:
            owner.kill()
        owner.wait()
        assert _ended(mark)


def _engine_mark(pid: int) -> str:
    """Wait until a vLLM engine runs below a process, and return the mark of its cluster."""
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit:
        for process in psutil.Process(pid).children(recursive=True):
            if _title(process) == "VLLM::EngineCore":
                return process.environ()[CLUSTER]
        time.sleep(0.1)
    raise TimeoutError("no engine started")


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("max_model_len=auto", "takes a number of tokens"),
        ("gpu_memory_utilisation=0.5", "did you mean 'gpu_memory_utilization'"),
        ("data_parallel_size=2", "give --data-parallel-size"),
        ("address", "key=value"),
    ],
)
def test_arguments_are_checked_before_ray_is_asked(teacher: Path, argument: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        RayEngine(str(teacher), engine_args=[argument])


def test_the_cause_of_a_remote_error_is_one_line() -> None:
    """The last named error of a traceback and what belongs to it; without one the last line; never nothing."""
    remote = (
        "ray::Map()\n  File 'x.py', line 1\nKeyError: 'a'\n\nDuring handling:\npydantic.ValidationError: 1 error\n  bad"
    )
    assert cause(RuntimeError(remote)) == "pydantic.ValidationError: 1 error bad"
    assert cause(RuntimeError("first\nthe node died\n")) == "the node died"
    assert cause(RuntimeError()) == "RuntimeError"
    assert len(cause(RuntimeError("x" * 10_000))) <= 600
