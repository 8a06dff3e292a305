"""The vLLM backend beyond the contract of tests/test_backends.py: log-probabilities, scores, budgets, loops, feeding.

One real engine on CPU, started so that a prefill is cut in chunks of 96 tokens (seeded requests stay shorter: those
die of it on CPU); the reference is transformers' own log-softmax in float32.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from distill.errors import UserError
from distill.models import load_tokenizer
from distill.records import Completion, Prompt
from distill.render import render_prompt
from distill.token_signal import SignalSpec
from teachers import nano
from teachers.backend import Request
from teachers.engines.vllm_engine import VllmEngine
from teachers.engines.vllm_options import SCORE_BYTES, engine_arguments, user_arguments
from teachers.engines.vllm_sampling import sample_parameters, token_signal

CONTEXT, CHUNK, IN_FLIGHT = 320, 96, 8
GREEDY = {"temperature": 0.0, "top_p": 1.0, "max_completion_length": 64}
HOT = {"temperature": 1.5, "top_p": 0.9, "max_completion_length": 40}
END_OF_THOUGHT = "</think>"
FURTHER_END = 0  # the padding token, which the teacher never writes: an end that only the generation config knows


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded teacher, with a context that is soon full."""
    folder = tmp_path_factory.mktemp("teacher") / "nano"
    shutil.copytree(nano.model_path(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    generation = json.loads((folder / "generation_config.json").read_text())
    ends = {"eos_token_id": [generation["eos_token_id"], FURTHER_END]}
    (folder / "generation_config.json").write_text(json.dumps(generation | ends))
    return folder


@pytest.fixture(scope="module")
def engine(teacher: Path) -> Iterator[VllmEngine]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    opened = VllmEngine(
        str(teacher),
        concurrency=IN_FLIGHT,
        engine_args=["dtype=float32", f"max_num_batched_tokens={CHUNK}"],
        wants=("thinking_budget", "score"),
    )
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def log_softmax(teacher: Path) -> Callable[[list[int], list[int]], torch.Tensor]:
    """What transformers says at every position of a completion, (T, V), in float32."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype="float32").eval()

    @torch.inference_mode()
    def distributions(prompt_ids: list[int], completion_ids: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0]
        return logits[len(prompt_ids) - 1 : -1].log_softmax(-1)

    return distributions


def _requests(count: int) -> list[Request]:
    prompts = nano.problems(levels=nano.parse_levels(""), split="heldout", limit=count)
    return [Request(uid=f"{index}", prompt=prompt, sample_index=0, seed=index) for index, prompt in enumerate(prompts)]


def _asked(text: str, seed: int = 0) -> Request:
    prompt = Prompt(messages=({"role": "user", "content": text},))
    return Request(uid=f"{seed}-{text}", prompt=prompt, sample_index=0, seed=seed)


def _answers(engine: VllmEngine, requests: list[Request], sampling: Any, **options: Any) -> dict[str, Completion]:
    answered = list(engine.generate(iter(requests), sampling, **options))
    assert sorted(request.uid for request, _ in answered) == sorted(request.uid for request in requests)
    return {request.uid: completion for request, completion in answered}


def _prompt_ids(engine: VllmEngine, request: Request) -> list[int]:
    text, _ = render_prompt(engine.tokenizer, request.prompt.messages)
    return list(engine.tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_signal(signal: Any, expected: torch.Tensor, size: int) -> None:
    """The numbers are the reference's: own tokens, and the K most likely where they are not tied."""
    own = expected.gather(-1, torch.from_numpy(signal.token_ids).long()[:, None])[:, 0]
    np.testing.assert_allclose(signal.token_logprobs, own.numpy(), atol=1e-3)
    np.testing.assert_allclose(signal.logprobs, expected.topk(size).values.numpy(), atol=1e-3)
    np.testing.assert_allclose(
        expected.gather(-1, torch.from_numpy(signal.ids).long()).numpy(), signal.logprobs, atol=1e-3
    )


@pytest.mark.vllm
def test_ends_that_only_the_generation_config_names_are_known(engine: VllmEngine) -> None:
    """vLLM stops at them of itself; unknown here, one would stay in the text where it is no special token."""
    assert engine.end_ids == sorted({engine.tokenizer.eos_token_id, FURTHER_END})


@pytest.mark.vllm
@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "hot"])
def test_log_probabilities_are_the_raw_models(engine: VllmEngine, log_softmax: Any, sampling: Any) -> None:
    """Captured while generating, before temperature and top-p, one row per token, the end token included."""
    size = 30  # beyond vLLM's own bound of 20
    for request in _requests(4):
        plain = _answers(engine, [request], sampling)[request.uid]
        completion = _answers(engine, [request], sampling, signal=SignalSpec("top", size))[request.uid]
        assert completion.text == plain.text
        assert plain.signal is None
        assert len(completion.signal) == completion.num_completion_tokens
        ids = completion.signal.token_ids.tolist()
        assert (ids[-1] in engine.end_ids) == (completion.finish_reason == "stop")
        _check_signal(completion.signal, log_softmax(_prompt_ids(engine, request), ids), size)


