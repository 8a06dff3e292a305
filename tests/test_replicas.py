"""Several engines behind one queue: every request is answered once, whoever dies."""

from __future__ import annotations

import os
import random
import signal as signals
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from transformers import PretrainedConfig

from distill.errors import RunError, UserError
from distill.ledger import forward_flops
from distill.records import Prompt
from distill.token_signal import SignalSpec
from distill.watchdog import MARK, marked
from teachers import nano, open_backend
from teachers.backend import Request
from teachers.engines import replicas
from teachers.engines.replica import _plain
from teachers.engines.replicas import Replicas, open_replicas

GREEDY = {"temperature": 0.0, "top_p": 1.0, "max_completion_length": 48}
OPTIONS: dict[str, Any] = {"concurrency": 8, "engine_args": ["dtype=float32"]}


@pytest.fixture(scope="module")
def pair() -> Iterator[Replicas]:
    """Two reference engines on the embedded teacher; tests that kill one open their own."""
    opened = open_replicas("transformers", str(nano.model_path()), 2, **OPTIONS)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def alone() -> Iterator[Any]:
    """The same engine in this process."""
    opened = open_backend("transformers", str(nano.model_path()), **OPTIONS)
    yield opened
    opened.close()


def _requests(count: int) -> list[Request]:
    prompts = nano.problems(levels=nano.parse_levels(""), split="heldout", limit=count)
    return [Request(uid=f"{index}", prompt=prompt, sample_index=0, seed=index) for index, prompt in enumerate(prompts)]


def _answers(engine: Any, requests: Any, **options: Any) -> dict[str, Any]:
    answered = list(engine.generate(iter(requests), GREEDY, **options))
    assert len({request.uid for request, _ in answered}) == len(answered)
    return {request.uid: completion for request, completion in answered}


def test_replicas_answer_as_one_engine_does(pair: Replicas, alone: Any) -> None:
    """Same texts for the same requests, whichever replica had them, and both had some."""
    requests = _requests(40)
    assert _answers(pair, requests) == _answers(alone, requests)
    assert pair.name == alone.name
    assert pair.provides == alone.provides
    assert pair.config.to_dict() == alone.config.to_dict()
    assert pair.context == alone.context
    assert pair.in_flight == 16
    assert pair.description == f"2 times {alone.description}"
    assert len({replica.process.pid for replica in pair.replicas}) == 2


def test_signals_and_scores_come_through(pair: Replicas, alone: Any) -> None:
    """What one replica says while it writes, and another about the written, is what one engine says."""
    requests, spec = _requests(12), SignalSpec("top", 4)
    expected = _answers(alone, requests, signal=spec)
    items = []
    for uid, completion in _answers(pair, requests, signal=spec).items():
        np.testing.assert_array_equal(completion.signal.ids, expected[uid].signal.ids)
        np.testing.assert_allclose(completion.signal.logprobs, expected[uid].signal.logprobs, atol=1e-4)
        items.append((uid, [5, 6, 7], completion.signal.token_ids.tolist()))
    mine, theirs = dict(alone.score(iter(items), spec)), dict(pair.score(iter(items), spec))
    assert set(mine) == set(theirs) == {request.uid for request in requests}
    for uid, numbers in mine.items():
        np.testing.assert_allclose(theirs[uid].token_logprobs, numbers.token_logprobs, atol=1e-4)


def test_new_requests_may_wait_for_answers(pair: Replicas) -> None:
    """A source that decides by what came back, one generation at a time, is asked again after every answer."""
    waves, held, sent = [_requests(24)[start : start + 8] for start in (0, 8, 16)], 0, 0

    def source() -> Iterator[Request | None]:
        nonlocal held, sent
        for wave in waves:
            while held:
                yield None
            for request in wave:
                held += 1
                sent += 1
                yield request

    answered = []
    for request, _ in pair.generate(source(), GREEDY):
        held -= 1
        answered.append(request.uid)
    assert sorted(answered, key=int) == [str(index) for index in range(24)]
    for start in (0, 8, 16):
        assert sorted(map(int, answered[start : start + 8])) == list(range(start, start + 8))


def test_a_caller_that_leaves_early_leaves_nothing_behind(pair: Replicas, alone: Any) -> None:
    """The next run gets its own answers, none of the run before."""
    stream = pair.generate(iter(_requests(40)), GREEDY)
    next(stream)
    stream.close()
    requests = [Request(uid=f"b{each.uid}", prompt=each.prompt, sample_index=0, seed=0) for each in _requests(20)]
    assert _answers(pair, requests) == _answers(alone, requests)


