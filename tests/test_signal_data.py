"""Stored numbers in training: those of the very tokens that are trained, in their order, or a counted refusal."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from distill.batch import Batch, collate
from distill.dataset import load_examples
from distill.errors import RunError, UserError
from distill.models import fingerprint
from distill.packing import pack
from distill.render import render
from distill.signal_data import SignalData, _without_padding
from distill.signals import SignalReader, SignalSpec, SignalWriter, TokenSignal

WIDTH = 300  # rows of a student's output embedding
ASK = {"role": "user", "content": "2+2?"}
TEXTS = ("<think>\ntwo and two\n</think>\n\n\\boxed{4}", "four", "<think>\nhm\n</think>\n\n\\boxed{5}")
TOP, SAMPLED = SignalSpec("top", 3), SignalSpec("sampled", 8)
BARE = SignalSpec("sampled", 8, logprobs=False)
# Opens the reasoning itself, as R1's does.
OPENING = (
    "{% for m in messages %}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)


def signal_of(tokens: list[int], spec: SignalSpec, seed: int = 0) -> TokenSignal:
    """A signal of these tokens: the token itself first, then `spec.size - 1` others or fewer, at random."""
    rng = np.random.default_rng([seed, *tokens])
    shape = (len(tokens), 3)
    others = (np.array(tokens)[:, None] + np.sort(rng.integers(1, 250, (len(tokens), 2)), axis=1)) % 259
    ids = np.concatenate([np.array(tokens)[:, None], others], 1)
    ids[others[:, 0] == others[:, 1], 2] = -1
    logprobs = np.broadcast_to(np.log(np.array([0.6, 0.2, 0.1], np.float32)), shape).copy()
    logprobs[ids < 0] = -np.inf
    counts = np.where(ids < 0, 0, np.array([5, 2, 1]))
    counts[:, 0] += spec.size - counts.sum(1)
    return TokenSignal(np.array(tokens), logprobs[:, 0], ids, logprobs, counts if spec.kind == "sampled" else None)


class Store:
    """A trace store's kept rows and the numbers of its traces."""

    def __init__(self, folder: Path, tokenizer: Any, spec: SignalSpec) -> None:
        self.folder, self.tokenizer, self.spec = folder, tokenizer, spec
        self.rows: list[dict] = []
        self.tokens: dict[str, list[int]] = {}
        folder.mkdir()

    def add(self, text: str, tokens: list[int] | None = None, **columns: Any) -> str:
        """Add a trace whose numbers speak of `tokens`; default: of its text's own, end token included."""
        uid = f"uid-{len(self.rows)}"
        messages = [{**ASK, "content": f"question {uid}?"}, {"role": "assistant", "content": text}]
        if tokens is None:
            example = render(self.tokenizer, messages)
            tokens = example.input_ids[example.begin :].tolist()
        self.rows.append({"uid": uid, "messages": messages, "finish_reason": "stop", **columns})
        self.tokens[uid] = tokens
        return uid

    def write(self, write_jsonl, *, tokenizer: str | None = None, without: tuple[str, ...] = ()) -> SignalData:
        """Write both and open the numbers."""
        write_jsonl(f"{self.folder.name}/kept.jsonl", self.rows)
        named = fingerprint(self.tokenizer) if tokenizer is None else tokenizer
        whose = {"vocab_size": 500, "teacher": "teacher@1", "tokenizer": named}
        with SignalWriter(self.folder / "signal", self.spec, **whose) as writer:
            for uid, tokens in self.tokens.items():
                if uid not in without:
                    writer.append(uid, signal_of(tokens, self.spec))
        return SignalData(self.folder / "signal", self.tokenizer, num_outcomes=WIDTH)


@pytest.fixture
def store(tmp_path, tokenizer):
    return Store(tmp_path / "store", tokenizer, TOP)


def assert_speaks_of(batch: Batch, data: SignalData, expected: list[tuple[str, int]]) -> None:
    """The batch's rows are those of (uid, place in its completion), in this order."""
    reader = SignalReader(data.folder)
    assert batch.signal is not None
    assert len(batch.signal.ids) == len(expected) == len(batch.trained().labels)
    for number, (uid, place) in enumerate(expected):
        there = reader[uid]
        width = there.ids.shape[1]
        assert batch.trained().labels[number] == there.token_ids[place]
        assert batch.signal.ids[number, :width].tolist() == there.ids[place].tolist()
        assert (batch.signal.ids[number, width:] == -1).all()
        for name in ("logprobs", "counts"):
            stored, given = getattr(there, name), getattr(batch.signal, name)
            assert (stored is None) == (given is None)
            if stored is not None:
                assert given[number, :width].tolist() == stored[place].tolist()
        if there.counts is None:
            assert batch.signal.tail[number] == there.tail[place]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("spec", [TOP, SAMPLED, BARE], ids=["top", "sampled", "bare"])