@pytest.mark.vllm
def test_scores_are_what_was_said_while_generating(engine: VllmEngine) -> None:
    """Scoring a completion again gives the numbers captured with it, also while others are being generated."""
    spec = SignalSpec("top", 6)
    scored = 0
    for request, completion in engine.generate(iter(_requests(12)), GREEDY, signal=spec):
        item = (request.uid, _prompt_ids(engine, request), completion.signal.token_ids.tolist())
        ((uid, again),) = engine.score([item], spec)
        assert uid == request.uid
        np.testing.assert_allclose(again.logprobs, completion.signal.logprobs, atol=1e-3)
        np.testing.assert_allclose(again.token_logprobs, completion.signal.token_logprobs, atol=1e-3)
        scored += 1
    assert scored == 12


@pytest.mark.vllm
def test_any_text_can_be_scored_up_to_the_whole_context(engine: VllmEngine, log_softmax: Any) -> None:
    """Texts of all lengths at once, in several chunks, against the reference; the longest fills the context."""
    draw = np.random.default_rng(0)
    lengths = [(1, 1), (1, 2), (3, CHUNK), (CHUNK, 1), (CHUNK - 1, CHUNK + 1), (7, CONTEXT - 7), (CONTEXT - 1, 1)]
    items = [(f"{p}+{c}", draw.integers(5, 300, p).tolist(), draw.integers(5, 300, c).tolist()) for p, c in lengths * 2]
    items = [(f"{uid}#{place}", *rest) for place, (uid, *rest) in enumerate(items)]
    found = dict(engine.score(iter(items), SignalSpec("top", 25)))
    assert set(found) == {uid for uid, _, _ in items}
    for uid, prompt_ids, completion_ids in items:
        assert found[uid].token_ids.tolist() == completion_ids
        _check_signal(found[uid], log_softmax(prompt_ids, completion_ids), 25)
    for prompt, completion, reason in ((0, 3, "0 prompt"), (3, 0, "and 0 of its"), (CONTEXT, 1, f"has {CONTEXT}")):
        with pytest.raises(UserError, match=reason):
            list(engine.score([("bad", [5] * prompt, [5] * completion)], SignalSpec("top", 1)))


@pytest.mark.vllm
@pytest.mark.parametrize("budget", [1, 4, 9, 500])
def test_a_thinking_budget_ends_the_reasoning(engine: VllmEngine, budget: int) -> None:
    """At most so many tokens between the tags, the same ones as without, and the answer follows."""
    requests, spec = _requests(6), SignalSpec("top", 1)
    close = engine.tokenizer.convert_tokens_to_ids(END_OF_THOUGHT)
    free = _answers(engine, requests, GREEDY, signal=spec)
    held = _answers(engine, requests, {**GREEDY, "thinking_budget": budget}, signal=spec)
    cut = 0
    for request in requests:
        ids, whole = held[request.uid].signal.token_ids.tolist(), free[request.uid].signal.token_ids.tolist()
        natural = whole.index(close) - 1  # the opening tag is not counted
        assert ids.index(close) - 1 == min(budget, natural)
        assert ids[: ids.index(close)] == whole[: ids.index(close)]
        assert ids.count(close) == 1
        assert held[request.uid].text.partition(END_OF_THOUGHT)[2].startswith("\\boxed{")
        cut += natural > budget
    assert cut == (0 if budget == 500 else len(requests))