def _drawn(answers: Iterator[Any], kill: dict[int, Any]) -> list[Any]:
    """Collect the answers, and kill replicas once some have come."""
    found = []
    for place, answer in enumerate(answers):
        if place in kill:
            os.kill(kill[place].process.pid, signals.SIGKILL)
        found.append(answer)
    return found


def test_a_killed_replica_loses_nothing(alone: Any) -> None:
    """kill -9 in mid-run: the other answers what it held, each request once, with the same text."""
    requests = _requests(60)
    opened = open_replicas("transformers", str(nano.model_path()), 2, **OPTIONS)
    try:
        found = _drawn(opened.generate(iter(requests), GREEDY), {5: opened.replicas[0]})
        assert opened.replicas[0].pipe.closed
        assert sorted(request.uid for request, _ in found) == sorted(request.uid for request in requests)
        assert {request.uid: completion for request, completion in found} == _answers(alone, requests)
        assert _answers(opened, requests[:10]) == _answers(alone, requests[:10])  # and the run after that
        os.kill(opened.replicas[1].process.pid, signals.SIGKILL)
        with pytest.raises(RunError, match=r"every replica .* died: its process was killed"):
            _answers(opened, requests)
    finally:
        opened.close()


PARROT = """
import os, time
from distill.errors import UserError
from distill.records import Completion

class Parrot:
    name, description, config, provides = "parrot", "says what it is asked", None, frozenset({"text", "feed"})

    def __init__(self, model, *, concurrency, seconds=0.0):
        if seconds < 0:
            raise UserError("no time runs backwards")
        self.in_flight, self.seconds = concurrency, seconds

    def generate(self, requests, sampling, *, signal=None):
        held, requests, more = [], iter(requests), True
        while held or more:
            while more and len(held) < self.in_flight:
                request = next(requests, False)
                if not request:
                    more = request is None
                    break
                held.append(request)
            time.sleep(self.seconds)
            if held:
                request = held.pop(0)
                text = request.prompt.messages[0]["content"]
                if text == "poison":
                    os._exit(1)
                if text == "nonsense":
                    raise UserError("that is no question")
                yield request, Completion(text=text, finish_reason="stop", num_prompt_tokens=1, num_completion_tokens=1)

    def close(self): ...
"""


@pytest.fixture
def parrots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Replicas]]:
    """Opens replicas of a small engine that starts in no time."""
    (tmp_path / "parrot.py").write_text(PARROT)
    monkeypatch.syspath_prepend(str(tmp_path))
    opened: list[Replicas] = []

    def open_some(number: int, **options: Any) -> Replicas:
        opened.append(open_replicas("parrot:Parrot", str(nano.model_path()), number, **options))
        return opened[-1]

    yield open_some
    for each in opened:
        each.close()


