"""Records: JSON and back for any text, and identities that depend on exactly what they should."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distill.records import Prompt, Trace, Verdict, content_hash, sample_seed, trace_uid
from distill.store import dump_line

# Any text a broken model or file can bring, lone surrogates and control characters included.
ANY_TEXT = st.text(st.characters(codec=None, categories=None), max_size=30)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | ANY_TEXT
MESSAGES = st.lists(st.fixed_dictionaries({"role": ANY_TEXT, "content": ANY_TEXT}), min_size=1, max_size=3).map(tuple)
VERDICTS = st.builds(
    Verdict,
    verifier=ANY_TEXT,
    version=ANY_TEXT,
    score=st.none() | st.floats(0, 1),
    reason=ANY_TEXT,
    predicted=st.none() | ANY_TEXT,
)
TRACES = st.builds(
    Trace,
    **dict.fromkeys(("uid", "prompt_uid", "completion", "reasoning", "answer", "finish_reason"), ANY_TEXT),
    **dict.fromkeys(("teacher", "backend", "source"), ANY_TEXT),
    **dict.fromkeys(("num_prompt_tokens", "num_completion_tokens", "sample_index", "seed"), st.integers(0)),
    **dict.fromkeys(("gold", "predicted", "error"), st.none() | ANY_TEXT),
    messages=MESSAGES,
    verdicts=st.lists(VERDICTS, max_size=2).map(tuple),
    flags=st.lists(ANY_TEXT, max_size=2).map(tuple),
    meta=st.dictionaries(ANY_TEXT, SCALARS, max_size=3),
)
SAMPLINGS = st.dictionaries(ANY_TEXT, SCALARS, max_size=3)


@given(trace=TRACES)
def test_from_json_inverts_to_json_through_a_written_line(trace: Trace) -> None:
    line = dump_line(trace.to_json()).encode("utf-8")
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert Trace.from_json(json.loads(line)) == trace


@given(trace=TRACES, extra=ANY_TEXT)
def test_unknown_keys_of_newer_stores_are_ignored(trace: Trace, extra: str) -> None:
    assume(extra not in {f.name for f in fields(Trace)})
    row = trace.to_json()
    assert Trace.from_json({**row, extra: 1}) == trace
    newer = [{**verdict, "confidence": 1} for verdict in row["verdicts"]]
    assert Trace.from_json({**row, "verdicts": newer}) == trace


@pytest.mark.parametrize("name", ["uid", "messages", "completion", "seed"])
def test_a_missing_field_is_an_error(name: str) -> None:
    row = make_trace().to_json()
    del row[name]
    with pytest.raises((KeyError, TypeError), match=name):
        Trace.from_json(row)


def test_optional_fields_may_be_missing() -> None:
    trace = make_trace()
    row = trace.to_json()
    for name in ("gold", "predicted", "verdicts", "flags", "source", "error", "meta"):
        del row[name]
    assert Trace.from_json(row) == trace


Identity = tuple[str, str, dict[str, Any], int]
IDENTITIES = st.tuples(ANY_TEXT, ANY_TEXT, SAMPLINGS, st.integers(0, 1000))


def as_written(identity: Identity) -> str:
    """JSON keeps what an identity is made of apart: 1 and 1.0 and True are three texts."""
    return json.dumps(identity, sort_keys=True)


@given(first=IDENTITIES, second=IDENTITIES)
def test_a_uid_is_equal_exactly_when_all_four_parts_are(first: Identity, second: Identity) -> None:
    assert (trace_uid(*first) == trace_uid(*second)) == (as_written(first) == as_written(second))


@given(identity=IDENTITIES, other=IDENTITIES, part=st.integers(0, 3))
def test_each_part_alone_changes_the_uid(identity: Identity, other: Identity, part: int) -> None:
    changed = (*identity[:part], other[part], *identity[part + 1 :])
    assume(as_written(changed) != as_written(identity))
    assert trace_uid(*changed) != trace_uid(*identity)


@given(sampling=SAMPLINGS)
def test_the_order_of_settings_does_not_change_a_uid(sampling: dict[str, Any]) -> None:
    backwards = dict(reversed(sampling.items()))
    assert trace_uid("p", "t", sampling, 0) == trace_uid("p", "t", backwards, 0)


def test_a_uid_is_the_same_on_any_machine_and_version() -> None:
    """Pinned: a store written by one version must resume under the next."""
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_completion_length": None}
    prompt = Prompt(messages=({"role": "user", "content": "1+1?"},))
    assert prompt.uid == "cc65b384f235935dd378e28b"
    uid = trace_uid(prompt.uid, "teacher", sampling, 3)
    assert uid == "ac387cab77cc7723e854221b"
    assert sample_seed(0, uid) == 1411872652


@given(messages=MESSAGES, gold=st.none() | ANY_TEXT, source=ANY_TEXT, meta=SAMPLINGS)
def test_a_prompt_is_its_messages_alone(messages: Any, gold: str | None, source: str, meta: dict[str, Any]) -> None:
    prompt = Prompt(messages=messages, gold=gold, source=source, meta=meta)
    assert prompt.uid == Prompt(messages=messages).uid
    longer = replace(prompt, messages=(*messages, {"role": "user", "content": "more"}))
    assert longer.uid != prompt.uid


@given(seed=st.integers(), uid=ANY_TEXT.filter(lambda text: text.isascii()))
def test_a_sample_seed_is_a_31_bit_number_that_repeats(seed: int, uid: str) -> None:
    assert 0 <= sample_seed(seed, uid) < 2**31
    assert sample_seed(seed, uid) == sample_seed(seed, uid)


def test_sample_seeds_differ_between_runs_and_samples() -> None:
    seeds = {sample_seed(run, content_hash(index)) for run in range(10) for index in range(100)}
    assert len(seeds) > 995  # 1000 draws of 2^31: a collision is a 1 in 4000 event, and these are fixed


def test_the_last_verdict_is_the_score() -> None:
    verdicts = tuple(Verdict(verifier="v", version="1", score=score) for score in (1.0, None, 0.25))
    assert make_trace().score is None
    assert replace(make_trace(), verdicts=verdicts).score == 0.25
    assert replace(make_trace(), verdicts=verdicts[:2]).score is None


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        make_trace().gold = "2"  # type: ignore[misc]


def make_trace() -> Trace:
    return Trace(
        uid="u",
        prompt_uid="p",
        messages=({"role": "user", "content": "1+1?"},),
        completion="2",
        reasoning="",
        answer="2",
        finish_reason="stop",
        num_prompt_tokens=3,
        num_completion_tokens=1,
        sample_index=0,
        seed=0,
        teacher="t",
        backend="b",
    )