@pytest.mark.vllm
def test_a_thinking_budget_counts_from_a_tag_that_the_template_wrote(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = "{{ '<|im_start|>assistant\n<think>' }}{%- endif -%}"
    written = str(engine.tokenizer.chat_template).rpartition("{{")[0] + opened
    monkeypatch.setattr(engine.tokenizer, "chat_template", written)
    close = engine.tokenizer.convert_tokens_to_ids(END_OF_THOUGHT)
    sampling = {**GREEDY, "thinking_budget": 3}
    for completion in _answers(engine, _requests(3), sampling, signal=SignalSpec("top", 1)).values():
        assert completion.signal.token_ids.tolist().index(close) == 3
        assert completion.text.startswith("<think>")


@pytest.mark.vllm
def test_a_completion_that_repeats_itself_is_ended(engine: VllmEngine) -> None:
    """It is cut where the first pattern came the third time in a row, and says loop; the others are left alone."""
    size, count = 3, 3
    seen = set()
    for seed in range(10):
        request = _asked("Coins? " * (1 + seed), seed)
        assert len(_prompt_ids(engine, request)) < CHUNK
        sampling = {"temperature": 1.0, "top_p": 1.0, "max_completion_length": 60}
        free = _answers(engine, [request], sampling, signal=SignalSpec("top", 1))[request.uid]
        cut = _answers(engine, [request], {**sampling, "loop_stop": [size, count]}, signal=SignalSpec("top", 1))[
            request.uid
        ]
        ids, whole = cut.signal.token_ids.tolist(), free.signal.token_ids.tolist()
        ends = [end for end in range(1, len(whole) + 1) if _loops(whole[:end], size, count)]
        assert ids == (whole[: ends[0]] if ends else whole)
        if ids[-1] not in engine.end_ids and len(ids) < 60:
            assert cut.finish_reason == "loop"
        seen.add(cut.finish_reason)
    assert seen >= {"loop", "stop"}


def _loops(ids: list[int], size: int, count: int) -> bool:
    return any(
        len(ids) >= width * count and ids[-width * count :] == ids[-width:] * count for width in range(1, size + 1)
    )


@pytest.mark.vllm
def test_new_requests_join_when_answers_come(engine: VllmEngine) -> None:
    """A source that has nothing to send until something is answered is asked again while the rest goes on."""
    requests = _requests(30)
    held, most, asked_in_vain = 0, 0, 0

    def source() -> Iterator[Request | None]:
        nonlocal held, most, asked_in_vain
        for place, request in enumerate(requests):
            while held and place % 7 in (3, 4):  # now and then everything must be answered first
                asked_in_vain += 1
                yield None
            held += 1
            most = max(most, held)
            yield request

    answered = []
    for request, completion in engine.generate(source(), GREEDY):
        held -= 1
        answered.append((request.uid, completion.text))
    assert dict(answered) == {uid: completion.text for uid, completion in _answers(engine, requests, GREEDY).items()}
    assert len(answered) == 30
    assert asked_in_vain > 0
    assert 1 < most <= IN_FLIGHT


@pytest.mark.vllm
def test_a_caller_that_leaves_early_leaves_a_clean_engine(engine: VllmEngine) -> None:
    """What is in flight is dropped, and the next run's answers are its own, also under the same uids."""
    unfinished = engine.engine.llm_engine.get_num_unfinished_requests
    stream = engine.generate(iter([_asked("Coins? " * (1 + seed), seed) for seed in range(IN_FLIGHT)]), GREEDY)
    next(stream)
    assert unfinished()
    stream.close()
    assert not unfinished()
    assert not engine.finished
    requests = _requests(IN_FLIGHT)
    again = [Request(uid=r.uid, prompt=r.prompt, sample_index=0, seed=0) for r in requests]
    assert _answers(engine, again, GREEDY) == _answers(engine, requests, GREEDY)


@pytest.mark.vllm
def test_samples_of_a_prompt_share_its_prefill(engine: VllmEngine) -> None:
    """Prefix caching is on: the second sample of a long prompt computes only the rest of its last block."""
    request = _asked("coins " * 250)
    parameters = sample_parameters(
        {**GREEDY, "max_completion_length": 1}, seed=0, limit=1, end_ids=engine.end_ids, signal=None
    )
    ids, _ = engine._prompt(request.prompt)
    cached = []
    for _ in range(2):
        name = engine._add(ids, parameters)
        while not (done := engine._step({name})):
            pass
        cached.append(done[0][1].num_cached_tokens)
    assert cached[0] < 128 <= cached[1] < len(ids)


@pytest.mark.vllm
def test_what_vllm_cannot_do_is_refused_in_one_line(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = _requests(1)
    with pytest.raises(UserError, match="--top-logprobs, or draw afterwards"):
        _answers(engine, requests, GREEDY, signal=SignalSpec("sampled", 4))
    with pytest.raises(UserError, match=rf"--top-logprobs 9999: .* only {engine.vocabulary} tokens"):
        _answers(engine, requests, GREEDY, signal=SignalSpec("top", 9999))
    with pytest.raises(UserError, match="refuses the sampling settings"):
        _answers(engine, requests, {**GREEDY, "loop_stop": [4, 1]})
    monkeypatch.setattr(engine, "wants", frozenset())
    monkeypatch.setattr(engine, "chunk", 8192)
    monkeypatch.setattr(engine, "vocabulary", SCORE_BYTES // 4)
    with pytest.raises(UserError, match="not started for a thinking budget"):
        _answers(engine, requests, {**GREEDY, "thinking_budget": 4})
    with pytest.raises(UserError, match=r"open it with wants=\('score',\)"):
        list(engine.score([("long", [5, 6], [7, 8])], SignalSpec("top", 1)))
    assert _answers(engine, requests, GREEDY)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("gpu_memory_utilisation=0.5", "did you mean 'gpu_memory_utilization'"),
        ("logprobs_mode=processed_logprobs", "always the model's own"),
        ("data-parallel-size=2", "give --data-parallel-size"),
        ("model=other", "give --teacher"),
        ("enforce_eager", "key=value"),
    ],
)
def test_engine_arguments_are_checked_before_vllm_is(argument: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        user_arguments([argument])
    assert "\n" not in str(caught.value)
    assert user_arguments(["max-model-len=64", "enforce_eager=true"]) == {"max_model_len": 64, "enforce_eager": True}


def test_the_engine_is_started_for_what_is_wanted(tokenizer: Any, teacher: Path) -> None:
    """Scoring bounds the block of (tokens, vocabulary); a budget needs reasoning tags of one token each."""

    def arguments(wants: tuple[str, ...], vocabulary: int = 0, in_flight: int = 256) -> dict[str, Any]:
        known = load_tokenizer(str(teacher)) if not vocabulary else _Vocabulary(vocabulary)
        return engine_arguments(on_cpu=True, in_flight=in_flight, wants=wants, tokenizer=known)

    assert not arguments(())["enable_chunked_prefill"]
    assert "reasoning_config" not in arguments(())
    assert arguments(("thinking_budget",))["reasoning_config"]["reasoning_end_str"] == END_OF_THOUGHT
    with pytest.raises(UserError, match="--thinking-budget needs a model with a token <think>"):
        engine_arguments(on_cpu=False, in_flight=1, wants=("thinking_budget",), tokenizer=tokenizer)
    for vocabulary in (300, 32_000, 151_936, 262_144, 1_000_000):
        score = arguments(("score",), vocabulary)
        block = 4 * vocabulary * score["max_num_batched_tokens"]
        assert block <= SCORE_BYTES or score["max_num_batched_tokens"] == 256
        assert score["enable_chunked_prefill"]
        assert score["max_num_seqs"] <= score["max_num_batched_tokens"]


class _Vocabulary:
    """A tokenizer of so many tokens."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


OUTCOMES = 8
weights = st.lists(st.integers(0, 3), min_size=OUTCOMES, max_size=OUTCOMES).filter(any)


@given(st.lists(weights, max_size=7), st.integers(1, OUTCOMES), st.randoms(use_true_random=False))
def test_vllms_flat_numbers_are_taken_apart(rows: list[list[int]], size: int, random: Any) -> None:
    """Whatever it reports, in whatever order it leaves ties: own tokens apart, outcomes sorted, impossible ones out."""
    with np.errstate(divide="ignore"):
        logprobs = [np.log(np.array(row) / sum(row)).astype(np.float32) for row in rows]
    own = [random.randrange(OUTCOMES) for _ in rows]
    reported = [
        [token, *sorted(range(OUTCOMES), key=lambda outcome, row=row: (-row[outcome], random.random()))[:size]]
        for token, row in zip(own, logprobs, strict=True)
    ]
    split, first = sorted(random.randrange(len(rows) + 1) for _ in range(2))[::-1]  # two parts; the prompt's rows
    parts = [
        SimpleNamespace(
            token_ids=[outcome for outcomes in reported[part] for outcome in outcomes],
            logprobs=[
                float(row[o]) for row, outcomes in zip(logprobs[part], reported[part], strict=True) for o in outcomes
            ],
        )
        for part in (slice(0, split), slice(split, None))
    ]
    signal = token_signal(own[first:], *parts, size=size)
    assert signal.token_ids.tolist() == own[first:]
    for place, row in enumerate(logprobs[first:]):
        possible = [each for each in np.lexsort((np.arange(OUTCOMES), -row)) if np.isfinite(row[each])][:size]
        kept = signal.ids[place][signal.ids[place] >= 0]
        assert len(set(kept)) == len(possible)
        np.testing.assert_array_equal(signal.logprobs[place][: len(kept)], row[possible])
        np.testing.assert_array_equal(row[kept], row[possible])
        assert signal.token_logprobs[place] == row[own[first + place]]
