"""What a teacher says about its tokens: captured as it writes, or scored afterwards, it is what a plain forward says.

The reference is one unbatched forward pass over prompt and completion and `log_softmax`; draws are tested against the
distribution they come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from distill.errors import UserError
from distill.records import Completion, Prompt
from distill.signals import SignalSpec, TokenSignal
from teachers import backend_class, nano
from teachers.backend import Request
from teachers.engines.outcomes import draw, keep, most_likely
from teachers.engines.transformers_engine import BLOCK_BYTES, TransformersEngine

GREEDY = {"temperature": 0.0, "top_p": 1.0, "max_completion_length": 40}
HOT = {"temperature": 1.7, "top_p": 0.9, "max_completion_length": 24}
TOP, SAMPLED = SignalSpec("top", 6), SignalSpec("sampled", 20)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, make_model: Any) -> str:
    """An untrained model, unsure of everything; its logits are soft-capped and its head is tied."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer.save_pretrained(folder)
    make_model("gemma2", max_position_embeddings=160, final_logit_softcapping=3.0).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["untrained", "nano"])
def engine(request: pytest.FixtureRequest, teacher: str) -> TransformersEngine:
    return TransformersEngine(teacher if request.param == "untrained" else str(nano.model_path()), concurrency=5)


@pytest.fixture(scope="module")
def unsure(teacher: str) -> TransformersEngine:
    return TransformersEngine(teacher, concurrency=5)


def requests(count: int) -> list[Request]:
    """Prompts of different lengths."""
    prompts = [Prompt(messages=({"role": "user", "content": "Why? " * (1 + 2 * n)},)) for n in range(count)]
    return [Request(uid=f"uid-{n}", prompt=prompt, sample_index=0, seed=n) for n, prompt in enumerate(prompts)]


def capture(
    engine: Any, count: int, sampling: Mapping[str, Any], spec: SignalSpec | None
) -> dict[str, tuple[Request, Completion]]:
    return {r.uid: (r, c) for r, c in engine.generate(iter(requests(count)), sampling, signal=spec)}


def prompt_ids(engine: Any, request: Request) -> list[int]:
    text = engine.tokenizer.apply_chat_template(
        list(request.prompt.messages), add_generation_prompt=True, tokenize=False
    )
    return list(engine.tokenizer(text, add_special_tokens=False)["input_ids"])


def reference(engine: Any, prompt: list[int], completion: list[int]) -> np.ndarray:
    """Return log-probabilities (T, V) at the completion's positions, by the plain model."""
    with torch.inference_mode():
        logits = engine.model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].numpy()


def check(signal: TokenSignal, truth: np.ndarray, spec: SignalSpec) -> None:
    """Compare a signal with the whole truth (T, V)."""
    rows = np.arange(len(truth))
    np.testing.assert_allclose(signal.token_logprobs, truth[rows, signal.token_ids], atol=1e-4)
    kept = signal.ids >= 0
    listed = np.where(kept, np.take_along_axis(truth, np.maximum(signal.ids, 0), -1), -np.inf)
    np.testing.assert_allclose(signal.logprobs[kept], listed[kept], atol=1e-4)
    if spec.kind == "top":
        np.testing.assert_allclose(signal.logprobs, -np.sort(-truth, -1)[:, : spec.size], atol=1e-4)
        assert signal.counts is None
    else:
        assert signal.counts is not None
        assert (signal.counts.sum(-1) == spec.size).all()


@pytest.mark.parametrize("spec", [TOP, SAMPLED], ids=["top", "sampled"])
@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "hot"])
def test_what_is_captured_is_what_a_plain_forward_says(
    engine: TransformersEngine, sampling: dict[str, Any], spec: SignalSpec
) -> None:
    """At temperature 1 before top-p, whatever the sampling, for every token and the end token; and `score` agrees."""
    answers = capture(engine, 7, sampling, spec)
    assert len(answers) == 7
    items, signals = [], {}
    for uid, (request, completion) in answers.items():
        signal = completion.signal
        assert len(signal) == completion.num_completion_tokens
        assert (signal.token_ids[-1] in engine.end_ids) == (completion.finish_reason == "stop")
        assert not np.isin(signal.token_ids[:-1], engine.end_ids).any()
        prompt, ids = prompt_ids(engine, request), signal.token_ids.tolist()
        assert len(prompt) == completion.num_prompt_tokens
        text = engine.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert text in completion.text
        check(signal, reference(engine, prompt, ids), spec)
        items.append((uid, prompt, ids))
        signals[uid] = signal
    for uid, scored in engine.score(iter(items), spec):
        captured = signals.pop(uid)
        assert np.array_equal(scored.token_ids, captured.token_ids)
        np.testing.assert_allclose(scored.token_logprobs, captured.token_logprobs, atol=1e-4)
        if spec.kind == "sampled":  # the same numbers were drawn, one by one then and all at once now
            assert scored.counts is not None
            width = min(scored.ids.shape[1], captured.ids.shape[1])
            assert (scored.ids[:, :width] == captured.ids[:, :width]).mean() > 0.98
    assert not signals