def test_each_trained_prediction_has_its_numbers_padded_or_packed(tmp_path, tokenizer, write_jsonl, spec, packed):
    store = Store(tmp_path / "store", tokenizer, spec)
    uids = [store.add(text) for text in TEXTS]
    data = store.write(write_jsonl)
    examples = load_examples(store.folder, tokenizer, signals=data).examples
    assert [example.uid for example in examples] == uids
    groups = pack(examples, 128)
    batch = collate(groups if packed else examples, pad_id=256, signals=data)
    order = [example for group in groups for example in group] if packed else examples
    everything = [(e.uid, place) for e in order for place in range(len(e) - e.begin)]
    assert_speaks_of(batch, data, everything)
    assert batch.signal.ids.dtype == torch.int64
    assert (batch.signal.tail is None) == (spec.kind == "sampled")


def test_tokens_without_weight_take_no_rows(store, tokenizer, write_jsonl):
    uids = [store.add(text) for text in TEXTS[:2]]
    data = store.write(write_jsonl)
    first, second = load_examples(store.folder, tokenizer, signals=data).examples
    weights = first.weights.copy()
    weights[first.begin + 1 : first.begin + 4] = 0
    batch = collate([second, replace(first, weights=weights)], pad_id=256, signals=data)
    kept = [place for place in range(len(first) - first.begin) if not 1 <= place < 4]
    expected = [(uids[1], place) for place in range(len(second) - second.begin)] + [(uids[0], p) for p in kept]
    assert_speaks_of(batch, data, expected)


def test_examples_and_numbers_are_cut_at_the_same_place(store, tokenizer, write_jsonl):
    uid = store.add("x" * 100)
    data = store.write(write_jsonl)
    dataset = load_examples(store.folder, tokenizer, signals=data, max_length=80, overlong="cut")
    assert dataset.cut == 1
    example = dataset.examples[0]
    expected = [(uid, place) for place in range(80 - example.begin)]
    assert_speaks_of(collate([example], pad_id=256, signals=data), data, expected)