def _said(*texts: str) -> list[Request]:
    prompts = [Prompt(messages=({"role": "user", "content": text},)) for text in texts]
    return [
        Request(uid=text, prompt=prompt, sample_index=0, seed=0) for text, prompt in zip(texts, prompts, strict=True)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_whoever_dies_whenever_every_request_is_answered_once(parrots: Callable[..., Replicas], seed: int) -> None:
    """Three of four replicas are killed at random moments of a run."""
    moments = random.Random(seed)
    opened = parrots(4, concurrency=moments.randint(1, 9), seconds=0.001)
    requests = _said(*map(str, range(300)))
    kill = dict(zip(moments.sample(range(250), 3), opened.replicas, strict=False))
    found = _drawn(opened.generate(iter(requests), GREEDY), kill)
    given_up = [request.uid for request, completion in found if completion.error is not None]
    assert sorted(request.uid for request, _ in found) == sorted(request.uid for request in requests)
    assert all(request.uid == completion.text for request, completion in found if completion.error is None)
    assert len(given_up) <= opened.replicas[0].room  # who was with two that died
    assert [replica.pipe.closed for replica in opened.replicas] == [True, True, True, False]


def test_what_kills_every_engine_is_given_up(parrots: Callable[..., Replicas]) -> None:
    """A request that two replicas died of is a failed sample; the third replica is not tried, and answers the rest."""
    opened = parrots(3, concurrency=1)
    found = {r.uid: completion for r, completion in opened.generate(iter(_said("a", "poison", "b", "c")), GREEDY)}
    assert set(found) == {"a", "poison", "b", "c"}
    assert "2 replicas died" in found["poison"].error
    assert [found[uid].error for uid in "abc"] == [None] * 3
    assert sum(not replica.pipe.closed for replica in opened.replicas) == 1


def test_a_users_mistake_comes_through(parrots: Callable[..., Replicas]) -> None:
    """Refused at the start or in mid-run, it is the engine's own line; the replicas live on, or none stays."""
    opened = parrots(2, concurrency=4)
    with pytest.raises(UserError, match="that is no question"):
        list(opened.generate(iter(_said("a", "nonsense", *"bcdefghijkl")), GREEDY))
    assert sorted(r.uid for r, _ in opened.generate(iter(_said(*"xyz")), GREEDY)) == ["x", "y", "z"]
    before = set(marked(os.environ.get(MARK, "")))
    with pytest.raises(UserError, match="no time runs backwards"):
        parrots(2, concurrency=1, seconds=-1.0)
    with pytest.raises(UserError, match="unknown backend 'transformer'"):
        open_replicas("transformer", str(nano.model_path()), 2)
    assert set(marked(os.environ.get(MARK, ""))) <= before


def test_every_replica_has_devices_or_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,GPU-3,4")
    assert replicas._shares(2, 2) == [{"devices": "0,1"}, {"devices": "2,GPU-3"}]
    with pytest.raises(UserError, match="3 replicas of 2 devices each need 6 devices, and 5 are visible"):
        replicas._shares(3, 2)
    with pytest.raises(UserError, match="need 6 devices"):
        open_replicas("vllm", "m", 3, tensor_parallel_size=None, engine_args=["tensor-parallel-size=2"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    mine = sorted(os.sched_getaffinity(0))
    shares = [share["cores"] for share in replicas._shares(len(mine), 1)]
    assert sorted(core for cores in shares for core in cores) == mine
    assert replicas._shares(len(mine) + 1, 1) == [{"cores": mine}] * (len(mine) + 1)


def test_one_replica_is_the_engine_itself() -> None:
    opened = open_replicas("transformers", str(nano.model_path()), 1, **OPTIONS)
    assert not isinstance(opened, Replicas)
    opened.close()


class HomemadeConfig(PretrainedConfig):
    """As a model folder with code of its own brings along: attributes by other names, a class that exists here only."""

    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
    }

    def __init__(self, width: int = 12, depth: int = 3, heads: int = 4, **rest: Any) -> None:
        self.width, self.depth, self.heads = width, depth, heads
        super().__init__(**rest)


def test_a_config_class_from_a_model_folder_is_handed_over_as_plain_numbers() -> None:
    config = HomemadeConfig(vocab_size=99)
    plain = _plain(config)
    assert type(plain) is PretrainedConfig
    assert forward_flops(plain, 10, 5) == forward_flops(config, 10, 5)
    assert _plain(None) is None


@pytest.mark.vllm
def test_two_vllm_engines(alone: Any) -> None:
    """The real engine, two of them: answers as the reference's, and the one that is killed takes its children along."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    requests = _requests(60)
    opened = open_replicas("vllm", str(nano.model_path()), 2, **OPTIONS)
    try:
        first, second = (_children(replica.process.pid) for replica in opened.replicas)
        assert first
        assert second
        found = _drawn(opened.generate(iter(requests), GREEDY), {5: opened.replicas[0]})
        assert len(found) == 60
        assert {request.uid: completion.text for request, completion in found} == {
            uid: completion.text for uid, completion in _answers(alone, requests).items()
        }
        _wait_for_the_end_of(first)
    finally:
        opened.close()
    _wait_for_the_end_of(second)


def _children(parent: int) -> list[int]:
    return [int(folder.name) for folder in Path("/proc").iterdir() if _status(folder)[1:2] == [str(parent)]]


def _status(folder: Path) -> list[str]:
    """State, parent and so on of a process; nothing where it is gone."""
    try:
        return (folder / "stat").read_text().rpartition(")")[2].split() if folder.name.isdigit() else []
    except OSError:
        return []


def _wait_for_the_end_of(pids: list[int]) -> None:
    limit = time.monotonic() + 60
    while left := [pid for pid in pids if _status(Path("/proc", str(pid)))[:1] not in ([], ["Z"])]:
        assert time.monotonic() < limit, left
        time.sleep(0.1)