def test_capturing_changes_no_sample(engine: TransformersEngine) -> None:
    for sampling in (GREEDY, HOT):
        plain = capture(engine, 6, sampling, None)
        assert all(completion.signal is None for _, completion in plain.values())
        for spec in (TOP, SAMPLED):
            captured = capture(engine, 6, sampling, spec)
            assert {u: c.text for u, (_, c) in captured.items()} == {u: c.text for u, (_, c) in plain.items()}


def test_a_signal_does_not_depend_on_its_neighbours(unsure: TransformersEngine) -> None:
    """Draws too: alone, in a batch of another order, and in pieces (a full context splits a batch's work)."""
    sampling = {**HOT, "max_completion_length": None}
    together = {u: c.signal for u, (_, c) in capture(unsure, 5, sampling, SAMPLED).items()}
    lengths = {len(signal) for signal in together.values()}
    assert len(lengths) > 1
    for request in reversed(requests(5)):
        ((_, completion),) = unsure.generate([request], sampling, signal=SAMPLED)
        alone, batched = completion.signal, together[request.uid]
        assert np.array_equal(alone.token_ids, batched.token_ids)
        np.testing.assert_allclose(alone.token_logprobs, batched.token_logprobs, atol=1e-4)
        assert alone.ids.shape == batched.ids.shape
        assert (alone.ids == batched.ids).mean() > 0.98


def test_nothing_to_send_now_runs_what_there_is(unsure: TransformersEngine) -> None:
    """A None closes the batch: what is held is answered before the feed is asked again."""
    given, answered, held = requests(9), 0, []

    def feed() -> Iterator[Request | None]:
        for number, request in enumerate(given):
            yield request
            if number in (1, 2, 6):
                held.append(number + 1 - answered)
                yield None
                assert answered == number + 1

    for _ in unsure.generate(feed(), {**GREEDY, "max_completion_length": 3}):
        answered += 1
    assert answered == 9
    assert held == [2, 1, 4]


def test_it_says_what_it_provides() -> None:
    assert backend_class("transformers").provides >= {"text", "top_logprobs", "sample_logprobs", "score"}


def test_the_most_likely_with_ties_and_holes() -> None:
    """Equal log-probabilities by id, at the cut too; outcomes of probability 0 are none; K may exceed V."""
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.integers(0, 4, (200, 30)), dtype=torch.float32)  # ties everywhere
    logits[:, 7] = -torch.inf
    logits[150:, 5:] = -torch.inf
    logprobs = torch.log_softmax(logits, -1)
    for count in (1, 3, 29, 30, 50):
        found = keep(logits, torch.zeros(200, dtype=torch.long), SignalSpec("top", count), None)
        order = np.lexsort((np.broadcast_to(np.arange(30), (200, 30)), -logprobs.numpy()), axis=-1)[:, :count]
        values = np.take_along_axis(logprobs.numpy(), order, -1)
        assert np.array_equal(found.logprobs, values)
        assert np.array_equal(found.ids, np.where(np.isneginf(values), -1, order))
        found.rows(slice(0, 150)).signal()
    ids, _ = most_likely(torch.zeros(1, 9), 4)
    assert ids.tolist() == [[0, 1, 2, 3]]


def test_draws_come_from_the_distribution() -> None:
    """Pearson's chi-square of 400 000 draws against the closed form; rows apart; nothing of probability 0."""
    logits = torch.tensor([[2.0, 1.0, -torch.inf, 0.0, -4.0, 1.5], [0.0, -torch.inf, 3.0, 3.0, 0.0, -torch.inf]])
    logprobs, draws = torch.log_softmax(logits, -1), 200_000
    uniforms = torch.from_numpy(np.random.default_rng(5).random((2, draws)))
    ids, kept, counts = draw(logprobs, uniforms)
    for row in range(2):
        found = np.zeros(6)
        there = counts[row] > 0
        found[ids[row][there]] = counts[row][there]
        expected = draws * logprobs[row].double().exp().numpy()
        assert (found[expected == 0] == 0).all()
        inside = expected > 0
        statistic = float(((found - expected)[inside] ** 2 / expected[inside]).sum())
        assert statistic < {4: 23.5, 3: 21.1}[int(inside.sum()) - 1]  # the 99.99 % points of chi-square
        np.testing.assert_allclose(kept[row][there], logprobs[row][ids[row][there]])
        assert kept[row][~there].isneginf().all()
    edges = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64).expand(2, 2)
    ids, _, counts = draw(logprobs, edges)
    assert ids[counts > 0].reshape(2, 2).sort().values.tolist() == [[0, 5], [0, 4]]