def test_the_student_is_trained_on_the_tokens_that_were_sampled(tmp_path, make_tokenizer, write_jsonl):
    """A text may be split into other tokens than the tokenizer would: the numbers are those of the sampled ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "fo", "ur"]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [("f", "o"), ("u", "r")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = make_tokenizer().chat_template
    f, o, u, r, ur, end = tokenizer.convert_tokens_to_ids(["f", "o", "u", "r", "ur", "<|im_end|>"])
    assert len({f, o, u, r, ur, end}) == 6
    store = Store(tmp_path / "store", tokenizer, TOP)
    uid = store.add("four", [f, o, ur, end])
    data = store.write(write_jsonl)
    example = load_examples(store.folder, tokenizer, signals=data).examples[0]
    assert example.input_ids[example.begin :].tolist() == [f, o, ur, end]
    canonical = load_examples(store.folder, tokenizer).examples[0]
    assert canonical.input_ids[canonical.begin :].tolist() != [f, o, ur, end]
    assert_speaks_of(collate([example], pad_id=0, signals=data), data, [(uid, place) for place in range(4)])


def test_what_the_template_opened_is_no_part_of_the_numbers(tmp_path, make_tokenizer, write_jsonl):
    tokenizer = make_tokenizer(OPENING)
    store = Store(tmp_path / "store", tokenizer, TOP)
    store.add(TEXTS[0])
    data = store.write(write_jsonl)
    example = load_examples(store.folder, tokenizer, signals=data).examples[0]
    assert tokenizer.decode(example.input_ids[: example.begin]).endswith("<think>\n")
    assert tokenizer.decode(example.input_ids[example.begin :]).startswith("two and two")


def test_numbers_of_another_template_are_refused(store, tokenizer, make_tokenizer, write_jsonl):
    """The teacher's template opened the reasoning, the student's does not: nothing would teach it to open one."""
    opening = make_tokenizer(OPENING)
    answered = render(opening, [ASK, {"role": "assistant", "content": TEXTS[0]}])
    store.add(TEXTS[1])
    store.add(TEXTS[0], answered.input_ids[answered.begin :].tolist())
    data = store.write(write_jsonl)
    with pytest.raises(UserError, match=r"for 1 of 2 traces .*other tokens.*line 2.*chat template.*--unmatched drop"):
        load_examples(store.folder, tokenizer, signals=data)
    dataset = load_examples(store.folder, tokenizer, signals=data, unmatched="drop")
    assert ([example.uid for example in dataset.examples], dataset.unmatched) == (["uid-0"], 1)


@pytest.mark.parametrize(
    ("finish_reason", "written", "trained"),
    [
        ("stop", "four<|im_end|>", "four<|im_end|>"),
        ("stop", "four", None),  # it did stop: the token that it stopped by is missing
        ("stop", "four<|endoftext|>", None),  # no end to this student
        ("stop", "five<|im_end|>", None),
        ("stop", "fou<|im_end|>", None),
        ("length", "four", "four"),
        ("loop", "four", "four"),
        ("length", "four<|im_end|>", "four"),  # scored with an end that was not written
    ],
)
def test_tokens_must_be_those_of_the_text_and_end_as_it_ended(
    store, tokenizer, write_jsonl, finish_reason, written, trained
):
    uid = store.add("four", tokenizer.encode(written), finish_reason=finish_reason)
    data = store.write(write_jsonl)
    if trained is None:
        with pytest.raises(UserError, match="other tokens"):
            load_examples(store.folder, tokenizer, signals=data)
        return
    example = load_examples(store.folder, tokenizer, signals=data).examples[0]
    assert tokenizer.decode(example.input_ids[example.begin :]) == trained
    expected = [(uid, place) for place in range(len(tokenizer.encode(trained)))]
    assert_speaks_of(collate([example], pad_id=256, signals=data), data, expected)


def test_the_end_that_the_template_writes_ends_a_turn_beside_eos(tmp_path, make_tokenizer, write_jsonl):
    """A base model's eos is another token than its template's end of turn."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    store = Store(tmp_path / "store", tokenizer, TOP)
    store.add("four", tokenizer.encode("four<|im_end|>"))
    store.add("four", tokenizer.encode("four<|endoftext|>"))
    store.add("four")  # scored: rendered with both
    data = store.write(write_jsonl)
    examples = load_examples(store.folder, tokenizer, signals=data).examples
    ends = [tokenizer.decode(example.input_ids[example.begin :]) for example in examples]
    assert ends == ["four<|im_end|>", "four<|endoftext|>", "four<|im_end|><|endoftext|>"]


def test_traces_without_numbers_are_counted_and_refused_or_dropped(store, tokenizer, write_jsonl):
    for text in TEXTS:
        store.add(text)
    data = store.write(write_jsonl, without=("uid-1",))
    with pytest.raises(UserError, match=r"1 of 3 traces have no numbers .*line 2.*distill score.*--unmatched drop"):
        load_examples(store.folder, tokenizer, signals=data)
    dataset = load_examples(store.folder, tokenizer, signals=data, unmatched="drop")
    assert (len(dataset.examples), dataset.unmatched) == (2, 1)


def test_no_trace_with_numbers_is_refused_whatever_was_told(store, tokenizer, write_jsonl):
    store.add(TEXTS[0])
    data = store.write(write_jsonl, without=("uid-0",))
    with pytest.raises(UserError, match=r"1 of 1 traces have no numbers .*distill score$"):
        load_examples(store.folder, tokenizer, signals=data, unmatched="drop")


def test_numbers_of_the_trace_do_not_serve_the_answer_alone(store, tokenizer, write_jsonl):
    store.add(TEXTS[0])
    data = store.write(write_jsonl)
    with pytest.raises(UserError, match="--target answer"):
        load_examples(store.folder, tokenizer, signals=data, target="answer")


def test_rows_that_are_no_traces_are_refused(store, tokenizer, write_jsonl):
    store.add(TEXTS[0])
    data = store.write(write_jsonl)
    for row in ({"messages": store.rows[0]["messages"]}, {"uid": "uid-0", "prompt": "2+2=", "completion": "4"}):
        with pytest.raises(UserError, match="line 1: stored numbers belong to a store's traces"):
            load_examples(write_jsonl("rows.jsonl", [row]), tokenizer, signals=data)


