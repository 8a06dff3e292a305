"""A text in two models' tokens: each its own prompt, the answer's bytes shared, and what cannot be shared left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHATML, byte_tokenizer, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_shelf import SMALL, small_tokenizer, texts
from two_tokenizers import OTHER_TEMPLATE, aligned, answers, merged, permuted, rows

from align import METHODS, open_alignment, open_training
from align.byte_view import tokenise
from align.pairing import Side, pair, side, teacher_prompt
from align.specials import stop_ids
from distill.batch import Batch, collate
from distill.dataset import load_examples
from distill.errors import RunError, UserError
from distill.models import fingerprint
from distill.render import Example, Other, render, render_plain
from distill.signal_data import SignalData
from distill.signals import SignalSpec, SignalWriter, TokenSignal
from distill.span_states import span_states

OPENING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
ASK = {"role": "user", "content": "2+2?"}


def sides(student: Any, teacher: Any) -> tuple[Side, Side]:
    own, theirs = (side(tokenizer, stop_ids(tokenizer)) for tokenizer in (student, teacher))
    return own, theirs


def both_texts(own: Side, theirs: Side, example: Example, other: Other) -> list[tuple[bytes, bytes]]:
    """The bytes of each span on both sides."""

    def text(one: Side, ids: np.ndarray) -> bytes:
        return b"".join(one.view.tokens[token] or b"" for token in ids.tolist())

    return [
        (text(own, example.input_ids[begin:end]), text(theirs, other.input_ids[teacher_begin:teacher_end]))
        for begin, end, teacher_begin, teacher_end in other.spans.tolist()
    ]


def paired(student: Any, teacher: Any, answer: str) -> tuple[Example, Other | None, Side, Side]:
    own, theirs = sides(student, teacher)
    messages = [ASK, {"role": "assistant", "content": answer}]
    example = render(student, messages)
    return example, pair(own, theirs, example, teacher_prompt(theirs, messages)), own, theirs


def test_each_side_has_its_own_prompt_and_end():
    theirs = merged(OTHER_TEMPLATE)
    example, other, own, teacher = paired(byte_tokenizer(), theirs, "four, né")
    assert other is not None
    assert theirs.decode(other.input_ids[: other.begin]) == "<|im_start|>Be brief.\n[user] 2+2?<|im_end|>[assistant] "
    spans = both_texts(own, teacher, example, other)
    assert b"".join(text for text, _ in spans) == "four, né".encode()
    assert all(left == right for left, right in spans)
    assert len(spans[-1][0]) == 0  # the stop tokens, which stand for no text
    assert other.spans[-1].tolist() == [len(example) - 1, len(example), len(other.input_ids) - 1, len(other.input_ids)]
    assert other.spans[0, 0] == example.begin
    assert other.spans[0, 2] == other.begin


@settings(max_examples=40)
@given(st.sampled_from(sorted(SMALL)), st.sampled_from(sorted(SMALL)), texts(without="<"))
def test_spans_are_the_same_bytes_in_order_for_any_two_tokenizers(student, teacher, text):
    own, theirs = sides(small_tokenizer(student), small_tokenizer(teacher))
    example = render_plain(own.tokenizer, "2+2?", text)
    other = pair(own, theirs, example, teacher_prompt(theirs, ("2+2?", text)))
    written = own.written(example.input_ids[example.begin :].tolist())
    if other is None:
        continued = b"".join(written.pieces).decode(errors="surrogateescape")
        assert (not continued and not written.ended) or (
            "\ufffd" in continued or tokenise(theirs.tokenizer, theirs.view, continued, continued=True) is None
        )
        return
    spans = both_texts(own, theirs, example, other)
    assert all(left == right for left, right in spans)
    assert (other.spans[1:, [0, 2]] >= other.spans[:-1, [1, 3]]).all()
    whole = b"".join(written.pieces)
    covered = b"".join(left for left, _ in spans)
    lone = re.findall("[\udc80-\udcff]", whole.decode(errors="surrogateescape"))
    if all(ord(byte) - 0xDC00 in theirs.single for byte in lone):
        assert covered == whole
        assert (other.spans[-1, 1] == len(example)) == written.ended
    else:
        assert whole.startswith(covered)


def test_reasoning_that_one_template_opens_is_aligned_from_there():
    answer = "<think>\nhm\n</think>\n\n4"
    for student, teacher in ((CHATML, OPENING), (OPENING, CHATML)):
        own = byte_tokenizer(student)
        example, other, one, two = paired(own, merged(teacher), answer)
        assert other is not None
        text = b"".join(left for left, _ in both_texts(one, two, example, other))
        assert answer.encode().endswith(text)
        assert text.startswith(b"hm")
        read = merged(teacher).decode(other.input_ids)
        assert read.count("<think>\n") == 1


def test_what_a_tokenizer_changes_is_not_aligned():
    theirs = small_tokenizer("byte-level, NFC")
    own = small_tokenizer("byte-level")
    for text, kept in (("cafe\u0301", False), ("café", True)):
        example = render_plain(own, "", text)
        assert (pair(*sides(own, theirs), example, [1]) is not None) == kept


def test_a_special_token_in_the_middle_ends_what_is_aligned():
    own, theirs = sides(byte_tokenizer(), merged())
    ids = [*own.tokenizer.encode("so 12"), 257, *own.tokenizer.encode("34"), 258]
    example = Example(np.array([1, *ids], np.int32), np.array([0.0] + [1.0] * len(ids), np.float32), begin=1)
    other = pair(own, theirs, example, [0])
    assert other is not None
    assert b"".join(left for left, _ in both_texts(own, theirs, example, other)) == b"so 12"
    assert other.spans[-1, 1] == 6
    with_partner = pair(own, theirs, example, [0], specials={257: 1})
    assert with_partner is not None
    assert with_partner.spans[:-1].tolist() == other.spans.tolist()
    assert with_partner.spans[-1].tolist() == [6, 7, len(other.input_ids), len(other.input_ids) + 1]
    assert with_partner.input_ids[-1] == 1


def test_the_spelling_of_a_special_token_is_text_to_the_teacher():
    own, theirs = sides(byte_tokenizer(), merged())
    ids = [own.single[byte] for byte in b"<|im_end|> is text"]
    example = Example(np.array([1, *ids], np.int32), np.array([0.0] + [1.0] * len(ids), np.float32), begin=1)
    other = pair(own, theirs, example, [0])
    assert other is not None
    assert not set(other.input_ids[1:].tolist()) & theirs.stops


@pytest.mark.parametrize("broken", ["né".encode()[:-1], b"a\xffb", "數".encode()[:2] + b" 1"])
def test_bytes_that_are_no_character_are_single_bytes_to_the_teacher(broken):
    own, theirs = sides(byte_tokenizer(), merged())
    ids = [own.single[byte] for byte in broken]
    example = Example(np.array([1, *ids], np.int32), np.array([0.0] + [1.0] * len(ids), np.float32), begin=1)
    other = pair(own, theirs, example, [0])
    assert other is not None
    assert b"".join(right for _, right in both_texts(own, theirs, example, other)) == broken
    lacking = Side(theirs.tokenizer, theirs.view, theirs.stops, theirs.closing, {})
    cut = pair(own, lacking, example, [0])
    whole = broken.decode(errors="ignore") if broken[:1] != "數".encode()[:1] else ""
    assert (cut is None) == (whole[:1] == "")


def test_a_cut_example_keeps_the_spans_before_the_cut(tmp_path):
    (tmp_path / "data.jsonl").write_text(rows(answers(3)), encoding="utf-8")
    alignment = aligned("auto", byte_tokenizer(), merged(OTHER_TEMPLATE))
    load = {"alignment": alignment, "max_length": 60, "overlong": "cut"}
    dataset = load_examples(tmp_path / "data.jsonl", byte_tokenizer(), **load)
    assert dataset.cut == 3
    for example in dataset.examples:
        assert len(example) == 60
        assert 55 <= example.other.spans[-1, 1] <= 60
        assert len(example.other.input_ids) == example.other.spans[-1, 3]
    with pytest.raises(UserError, match=r"3 of 3 sequences are longer than 30 tokens"):
        load_examples(tmp_path / "data.jsonl", byte_tokenizer(), alignment=alignment, teacher_length=30)


def test_rows_that_the_teacher_would_change_are_counted_and_refused_or_left_out(tmp_path):
    talks = [*answers(2), [ASK, {"role": "assistant", "content": "cafe\u0301"}]]
    (tmp_path / "data.jsonl").write_text(rows(talks), encoding="utf-8")
    teacher = small_tokenizer("byte-level, NFC")
    teacher.chat_template = CHATML
    alignment = aligned("cspc", byte_tokenizer(), teacher)
    with pytest.raises(UserError, match=r"for 1 of 3 rows the teacher's tokenizer.*line 3.*--unmatched drop"):
        load_examples(tmp_path / "data.jsonl", byte_tokenizer(), alignment=alignment)
    dataset = load_examples(tmp_path / "data.jsonl", byte_tokenizer(), alignment=alignment, unmatched="drop")
    assert (len(dataset.examples), dataset.unaligned) == (2, 1)


def test_a_batch_travels_as_tensors(tmp_path):
    (tmp_path / "data.jsonl").write_text(rows(answers(3)), encoding="utf-8")
    alignment = aligned("auto", byte_tokenizer(), merged())
    batch = collate(load_examples(tmp_path / "data.jsonl", byte_tokenizer(), alignment=alignment).examples, pad_id=0)
    again = Batch.from_tensors(batch.tensors()).to(torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(again.other, batch.other, strict=True))
    assert batch.other.spans[:, 0].tolist() == sorted(batch.other.spans[:, 0].tolist())


def test_spans_of_one_token_are_the_states_of_tokens(tmp_path):
    from distill.forward import Capture, read_head, run

    (tmp_path / "data.jsonl").write_text(rows(answers(3)), encoding="utf-8")
    alignment = aligned("shared_kl", byte_tokenizer(), permuted(byte_tokenizer())[0])
    batch = collate(load_examples(tmp_path / "data.jsonl", byte_tokenizer(), alignment=alignment).examples, pad_id=0)
    model = tiny_model()
    passed = run(model, read_head(model, "student"), batch, Capture(frozenset({1})))
    pooled, _, spans = span_states(passed, passed, batch)
    here, there = batch.trained(), spans.trained()
    assert torch.equal(pooled.layers[1][:, :-1][there.rows], passed.layers[1][:, :-1][here.rows])
    assert torch.equal(there.weights, here.weights)


# -- stored numbers


class Scored:
    """Traces with the whole distribution of a teacher of longer tokens, stored as its likeliest tokens."""

    def __init__(self, folder: Path, spec: SignalSpec | None = None) -> None:
        self.folder, self.tokenizer = folder, merged(OTHER_TEMPLATE)
        self.model = tiny_model(seed=9, hidden_size=48, vocab_size=len(self.tokenizer)).eval()
        self.spec = spec or SignalSpec("top", len(self.tokenizer), resolution=1024)
        folder.mkdir()
        whose = {"teacher": "theirs@1", "tokenizer": fingerprint(self.tokenizer), "vocab_size": len(self.tokenizer)}
        lines = []
        with SignalWriter(folder / "signal", self.spec, **whose) as writer:
            for number, messages in enumerate(answers(4)):
                lines.append({"uid": f"uid-{number}", "messages": messages, "finish_reason": "stop"})
                writer.append(f"uid-{number}", self.signal(messages))
        (folder / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    @torch.no_grad()
    def signal(self, messages: list[dict[str, str]]) -> TokenSignal:
        example = render(self.tokenizer, messages)
        ids = torch.tensor(example.input_ids, dtype=torch.int64)
        logp = self.model(input_ids=ids[None]).logits[0].log_softmax(-1)[example.begin - 1 : -1]
        tokens = ids[example.begin :]
        best = logp.sort(dim=-1, descending=True, stable=True)
        own = logp.gather(-1, tokens[:, None])[:, 0]
        size = self.spec.size
        return TokenSignal(tokens.numpy(), own.numpy(), best.indices[:, :size].numpy(), best.values[:, :size].numpy())


# The others need whole distributions, or are for the student's own text, which nobody has stored.
STORED = [name for name, method in METHODS.items() if method.needs != "logits" and method.kind != "advantages"]


@pytest.mark.parametrize("method", STORED)
def test_stored_numbers_of_all_tokens_say_what_a_running_teacher_says(tmp_path, method):
    """Of xtoken the loss that both can take."""
    scored, own = Scored(tmp_path / "store"), byte_tokenizer()
    alignment = aligned(method, own, scored.tokenizer)
    signals = SignalData(scored.folder / "signal", own, num_outcomes=259, teacher_tokenizer=alignment.teacher_tokenizer)
    losses = []
    for numbers in (None, signals):
        load = {"alignment": alignment, "signals": numbers}
        examples = load_examples(scored.folder, own, **load).examples
        batch = collate(examples, pad_id=0, signals=numbers)
        losses.append(_loss(alignment, batch, scored.model if numbers is None else None))
        if numbers is not None:
            assert batch.other.begins.tolist() == [0] * 4
            assert len(batch.signal.ids) == int((batch.other.spans[:, 4] - batch.other.spans[:, 3]).sum())
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def _loss(alignment: Any, batch: Batch, teacher: Any) -> float:
    from distill.forward import read_head, run

    mode, student = alignment.modes["soft_logits"], tiny_model(seed=0)
    options = {"loss": "p_kl"} if alignment.name == "xtoken" else {}
    with torch.no_grad():
        own = run(student, read_head(student, "student"), batch)
        theirs = None if teacher is None else run(teacher, read_head(teacher, "teacher"), batch.other.batch())
        output = mode.fn(own, theirs, batch, inner=mode.inner(student, teacher, **options), **options)
    return float(output.total / output.weight)


def test_numbers_of_another_tokenizer_refuse_to_train(tmp_path):
    scored, own = Scored(tmp_path / "store"), byte_tokenizer()
    with pytest.raises(UserError, match=r"numbers of theirs@1, made with another tokenizer.*--teacher-tokenizer"):
        SignalData(scored.folder / "signal", own, num_outcomes=259, teacher_tokenizer=own)
    with pytest.raises(UserError, match=r"numbers of theirs@1, whose tokenizer is not the student's.*--align"):
        SignalData(scored.folder / "signal", own, num_outcomes=259)


def test_numbers_of_another_text_are_counted(tmp_path):
    scored, own = Scored(tmp_path / "store"), byte_tokenizer()
    lines = [json.loads(line) for line in (scored.folder / "kept.jsonl").read_text().splitlines()]
    lines[2]["messages"][-1]["content"] += " indeed"
    (scored.folder / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    alignment = aligned("auto", own, scored.tokenizer)
    signals = SignalData(scored.folder / "signal", own, num_outcomes=259, teacher_tokenizer=scored.tokenizer)
    load = {"alignment": alignment, "signals": signals}
    with pytest.raises(UserError, match=r"for 1 of 4 traces the numbers.*line 3"):
        load_examples(scored.folder, own, **load)
    dataset = load_examples(scored.folder, own, unmatched="drop", **load)
    assert (len(dataset.examples), dataset.unmatched) == (3, 1)
    whole = Scored(tmp_path / "again")
    example = load_examples(whole.folder, own, alignment=alignment, signals=signals, unmatched="drop").examples[0]
    turned = Other(example.other.input_ids[::-1].copy(), 0, example.other.spans)
    with pytest.raises(RunError, match="changed while they were being learnt"):
        signals.rows([Example(example.input_ids, example.weights, example.begin, example.uid, turned)])


# -- which method


def test_auto_takes_what_the_teacher_can_say():
    own, theirs = byte_tokenizer(), merged()
    for tokenizer, teaching, expected in (
        (own, "logits", "identity"),
        (permuted(own)[0], "logits", "shared_kl"),
        (theirs, "logits", "cspc"),
        (theirs, SignalSpec("top", 64), "cspc"),
        (theirs, SignalSpec("top", 5), "cspc"),
        (theirs, SignalSpec("sampled", 64), "alm"),
    ):
        name, comparison = open_alignment("auto", own, tokenizer, teaching=teaching)
        assert name == expected
        assert comparison.why
        assert "\n" not in comparison.why
    assert open_training("auto", own, byte_tokenizer()) is None


@pytest.mark.parametrize(
    ("name", "spec", "said"),
    [
        ("gold", SignalSpec("top", 64), "needs a teacher that runs"),
        ("cspc", SignalSpec("sampled", 64), "random draws were stored"),
        ("alm", SignalSpec("sampled", 64, logprobs=False), "only counts of draws were stored"),
        ("csp", SignalSpec("top", 64), "did you mean 'cspc'"),
    ],
)
def test_a_method_that_needs_more_than_there_is_is_refused(name, spec, said):
    with pytest.raises(UserError, match=said):
        open_alignment(name, byte_tokenizer(), merged(), teaching=spec)