def test_counts_estimate_the_model_without_bias(unsure: TransformersEngine) -> None:
    """Over many traces of one text, counts / N average to the model's own distribution: what random sampling is for."""
    prompt, completion, spec, times = [1, 2, 3], [40, 50], SignalSpec("sampled", 50), 400
    truth = np.exp(reference(unsure, prompt, completion))
    items = [(f"copy-{n}", prompt, completion) for n in range(times)]
    total = np.zeros_like(truth)
    for _, signal in unsure.score(items, spec):
        assert signal.counts is not None
        for row in range(2):
            kept = signal.ids[row] >= 0
            total[row, signal.ids[row][kept]] += signal.counts[row][kept]
    expected = truth * times * spec.size
    statistic = ((total - expected) ** 2 / expected).sum(-1)
    degrees = truth.shape[1] - 1
    assert (np.abs(statistic - degrees) < 4.5 * math.sqrt(2 * degrees)).all()


def test_scoring_sorts_but_yields_promptly(unsure: TransformersEngine) -> None:
    """Items are pulled a window at a time, everything comes once, and the first answers before the feed is empty."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 200).tolist()
    items = {
        f"uid-{n}": (rng.integers(0, 256, 4).tolist(), rng.integers(0, 256, length).tolist())
        for n, length in enumerate(lengths)
    }
    pulled = 0

    def feed() -> Iterator[tuple[str, list[int], list[int]]]:
        nonlocal pulled
        for uid, (prompt, completion) in items.items():
            pulled += 1
            yield uid, prompt, completion

    seen = set()
    for uid, signal in unsure.score(feed(), TOP):
        assert pulled - len(seen) <= 8 * unsure.batch_size
        seen.add(uid)
        assert signal.token_ids.tolist() == items[uid][1]
        if len(seen) % 40 == 1:
            check(signal, reference(unsure, *items[uid]), TOP)
    assert len(seen) == pulled == 200


@pytest.mark.parametrize("item", [("uid", [], [1]), ("uid", [1], []), ("uid", [1] * 150, [2] * 11)])
def test_what_cannot_be_scored_is_refused(unsure: TransformersEngine, item: tuple[str, list[int], list[int]]) -> None:
    """Nothing predicts a first token without a prompt, and nothing is cut."""
    with pytest.raises(ValueError, match=r"uid cannot be scored: .* context 160"):
        list(unsure.score([item], TOP))
    assert len(list(unsure.score([("uid", [1] * 150, [2] * 10)], TOP))) == 1


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() * t.element_size() for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return result


@pytest.mark.parametrize("spec", [TOP, SAMPLED], ids=["top", "sampled"])
def test_scoring_never_holds_tokens_times_vocabulary(
    unsure: TransformersEngine, spec: SignalSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks of 16 KiB, no tensor is above what the blocks, the hidden states or the weights take."""
    block = 16 * 1024
    monkeypatch.setattr("teachers.engines.transformers_engine.BLOCK_BYTES", block)
    items = [("uid", [1, 2], [int(i) for i in np.random.default_rng(0).integers(0, 256, 150)])]
    full = 150 * 259 * 4
    weights = max(p.numel() * 4 for p in unsure.model.parameters())
    states = 152 * max(152 * 4, 64) * 4  # attention scores of four heads, the MLP's inner states
    list(unsure.score(items, spec))
    with LargestTensor() as largest:
        ((_, blocked),) = unsure.score(items, spec)
    attention = largest.bytes
    assert attention <= max(block, weights, states)
    with LargestTensor() as head:
        hidden = torch.zeros(150, 32)
        assert unsure.head is not None
        with torch.inference_mode():
            unsure._read(("uid", *items[0][1:]), torch.cat([hidden, hidden[:2]]), unsure.head, spec)
    assert head.bytes <= max(block, weights) < full
    monkeypatch.undo()
    ((_, whole),) = unsure.score(items, spec)
    assert full <= BLOCK_BYTES
    assert np.array_equal(blocked.ids, whole.ids)
    np.testing.assert_allclose(blocked.token_logprobs, whole.token_logprobs, atol=1e-5)


def test_a_model_with_an_unknown_head_is_refused(
    tmp_path: Path, tokenizer: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save_pretrained(tmp_path)
    make_model().save_pretrained(tmp_path)
    engine = TransformersEngine(str(tmp_path))
    assert list(engine.score([("uid", [1], [2])], TOP))
    engine.head = None
    plain = engine.model.forward

    def odd(*args: Any, logits_to_keep: int = 0, **options: Any) -> Any:
        output = plain(*args, **options)
        output.logits = output.logits.sinh() * 3
        return output

    monkeypatch.setattr(type(engine.model), "forward", lambda self, *args, **options: odd(*args, **options))
    with pytest.raises(UserError, match="transforms its logits"):
        list(engine.score([("uid", [1], [2])], TOP))
