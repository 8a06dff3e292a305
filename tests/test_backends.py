"""One contract for every backend in `BACKENDS`, on the embedded teacher.

vllm, server (a real `vllm serve` on loopback) and ray (a real cluster of this machine) run vLLM's engine on CPU. replay
answers from a store that the transformers backend fills with the very requests it is about to be asked.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from vllm_server import serve_nano

from distill.errors import UserError
from distill.records import Completion, Prompt
from distill.store import TraceStore
from distill.watchdog import MARK, marked
from teachers import BACKENDS, nano, open_backend
from teachers.backend import FEATURES, Request, engine_options, room
from teachers.engines.replay import ReplayEngine
from teachers.engines.transformers_engine import SeededSampling
from teachers.plan import Author
from teachers.sampling import trace_of

CONTEXT = 640
IN_FLIGHT = 8
GREEDY = {"temperature": 0.0, "top_p": 1.0, "max_completion_length": 64}
HOT = {"temperature": 2.0, "top_p": 1.0, "max_completion_length": 24}
PREFILLING = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n<think>\n' }}{%- endif -%}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded teacher with room for long prompts: its positions are rotary, so only the config says how many.

    Its generation_config penalises repetition, as some hub models' do; samples must not depend on that.
    """
    folder = tmp_path_factory.mktemp("teacher") / "nano"
    shutil.copytree(nano.model_path(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 1.8, "top_k": 3}))
    return folder


class Replayed:
    """A replay engine whose store always holds what it is asked: another engine answers first."""

    def __init__(self, teacher: Path, store: Path) -> None:
        self.recorder = open_backend("transformers", str(teacher), concurrency=IN_FLIGHT, engine_args=["dtype=float32"])
        self.store, self.author = store, Author(name="nano", location="", identity="nano")
        self.name, self.tokenizer = "replay", self.recorder.tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(ReplayEngine, name)

    def generate(
        self, requests: Iterator[Request | None], sampling: dict[str, Any]
    ) -> Iterator[tuple[Request, Completion]]:
        """Record and replay one request after the other: it is never ahead of its caller."""
        for request in requests:
            folder = Path(tempfile.mkdtemp(dir=self.store))
            with TraceStore(folder) as store:
                store.claim({"sampling": sampling})
                ((_, completion),) = self.recorder.generate(iter([request]), sampling)
                store.append(trace_of(request, completion, self.author, "transformers"))
            yield from open_backend("replay", str(folder)).generate(iter([request]), sampling)

    def close(self) -> None:
        self.recorder.close()


@contextlib.contextmanager
def _started(name: str, teacher: Path, folder: Path) -> Iterator[Any]:
    if name == "replay":
        yield Replayed(teacher, folder)
        return
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"concurrency": IN_FLIGHT}
        if name == "server":
            options["base_url"] = [stack.enter_context(serve_nano(teacher))]
        else:
            options["engine_args"] = ["dtype=float32"]
        opened = open_backend(name, str(teacher), **options)
        stack.callback(opened.close)
        yield opened


