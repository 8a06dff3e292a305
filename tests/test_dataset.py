"""Rows on disk to examples: every accepted shape, every refusal by line, and nothing left out without a count."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distill.dataset import load_examples
from distill.errors import UserError


def rows(count: int) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{n}+{n}?"},
                {"role": "assistant", "content": f"<think>\ntwice {n}\n</think>\n\n\\boxed{{{n + n}}}"},
            ]
        }
        for n in range(count)
    ]


def test_all_accepted_shapes_of_a_row_give_the_same_tokens(tokenizer, write_jsonl, tmp_path):
    ask, answer = rows(1)[0]["messages"]
    shapes = [
        {"messages": [ask, answer]},
        {"prompt": [ask], "completion": [answer]},
        {"prompt": [ask], "completion": answer["content"]},
        {"prompt": ask["content"], "completion": [answer]},
        {"messages": [ask], "completion": answer["content"]},  # a line of traces.jsonl
    ]
    dataset = load_examples(write_jsonl("shapes.jsonl", shapes), tokenizer)
    assert all(np.array_equal(e.input_ids, dataset.examples[0].input_ids) for e in dataset.examples)
    plain = load_examples(write_jsonl("plain.jsonl", [{"prompt": "2+2=", "completion": "4"}]), tokenizer).examples[0]
    assert tokenizer.decode(plain.input_ids) == "2+2=4<|im_end|>"
    store = tmp_path / "store"
    store.mkdir()
    (store / "kept.jsonl").write_text(json.dumps(shapes[0]) + "\n")
    assert len(load_examples(store, tokenizer).examples) == 1


def test_answer_targets_train_the_answer_alone(tokenizer, write_jsonl):
    path = write_jsonl("data.jsonl", rows(3))
    for example in load_examples(path, tokenizer, target="answer").examples:
        assert tokenizer.decode(example.input_ids[example.weights > 0]).startswith("\\boxed{")


@pytest.mark.parametrize("finish_reason", ["length", "loop"])
def test_a_trace_that_was_cut_off_is_not_taught_to_stop(tokenizer, write_jsonl, finish_reason):
    path = write_jsonl("data.jsonl", [{**rows(1)[0], "finish_reason": finish_reason}])
    trained = {}
    for target in ("trace", "answer"):
        example = load_examples(path, tokenizer, target=target).examples[0]
        trained[target] = tokenizer.decode(example.input_ids[example.weights > 0])
    assert trained["trace"] == rows(1)[0]["messages"][1]["content"]
    assert trained["answer"] == "\\boxed{0}<|im_end|>"


@pytest.fixture
def long_file(write_jsonl):
    """Six rows: the third with a completion of over 300 tokens, the fifth with such a prompt."""
    lines = rows(6)
    lines[2]["messages"][1]["content"] = "x" * 300
    lines[4]["messages"][0]["content"] = "y" * 300
    return write_jsonl("long.jsonl", lines)


def test_overlong_sequences_are_counted_and_refused(tokenizer, long_file):
    said = (
        r"2 of 6 sequences are longer than 200 tokens .*longest has \d{3}.*first is line 3.*raise --max-length, "
        r"leave them out with --overlong drop or shorten them with --overlong cut"
    )
    with pytest.raises(UserError, match=said):
        load_examples(long_file, tokenizer, max_length=200)
    assert len(load_examples(long_file, tokenizer, max_length=200, limit=2).examples) == 2


def test_overlong_sequences_are_dropped(tokenizer, long_file):
    dataset = load_examples(long_file, tokenizer, max_length=200, overlong="drop")
    assert (len(dataset.examples), dataset.dropped, dataset.cut) == (4, 2, 0)


def test_overlong_sequences_keep_their_beginning_and_whole_prompts(tokenizer, long_file):
    whole = load_examples(long_file, tokenizer).examples
    dataset = load_examples(long_file, tokenizer, max_length=200, overlong="cut")
    assert (len(dataset.examples), dataset.dropped, dataset.cut) == (5, 1, 1)
    cut = dataset.examples[2]
    assert len(cut) == 200
    assert cut.input_ids.tolist() == whole[2].input_ids[:200].tolist()
    assert cut.weights.tolist() == whole[2].weights[:200].tolist()
    assert tokenizer.eos_token_id not in cut.input_ids[cut.weights > 0]
    others = [whole[index] for index in (0, 1, 3, 5)]
    for example, before in zip([e for e in dataset.examples if e is not cut], others, strict=True):
        assert example.input_ids.tolist() == before.input_ids.tolist()


@pytest.mark.parametrize("room", [-1, 0, 1])
def test_a_prompt_that_fills_the_length_leaves_nothing_to_cut_to(tokenizer, write_jsonl, room):
    path = write_jsonl("data.jsonl", rows(1))
    begin = load_examples(path, tokenizer).examples[0].begin
    if room <= 0:
        with pytest.raises(UserError, match=r"1 of 1 sequences are longer .*raise --max-length$"):
            load_examples(path, tokenizer, max_length=begin + room, overlong="cut")
    else:
        example = load_examples(path, tokenizer, max_length=begin + room, overlong="cut").examples[0]
        assert (example.weights > 0).sum() == room


def test_nothing_left_is_refused_whatever_was_told(tokenizer, long_file):
    with pytest.raises(UserError, match=r"6 of 6 .*raise --max-length$"):
        load_examples(long_file, tokenizer, max_length=10, overlong="drop")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": [', "line 2 is not JSON"),
        ("[1]", "line 2 must be a JSON object"),
        ('{"question": "2+2?"}', "line 2: needs the columns 'messages'.*it has: question"),
        ('{"prompt": "2+2?"}', "line 2: .*'completion' is missing"),
        ('{"messages": "hello"}', "line 2: messages must be a list"),
        ('{"messages": [{"role": "user", "content": "2+2?"}]}', "line 2: messages must end with the assistant's turn"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "line 2: messages must be a list"),
    ],
)
def test_bad_rows_are_refused_by_number(tokenizer, tmp_path, line, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(rows(1)[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=said):
        load_examples(path, tokenizer)


def test_missing_and_empty_data_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_examples(tmp_path / "none.jsonl", tokenizer)
    with pytest.raises(UserError, match=r"no kept\.jsonl"):
        load_examples(tmp_path, tokenizer)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="no training rows"):
        load_examples(tmp_path / "empty.jsonl", tokenizer)