def test_another_tokenizer_or_a_narrow_student_is_refused(store, tokenizer, write_jsonl):
    store.add(TEXTS[0])
    with pytest.raises(UserError, match=r"numbers of teacher@1, whose tokenizer is not the student's.*--align"):
        store.write(write_jsonl, tokenizer="another")
    (store.folder / "signal" / "records.bin").unlink()
    store.write(write_jsonl)
    with pytest.raises(UserError, match="200 output embeddings for a tokenizer of 259"):
        SignalData(store.folder / "signal", tokenizer, num_outcomes=200)


def test_outcomes_beyond_the_tokenizer_are_left_out(store, tokenizer, write_jsonl):
    """A padded output embedding of the teacher has rows that are no token: a distribution is one over tokens."""
    uid = store.add(TEXTS[1])
    data = store.write(write_jsonl)
    signal = signal_of(store.tokens[uid], TOP)
    ids = signal.ids.copy()
    ids[1, 0] = 290
    whose = {"vocab_size": 500, "teacher": "teacher@1", "tokenizer": fingerprint(tokenizer)}
    with SignalWriter(store.folder / "signal", TOP, **whose) as writer:
        writer.append(uid, TokenSignal(signal.token_ids, signal.token_logprobs, ids, signal.logprobs))
    data = SignalData(data.folder, tokenizer, num_outcomes=WIDTH)
    examples = load_examples(store.folder, tokenizer, signals=data).examples
    rows = collate(examples, pad_id=256, signals=data).signal
    stored = data.reader.gather([uid])
    assert rows.ids[1].tolist() == [*stored.ids[0, 1, 1:].tolist(), -1]
    lost = float(np.exp(stored.logprobs[0, 1, 0]))
    expected = np.exp(stored.logprobs[0, 1, 1:]) / (1 - lost)
    np.testing.assert_allclose(rows.logprobs[1, :-1].exp(), expected, rtol=1e-5)
    assert rows.logprobs[1, -1] == -np.inf
    total = rows.logprobs.exp().sum(-1) + rows.tail.exp()
    np.testing.assert_allclose(total, 1, atol=2e-3)
    others = torch.arange(len(rows.ids)) != 1
    assert rows.ids[others].tolist() == stored.ids[0][np.arange(len(stored.ids[0])) != 1][: others.sum()].tolist()


def test_draws_beyond_the_tokenizer_are_no_draws():
    ids, counts = np.array([[3, 290, 5], [291, 4, -1]]), np.array([[1, 7, 2], [4, 4, 0]])
    found = _without_padding(ids, None, counts, None, None, num_tokens=259)
    assert found[0].tolist() == [[3, 5, -1], [4, -1, -1]]
    assert found[2].tolist() == [[1, 2, 0], [4, 0, 0]]
    for logprobs in (None, np.full(ids.shape, -1.2, np.float32)):
        with pytest.raises(UserError, match="speak of nothing but ids beyond the 3 tokens"):
            _without_padding(ids, logprobs, counts, None, None, num_tokens=3)


def test_numbers_that_change_under_a_run_stop_it(store, tokenizer, write_jsonl):
    uid = store.add(TEXTS[1])
    data = store.write(write_jsonl)
    examples = load_examples(store.folder, tokenizer, signals=data).examples
    whose = {"vocab_size": 500, "teacher": "teacher@1", "tokenizer": fingerprint(tokenizer)}
    with SignalWriter(store.folder / "signal", TOP, **whose) as writer:
        writer.append(uid, signal_of([7] * len(store.tokens[uid]), TOP))
    assert data.rows(examples)  # what is open stays as it was
    with pytest.raises(RunError, match=r"the numbers of uid-0 .* changed"):
        pickle.loads(pickle.dumps(data)).rows(examples)


def test_a_loader_s_workers_read_for_themselves(store, tokenizer, write_jsonl):
    for text in TEXTS:
        store.add(text)
    data = store.write(write_jsonl)
    examples = load_examples(store.folder, tokenizer, signals=data).examples
    assert len(pickle.dumps(data)) < 2000  # what a spawned one is sent: the path, no numbers
    batches = DataLoader(examples, 2, collate_fn=_Collate(data), num_workers=1, multiprocessing_context="fork")
    for batch, chosen in zip(batches, (examples[:2], examples[2:]), strict=True):
        expected = [(e.uid, place) for e in chosen for place in range(len(e) - e.begin)]
        assert_speaks_of(Batch.from_tensors(batch), data, expected)


class _Collate:
    def __init__(self, data: SignalData) -> None:
        self.data = data

    def __call__(self, examples: list) -> dict[str, torch.Tensor]:
        return collate(examples, pad_id=256, signals=self.data).tensors()