VLLM = ("vllm", "server", "ray")  # those whose engine is vLLM


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.vllm] if name in VLLM else []) for name in BACKENDS],
)
def engine(request: pytest.FixtureRequest, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One engine of each kind, shared by the tests below, `IN_FLIGHT` samples at once."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with _started(request.param, teacher, tmp_path_factory.mktemp("engine")) as opened:
        yield opened
    limit = time.monotonic() + 20
    while left := [pid for pid in marked(os.environ.get(MARK, "")) if _title(pid).startswith("VLLM")]:
        assert time.monotonic() < limit, left
        time.sleep(0.1)


@pytest.fixture(scope="module")
def reference(teacher: Path) -> tuple[Any, Any]:
    """The same weights and tokenizer in plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype="float32").eval()
    model.generation_config = GenerationConfig(eos_token_id=model.config.eos_token_id, pad_token_id=0)
    return model, AutoTokenizer.from_pretrained(teacher)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _questions(count: int) -> list[Prompt]:
    return list(nano.problems(levels=nano.parse_levels(""), split="heldout", limit=count))


def _nonsense(count: int) -> list[Prompt]:
    """Questions of other lengths each that the teacher was never asked; on its own it is too sure to be random."""
    return [Prompt(messages=({"role": "user", "content": "Coins? " * (1 + index)},)) for index in range(count)]


def _requests(prompts: Sequence[Prompt], seed: int = 0) -> list[Request]:
    return [
        Request(uid=f"{seed}-{index}-{prompt.uid}", prompt=prompt, sample_index=0, seed=seed + index)
        for index, prompt in enumerate(prompts)
    ]


def _long_prompt(reference: tuple[Any, Any], tokens: int, word: str = " books") -> Prompt:
    """A prompt that renders to exactly `tokens` tokens."""
    _, tokenizer = reference
    empty = _prompt_tokens(tokenizer, Prompt(messages=({"role": "user", "content": ""},)))
    assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    prompt = Prompt(messages=({"role": "user", "content": word * (tokens - len(empty))},))
    assert len(_prompt_tokens(tokenizer, prompt)) == tokens
    return prompt


def _prompt_tokens(tokenizer: Any, prompt: Prompt) -> list[int]:
    ids = tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True, return_dict=True)
    return list(ids["input_ids"])


def _texts(engine: Any, requests: Sequence[Request], sampling: dict[str, Any]) -> dict[str, Completion]:
    answered = list(engine.generate(iter(requests), sampling))
    assert sorted(request.uid for request, _ in answered) == sorted(request.uid for request in requests)
    return {request.uid: completion for request, completion in answered}


def test_greedy_is_greedy_generate_of_transformers(engine: Any, reference: tuple[Any, Any]) -> None:
    """Every request is answered once, with the tokens plain `generate` gives, counted, and without special tokens."""
    model, tokenizer = reference
    requests = _requests(_questions(3 * IN_FLIGHT))
    answers = _texts(engine, requests, GREEDY)
    for request in requests:
        ids = _prompt_tokens(tokenizer, request.prompt)
        new = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            temperature=None,
            top_p=None,
            max_new_tokens=64,
        )[0, len(ids) :].tolist()
        assert new[-1] == tokenizer.eos_token_id
        completion = answers[request.uid]
        assert completion.text == tokenizer.decode(new[:-1])
        assert completion.text.startswith("<think>")
        assert completion.finish_reason == "stop"
        assert completion.num_prompt_tokens == len(ids)
        assert completion.num_completion_tokens == len(new)
        assert completion.error is None


def test_a_cut_completion_says_length(engine: Any) -> None:
    """Five tokens are five tokens, and the beginning of what more would have been."""
    requests = _requests(_questions(4))
    short, whole = _texts(engine, requests, {**GREEDY, "max_completion_length": 5}), _texts(engine, requests, GREEDY)
    for uid, completion in short.items():
        assert completion.finish_reason == "length"
        assert completion.num_completion_tokens == 5
        assert whole[uid].text.startswith(completion.text)
        assert len(completion.text) < len(whole[uid].text)


def test_sampling_that_the_engine_would_refuse_or_change_is_refused(engine: Any) -> None:
    """vLLM takes temperatures of 0.01 to 2 and quietly changes smaller ones; a user gets one line instead."""
    request = _requests(_questions(1))
    for temperature in (0.001, 7.0):
        if engine.name in VLLM:
            with pytest.raises(UserError, match=f"temperature.*{temperature}"):
                _texts(engine, request, {**GREEDY, "temperature": temperature})
        else:
            assert _texts(engine, request, {**GREEDY, "temperature": temperature})
    assert _texts(engine, request, GREEDY)


def test_a_seed_is_a_sample(engine: Any) -> None:
    """The same seeds give the same texts again, other seeds give others, and two samples of a prompt differ."""
    prompts = _nonsense(1) * IN_FLIGHT
    once, again = _texts(engine, _requests(prompts), HOT), _texts(engine, _requests(prompts), HOT)
    assert {uid: c.text for uid, c in once.items()} == {uid: c.text for uid, c in again.items()}
    others = _texts(engine, _requests(prompts, seed=1000), HOT)
    texts = {completion.text for completion in [*once.values(), *others.values()]}
    assert len(texts) > IN_FLIGHT


def test_a_prompt_beyond_the_context_fails_alone(engine: Any, reference: tuple[Any, Any]) -> None:
    """It becomes a failed completion that says why; its neighbours are answered."""
    too_long, fits_not = _long_prompt(reference, CONTEXT), _long_prompt(reference, CONTEXT - 63)
    requests = _requests([*_questions(2), too_long, fits_not])
    answers = _texts(engine, requests, GREEDY)
    for request in requests[:2]:
        assert answers[request.uid].finish_reason == "stop"
    for request, tokens in zip(requests[2:], (CONTEXT, CONTEXT - 63), strict=True):
        completion = answers[request.uid]
        assert completion.finish_reason == "error"
        assert (completion.text, completion.num_completion_tokens) == ("", 0)
        assert str(tokens) in str(completion.error)
        assert str(CONTEXT) in str(completion.error)


def test_without_a_limit_the_context_is_the_limit(engine: Any, reference: tuple[Any, Any]) -> None:
    """Each completion may fill what its own prompt leaves, whatever the neighbours' prompts leave."""
    prompts = [_long_prompt(reference, CONTEXT - left) for left in (1, 4, 9, 9)]
    answers = _texts(engine, _requests([*prompts, *_questions(1)]), {**GREEDY, "max_completion_length": None})
    lengths = [answers[request.uid] for request in _requests(prompts)]
    for completion, left in zip(lengths, (1, 4, 9, 9), strict=True):
        assert completion.num_prompt_tokens == CONTEXT - left
        assert completion.num_completion_tokens == left or completion.finish_reason == "stop"
        assert completion.num_completion_tokens <= left
    assert any(completion.finish_reason == "length" for completion in lengths)
    assert [c.finish_reason for uid, c in answers.items() if uid.startswith("0-4-")] == ["stop"]


def test_requests_are_pulled_only_when_there_is_room(engine: Any) -> None:
    """Never more than `IN_FLIGHT` are pulled and unanswered, and pulling goes on while others run or are yielded."""
    pulled = answered = most = 0

    def feed() -> Iterator[Request]:
        nonlocal pulled, most
        for request in _requests(_questions(3 * IN_FLIGHT + 1)):
            pulled += 1
            most = max(most, pulled - answered)
            yield request

    stream = engine.generate(feed(), GREEDY)
    assert pulled == 0
    for _ in stream:
        answered += 1
        assert pulled - answered <= IN_FLIGHT
    assert answered == pulled == 3 * IN_FLIGHT + 1
    assert most == (1 if engine.name == "replay" else IN_FLIGHT)


def test_no_request_is_no_work(engine: Any) -> None:
    assert list(engine.generate(iter([]), GREEDY)) == []


def test_what_the_template_opened_is_part_of_the_text(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that opens `<think>` itself leaves the text as if the model had written the tag."""
    if engine.name == "server":
        pytest.skip("a server renders by its own template; tests/test_server.py has what it does about such tags")
    monkeypatch.setattr(engine.tokenizer, "chat_template", PREFILLING)
    for completion in _texts(engine, _requests(_questions(3)), GREEDY).values():
        assert completion.text.startswith("<think>\n")
        assert completion.text.count("<think>") == 1


def test_long_prompts_with_seeds_in_flight(engine: Any, reference: tuple[Any, Any]) -> None:
    """Forty seeded requests of 400 tokens, most of them different (vLLM on CPU dies of a chunked seeded prefill)."""
    prompts = [_long_prompt(reference, 400 + index % 7, word) for index in range(20) for word in (" books", " coins")]
    answers = _texts(engine, _requests(prompts), {**HOT, "max_completion_length": 8})
    assert all(completion.error is None and completion.num_completion_tokens for completion in answers.values())


def test_the_description_is_one_line_and_the_config_counts_flops(engine: Any) -> None:
    assert set(engine.provides) <= set(FEATURES)
    assert "text" in engine.provides
    assert BACKENDS[engine.name]
    if engine.name == "replay":
        assert engine.config is None  # the cost of a stored trace is its store's to know
        return
    assert "\n" not in engine.description
    assert str(IN_FLIGHT) in engine.description
    assert engine.config.hidden_size == 128


def test_a_sample_does_not_depend_on_its_neighbours(teacher: Path) -> None:
    """transformers: alone, in a batch, and in another order, a seed gives the same text."""
    engine = open_backend("transformers", str(teacher), concurrency=IN_FLIGHT)
    requests = _requests(_nonsense(IN_FLIGHT))
    together = _texts(engine, requests, HOT)
    backwards = _texts(engine, requests[::-1], HOT)
    alone = {uid: c for request in requests for uid, c in _texts(engine, [request], HOT).items()}
    assert together == backwards == alone
    assert len({completion.text for completion in together.values()}) == IN_FLIGHT


def test_an_unknown_engine_argument_is_refused(teacher: Path) -> None:
    with pytest.raises(UserError, match=r"dtyp.*did you mean 'dtype'"):
        open_backend("transformers", str(teacher), engine_args=["dtyp=float32"])
    with pytest.raises(UserError, match="key=value"):
        engine_options(["dtype"])
    assert engine_options(["max-model-len=512", "enforce_eager=true", "x="]) == {
        "max_model_len": 512,
        "enforce_eager": True,
        "x": "",
    }


def test_room_is_the_limit_or_what_the_context_leaves() -> None:
    assert (room(10, None, None), room(10, None, 5), room(10, 20, None), room(10, 20, 5)) == (None, 5, 10, 5)
    assert (room(19, 20, None), room(10, 20, 10)) == (1, 10)
    for prompt, limit in ((20, None), (25, None), (11, 10)):
        with pytest.raises(ValueError, match="context 20"):
            room(prompt, 20, limit)


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -2.0])


def _streams(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _draws(count: int, temperature: float, top_p: float) -> torch.Tensor:
    """Return how often each outcome is drawn by `count` rows of their own seeds, first step."""
    sampler = SeededSampling(_streams(*range(count)), temperature, top_p)
    noisy = sampler(torch.zeros(count, 1, dtype=torch.long), LOGITS.expand(count, -1).clone())
    return torch.bincount(noisy.argmax(-1), minlength=len(LOGITS)).double()


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest set of most likely outcomes whose mass reaches `top_p` (Holtzman et al. 2020), renormalised."""
    kept, mass = torch.zeros_like(probabilities), 0.0
    for index in probabilities.argsort(descending=True).tolist():
        kept[index] = probabilities[index]
        mass += float(probabilities[index])
        if mass >= top_p:
            break
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8), (2.0, 0.5)])
def test_seeded_sampling_draws_from_the_softmax(temperature: float, top_p: float) -> None:
    """Pearson's chi-square against the closed form, and nothing outside the nucleus; the seeds are fixed."""
    count = 20_000
    expected = _nucleus((LOGITS.double() / temperature).softmax(-1), top_p)
    found = _draws(count, temperature, top_p)
    inside = expected > 0
    assert found[~inside].sum() == 0
    statistic = float(((found - count * expected)[inside] ** 2 / (count * expected)[inside]).sum())
    degrees = int(inside.sum()) - 1
    # Wilson and Hilferty's cube-root approximation of the 99.99 % point of chi-square.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3 if degrees else 1e-9
    assert statistic <= limit


def test_seeded_sampling_moves_on_and_keeps_rows_apart() -> None:
    """The second step of a row is independent of its first; equal seeds are equal rows, step by step."""
    sampler = SeededSampling(_streams(5, 5, *range(4000)), 1.0, 1.0)
    scores, ids = LOGITS.expand(4002, -1).clone(), torch.zeros(4002, 1, dtype=torch.long)
    first, second = sampler(ids, scores).argmax(-1), sampler(ids, scores).argmax(-1)
    assert first[0] == first[1]
    assert second[0] == second[1]
    joint = torch.zeros(6, 6, dtype=torch.double)
    for a, b in zip(first[2:].tolist(), second[2:].tolist(), strict=True):
        joint[a, b] += 1
    p = LOGITS.double().softmax(-1)
    expected = 4000 * p[:, None] * p
    assert float(((joint - expected) ** 2 / expected).sum()) < 81.0  # the 99.999 % point at 35 degrees of freedom
