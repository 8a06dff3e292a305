"""The server backend against a scripted peer on loopback, and against a real `vllm serve`."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_server import RECOVERABLE, ScriptedServer, answer_of
from vllm_server import serve_nano

from distill.errors import RunError, UserError
from distill.identity import model_identity
from distill.reasoning import split_reasoning
from distill.records import Completion, Prompt
from distill.signals import SignalSpec
from distill.watchdog import child_environment
from teachers import nano, open_backend
from teachers.backend import Request
from teachers.engines.server import ServerEngine
from teachers.engines.server_answer import Answer, join_reasoning
from teachers.engines.server_connection import LONGEST_MESSAGE, Endpoint, parse_endpoints, redactor
from teachers.engines.server_queue import IN_VAIN, Patience
from teachers.engines.server_wire import DIALECTS, SET_HERE, Denied, Refused, Trouble, fault_of

WARM = {"temperature": 1.0, "top_p": 1.0, "max_completion_length": 64}
GREEDY = {**WARM, "temperature": 0.0}
KEY = "sk-Zq7+w/8=Tr0ub4dor"
STREAMS = ["stream=true", "stream=false"]


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have keys and proxies set."""
    for name in list(os.environ):
        if name.upper().endswith(("_PROXY", "_API_KEY")):
            monkeypatch.delenv(name)


def requests_of(count: int, seed: int = 0, text: str = "How many? {}") -> list[Request]:
    prompts = [Prompt(messages=({"role": "user", "content": text.format(index)},)) for index in range(count)]
    return [Request(uid=f"{i}", prompt=p, sample_index=0, seed=seed + i) for i, p in enumerate(prompts)]


def opened(*servers: ScriptedServer, model: str = "scripted", **options: Any) -> ServerEngine:
    settings = {"concurrency": 8, "backoff": 0.001, "base_url": [server.url for server in servers]}
    return ServerEngine(model, **{**settings, **options})


def answers(
    engine: ServerEngine, requests: Sequence[Request], sampling: Mapping[str, Any] = WARM, **options: Any
) -> dict[str, Completion]:
    """Return the completions by uid: every request exactly once, or it is a failure."""
    found = list(engine.generate(iter(requests), sampling, **options))
    assert sorted(request.uid for request, _ in found) == sorted(request.uid for request in requests)
    return {request.uid: completion for request, completion in found}


def expected(request: Request, sampling: Mapping[str, Any] = WARM) -> str:
    """What the scripted server says to a request, as the model would have written it, tags in the text."""
    seed = {"seed": request.seed} if sampling["temperature"] > 0 else {}
    reasoning, answer = answer_of({"messages": list(request.prompt.messages), **sampling, **seed})
    return f"<think> {' '.join(reasoning)}</think>{' '.join(answer)}"


def first_time(fault: str) -> Callable[[Mapping[str, Any], int], str | None]:
    return lambda body, times: fault if times == 0 else None


def always(fault: str) -> Callable[[Mapping[str, Any], int], str | None]:
    return lambda body, times: fault


def only(text: str, fault: str) -> Callable[[Mapping[str, Any], int], str | None]:
    return lambda body, times: fault if body["messages"][-1]["content"] == text else None


@pytest.mark.parametrize("stream", STREAMS)
def test_a_sample_is_one_request_with_its_own_seed(stream: str) -> None:
    requests = requests_of(20, seed=100)
    with ScriptedServer() as server:
        found = answers(opened(server, engine_args=[stream, "top_k=20"]), requests)
        cold = answers(opened(server, engine_args=[stream]), requests[:1], GREEDY)
    for request in requests:
        completion = found[request.uid]
        assert completion.text == expected(request)
        assert (completion.finish_reason, completion.error, completion.num_prompt_tokens) == ("stop", None, 3)
        assert completion.num_completion_tokens == len(completion.text.replace("</think>", " ").split()) - 1
    assert cold["0"].text == expected(requests[0], GREEDY)
    hot = sorted(server.bodies[:-1], key=lambda body: body["seed"])
    assert [body["seed"] for body in hot] == list(range(100, 120))
    whole = {"model": "scripted", "temperature": 1.0, "top_p": 1.0, "max_tokens": 64, "stream": stream == STREAMS[0]}
    whole |= {"stream_options": {"include_usage": True}} if whole["stream"] else {}
    for body, request in zip(hot, requests, strict=True):
        assert body == {**whole, "messages": list(request.prompt.messages), "seed": request.seed, "top_k": 20}
    assert "seed" not in server.bodies[-1]
    assert server.most <= 8


def test_what_was_not_asked_is_not_sent_and_what_was_is() -> None:
    asked = {**WARM, "max_completion_length": None, "thinking_budget": 7, "loop_stop": [64, 8]}
    with ScriptedServer(limit_field="max_completion_tokens") as server:
        answers(opened(server), requests_of(1), asked)
        answers(opened(server, engine_args=["limit_field=max_completion_tokens"]), requests_of(1))
        answers(opened(server, engine_args=["chat_template_kwargs={enable_thinking: true}"]), requests_of(1))
    first, second, third = server.bodies
    assert not {"max_tokens", "max_completion_tokens", "logprobs", "n"} & set(first)
    assert first["thinking_token_budget"] == 7
    assert first["repetition_detection"] == {"max_pattern_size": 64, "min_pattern_size": 1, "min_count": 8}
    assert second["max_completion_tokens"] == 64
    assert "max_tokens" not in second
    assert third["chat_template_kwargs"] == {"enable_thinking": True}


@pytest.mark.parametrize("kind", DIALECTS)
def test_servers_known_to_sample_with_more_are_told_not_to(kind: str) -> None:
    """A field that the user gives beats the neutral value; only streams are told how long their pieces are."""
    with ScriptedServer(models=[{"id": "scripted", "owned_by": kind}]) as server:
        answers(opened(server), requests_of(1))
        answers(opened(server, engine_args=["top_k=7", "stream=false"]), requests_of(1))
    plain, own = server.bodies
    assert {key: plain[key] for key in DIALECTS[kind]} == DIALECTS[kind]
    assert own["top_k"] == 7
    assert "stream_interval" not in own


@pytest.mark.parametrize("key", [*SET_HERE])
def test_fields_that_are_set_here_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=key):
        ServerEngine("m", base_url=["http://127.0.0.1:9/v1"], engine_args=[f"{key}=1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": []}, "--base-url"),
        ({"base_url": ["localhost:8000"]}, "http://HOST:PORT/v1"),
        ({"base_url": ["http://h:99999"]}, "http://HOST:PORT/v1"),
        ({"base_url": ["ftp://h"]}, "http://HOST:PORT/v1"),
        ({"chat_template": "x.jinja"}, "the server renders"),
        ({"engine_args": ["stream=perhaps"]}, "true or false"),
        ({"engine_args": ["limit_field=n"]}, "limit_field"),
        ({"engine_args": ["min_p=.nan"]}, "JSON"),
        ({"engine_args": ["day=2026-01-01"]}, "JSON"),
        ({"engine_args": ["top_k"]}, "key=value"),
    ],
)
def test_what_has_no_meaning_here_is_refused(options: dict[str, Any], message: str) -> None:
    for start in (lambda **given: ServerEngine("m", **given), lambda **given: ServerEngine.identify("m", **given)):
        with pytest.raises(UserError, match=message) as caught:
            start(**{"base_url": ["http://127.0.0.1:9/v1"], **options})
        assert "\n" not in str(caught.value)


def test_numbers_it_does_not_have_are_refused() -> None:
    with ScriptedServer() as server, pytest.raises(UserError, match="random draws"):
        answers(opened(server), requests_of(1), signal=SignalSpec("sampled", 4))
    with (
        ScriptedServer(models=[{"id": "scripted", "owned_by": "vllm"}]) as server,
        pytest.raises(UserError, match=r"temperature.*0\.001"),
    ):
        answers(opened(server), requests_of(1), {**WARM, "temperature": 0.001})


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("fault", RECOVERABLE)
def test_what_passes_is_tried_again(fault: str, stream: str) -> None:
    requests = requests_of(4)
    with ScriptedServer(script=first_time(fault)) as server:
        found = answers(opened(server, engine_args=[stream]), requests)
    assert [found[request.uid].text for request in requests] == [expected(request) for request in requests]
    assert len(server.bodies) == 8


SLOW = "slow:0.01"  # late, but an answer
faults = st.lists(st.lists(st.sampled_from([*RECOVERABLE, SLOW]), max_size=4), min_size=1, max_size=8)


@settings(max_examples=20, deadline=None)
@given(plan=faults, stream=st.sampled_from(STREAMS), replicas=st.integers(1, 2), concurrency=st.integers(1, 9))
def test_whatever_goes_wrong_every_sample_is_the_same(
    plan: list[list[str]], stream: str, replicas: int, concurrency: int
) -> None:
    """Any faults that pass, in any order: every request is answered once, with the text of a run without faults."""
    requests = requests_of(len(plan))
    lock, left = threading.Lock(), {f"How many? {index}": list(each) for index, each in enumerate(plan)}

    def script(body: Mapping[str, Any], times: int) -> str | None:
        with lock:
            waiting = left[body["messages"][-1]["content"]]
            return waiting.pop(0) if waiting else None

    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(ScriptedServer(script=script)) for _ in range(replicas)]
        found = answers(opened(*servers, engine_args=[stream], concurrency=concurrency), requests)
    assert {uid: completion.text for uid, completion in found.items()} == {r.uid: expected(r) for r in requests}
    attempts = [[*each, SLOW].index(SLOW) + 1 for each in plan]
    assert sum(len(server.bodies) for server in servers) == sum(attempts)
    assert sum(server.most for server in servers) <= concurrency * replicas


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("400", "400: scripted 400"),
        ("422", "422: scripted 422"),
        ("error-event:400", "400: scripted error"),
        ("500", r"500: scripted 500 \(attempt 3 was the last\)"),
        ("529", "529: scripted 529"),
        ("drop", "the connection broke"),
        ("torn", "the connection broke"),
        ("cut", "broke off|not in the OpenAI format"),
        ("garbage", "not in the OpenAI format"),
        ("hang", r"no answer within 0\.5 s \(attempt 2 was the last\)"),
        ("429:9", r"429: scripted 429 \(attempt 1 was the last\)"),
        ("content_filter", "content_filter"),
        ("tool_calls", "tool_calls"),
        ("weird", "weird"),
        ("abort", "abort"),
        ("no-usage", r"how many tokens .*usage"),
        ("ignore-limit", "ignores the limit.*limit_field"),
        ("short", r"the context 5: 3 more were asked for"),
    ],
)
def test_a_sample_fails_alone_and_says_why(fault: str, reason: str, stream: str) -> None:
    sampling = {**WARM, "max_completion_length": 3} if fault in ("ignore-limit", "short") else WARM
    requests = requests_of(4)
    with ScriptedServer(script=only("How many? 3", fault)) as server:
        engine = opened(server, retries=2, request_timeout=0.5, engine_args=[stream], concurrency=1)
        found = answers(engine, requests, sampling)
    last = found.pop("3")
    assert last.finish_reason == "error"
    assert re.search(reason, str(last.error)), last.error
    assert "\n" not in str(last.error)
    assert (last.text, last.num_completion_tokens) == ("", 0)
    assert all(completion.error is None for completion in found.values())


def test_a_refusal_says_how_long_the_context_is_where_the_server_lists_it() -> None:
    with ScriptedServer(models=[{"id": "scripted", "max_model_len": 640}], script=only("How many? 1", "400")) as server:
        found = answers(opened(server, concurrency=1), requests_of(2))
    assert found["1"].error == "400: scripted 400; the context is 640 tokens"


def test_a_cut_and_a_looping_completion_say_so() -> None:
    requests = requests_of(2)
    with ScriptedServer(script=only("How many? 1", "repetition")) as server:
        found = answers(opened(server), requests, {**WARM, "loop_stop": [4, 4]})
        cut = answers(opened(server), requests[:1], {**WARM, "max_completion_length": 3})["0"]
    assert (found["0"].finish_reason, found["1"].finish_reason) == ("stop", "loop")
    assert (cut.finish_reason, cut.num_completion_tokens) == ("length", 3)
    assert found["0"].text.startswith(cut.text)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_in_a_field_of_its_own_comes_back_in_tags(field: str, stream: str) -> None:
    requests = requests_of(3)
    with ScriptedServer(reasoning=field) as server:
        engine = opened(server, engine_args=[stream])
        found, cut = answers(engine, requests), answers(engine, requests, {**WARM, "max_completion_length": 3})
    for request in requests:
        reasoning, answer = (
            " ".join(words)
            for words in answer_of({"messages": list(request.prompt.messages), **WARM, "seed": request.seed})
        )
        assert found[request.uid].text == f"<think>\n{reasoning}\n</think>\n\n{answer}"
        assert cut[request.uid].text == "<think>\n" + " ".join(reasoning.split()[:3])
        assert split_reasoning(cut[request.uid].text, required=True).fault == "unclosed <think>"


def test_a_tag_that_the_template_opened_is_put_back() -> None:
    requests = requests_of(3)
    with ScriptedServer(reasoning="open") as server:
        found = answers(opened(server), requests)
    for request in requests:
        assert found[request.uid].text == expected(request).replace("<think> ", "<think>\n")


PLAIN = st.text("ab \n<>/", max_size=12).filter(lambda text: "<think>" not in text and "</think>" not in text)


@given(reasoning=PLAIN, content=PLAIN, opened=st.sampled_from(["", "<think>", "<think>\n"]))
def test_text_whose_prompt_is_known_is_exactly_what_was_written(reasoning: str, content: str, opened: str) -> None:
    """vLLM splits at the tags, keeps everything else, and shows the prompt: nothing is lost or added."""
    written = f"{reasoning}</think>{content}"
    assert join_reasoning("", written, opened) == opened + written
    if reasoning and content:
        assert join_reasoning(reasoning, content, opened) == (opened or "<think>") + written
        assert join_reasoning("<think>" + reasoning, content, opened) == (opened or "<think>") + written


@given(reasoning=PLAIN, content=PLAIN)
def test_text_whose_prompt_is_not_known_splits_into_the_same_parts(reasoning: str, content: str) -> None:
    """Stripped or not, what is joined splits into what the server sent, and canonical text comes back as it was."""
    for join in (join_reasoning(reasoning, content, None), join_reasoning("", f"{reasoning}</think>{content}", None)):
        if reasoning and content:
            parts = split_reasoning(join, required=True)
            assert (parts.reasoning, parts.answer) == (reasoning.strip(), content.strip())
    canonical = f"<think>\n{reasoning}\n</think>\n\n{content}"
    assert join_reasoning(f"\n{reasoning}\n", f"\n\n{content}", None) == canonical
    assert join_reasoning("", canonical, None) == canonical
    assert join_reasoning("", content, None) == content


def test_line_separators_inside_a_text_do_not_break_the_stream() -> None:
    """JSON may hold U+2028 and U+0085 as they are; a reader that splits lines like `str.splitlines` loses the rest."""
    odd = "a\u2028b\u0085c\u000bd\u001ce\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")
    odd = "".join(character for character in odd if character >= " ")
    with ScriptedServer() as server:
        import scripted_server

        words = scripted_server.WORDS
        scripted_server.WORDS = [odd] * len(words)
        try:
            found = answers(opened(server), requests_of(2))
            assert found["0"].text == expected(requests_of(1)[0])
            assert "\u2028" in found["0"].text
        finally:
            scripted_server.WORDS = words


def test_an_answer_without_its_end_is_trouble() -> None:
    choice = {"message": {"content": "x"}, "finish_reason": None}
    answer = Answer()
    answer.add(json.dumps({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode())
    with pytest.raises(Trouble, match="broke off"):
        answer.completion(None)


def test_hostile_prompts_and_pieces() -> None:
    """Lone surrogates reach the server as JSON escapes; an answer of any other shape is trouble, not a traceback."""
    request = requests_of(1, text="\ud800 {} \x00" + "(" * 200_000)
    with ScriptedServer() as server:
        assert answers(opened(server), request)["0"].text == expected(request[0])
    for piece in ("[]", "3", "null", '{"choices": 3}', '{"choices": [null]}', '{"usage": {"prompt_tokens": "x"}}', "["):
        with pytest.raises(Trouble, match="OpenAI format"):
            Answer().add(piece.encode())
    with pytest.raises(Trouble, match="OpenAI format"):
        Answer().add(b"[" * 200_000)
    with pytest.raises(Trouble, match="OpenAI format"):
        Answer().add(b'{"choices": "\xff"}')
    with pytest.raises(Refused, match="list"):
        Answer().add(b'{"choices": [{"message": {"content": [{"type": "text"}]}}]}')


KEYS = ["choices", "delta", "content", "usage", "prompt_tokens", "error", "code", "logprobs", "token"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_an_answer_or_a_known_fault(value: Any) -> None:
    answer = Answer(size=2)
    with contextlib.suppress(Trouble, Refused):
        answer.add(json.dumps(value).encode())


# Stopping early


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("fault", ["401", "403", "404", "402", "307"])
def test_a_server_that_serves_nobody_ends_the_run_at_once(fault: str, stream: str) -> None:
    with (
        ScriptedServer(script=always(fault)) as server,
        pytest.raises(UserError, match=f"serves nothing: {fault}: scripted {fault}"),
    ):
        answers(opened(server, engine_args=[stream]), requests_of(50))
    assert len(server.bodies) <= 8


def test_after_the_first_sample_the_same_is_trouble_that_may_pass() -> None:
    requests = requests_of(6)
    with ScriptedServer(script=lambda body, times: "403" if len(server.bodies) > 1 and not times else None) as server:
        found = answers(opened(server, concurrency=1), requests)
    assert [found[request.uid].text for request in requests] == [expected(request) for request in requests]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("fault", ["400", "422", "error-event:400"])
def test_settings_that_the_server_refuses_are_told_from_a_prompt_that_it_refuses(fault: str, stream: str) -> None:
    """The same settings with another prompt, once: refused too, and nothing would ever be served."""
    with ScriptedServer(script=always(fault)) as server, pytest.raises(UserError, match="refuses these settings: 4"):
        answers(opened(server, engine_args=[stream]), requests_of(50))
    assert len(server.bodies) <= 9 + 8
    with ScriptedServer(script=lambda body, _: fault if "many" in body["messages"][-1]["content"] else None) as server:
        found = answers(opened(server, engine_args=[stream]), requests_of(30))
    assert all("scripted" in str(completion.error) for completion in found.values())
    assert len(server.bodies) == 31


def test_a_server_without_token_counts_is_refused() -> None:
    with ScriptedServer(script=always("no-usage")) as server, pytest.raises(UserError, match="how many tokens"):
        answers(opened(server), requests_of(50))


def test_a_server_that_fails_every_sample_ends_the_run() -> None:
    requests = requests_of(50)
    seen: list[tuple[Request, Completion]] = []
    with ScriptedServer(script=lambda body, _: "500" if len(server.bodies) > 5 else None) as server:
        stream = opened(server, retries=1, concurrency=1).generate(iter(requests), WARM)
        with pytest.raises(RunError, match=f"{IN_VAIN} samples in a row failed at {server.url}: 500"):
            seen.extend(stream)
    assert [completion.error is None for _, completion in seen] == [True] * 5 + [False] * (IN_VAIN - 1)


def test_samples_that_fail_among_others_do_not_end_it() -> None:
    requests = requests_of(4 * IN_VAIN)

    def script(body: Mapping[str, Any], times: int) -> str | None:
        return "500" if int(body["messages"][-1]["content"].split()[-1]) % 2 else None

    with ScriptedServer(script=script) as server:
        found = answers(opened(server, retries=1, concurrency=1), requests)
    assert [found[request.uid].error is None for request in requests] == [True, False] * (2 * IN_VAIN)


def test_a_full_server_that_serves_others_costs_no_attempt() -> None:
    """429 is given more often than there are retries, but somebody is always served meanwhile."""
    requests = requests_of(24)

    def script(body: Mapping[str, Any], times: int) -> str | None:
        return "429" if server.in_flight > 1 else "slow:0.005"

    with ScriptedServer(script=script) as server:
        found = answers(opened(server, retries=3, concurrency=12), requests)
    assert [completion.error for completion in found.values()] == [None] * 24
    assert len(server.bodies) > 24 + 3


def test_retry_after_is_heeded_as_seconds_and_as_a_date() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    cases = {"2": 2.0, "0.5": 0.5, later: 29.0, "soon": 0.0, "-3": 0.0, "nan": 0.0, "inf": 0.0, "": 0.0}
    for value, wait in cases.items():
        fault = fault_of(503, b"", {"retry-after": value})
        assert isinstance(fault, Trouble)
        assert math.isclose(fault.wait, wait, abs_tol=2.0 if value == later else 0.0)
    with ScriptedServer(script=first_time("503:0.2")) as server:
        answers(opened(server), requests_of(1))
    assert server.arrivals[1] - server.arrivals[0] >= 0.2


@given(status=st.integers(300, 599), body=st.binary(max_size=40))
def test_every_status_is_one_of_three_things(status: int, body: bytes) -> None:
    fault = fault_of(status, body)
    assert type(fault) in (Trouble, Denied, Refused)
    assert "\n" not in str(fault)
    assert str(fault).startswith(f"{status}: ")


def test_pauses_double_up_to_a_minute() -> None:
    patience = Patience(request_timeout=1.0, retries=8, backoff=0.5)
    assert [patience.pause(failures) for failures in range(1, 10)] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert patience.pause(10_000) == 60


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too  long\\n by 3", "code": 400}}', "too long by 3"),
        (b'{"error": "no such model"}', "no such model"),
        (b'{"detail": [{"msg": "x"}]}', "[{'msg': 'x'}]"),
        (b'{"object": "error", "message": "m"}', "m"),
        (b"<html><body>502 Bad Gateway</body></html>", "502 Bad Gateway"),
        (b"", "no reason given"),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_the_reason_is_found_in_an_errors_body(body: bytes, message: str) -> None:
    assert str(fault_of(502, body)) == f"502: {message}"


# Replicas, and servers that come and go


def test_the_fewest_in_flight_is_asked_next() -> None:
    """A replica ten times as slow gets a small share, and one that fails fast does not attract everything."""
    requests = requests_of(60)
    with ScriptedServer() as fast, ScriptedServer(script=always("slow:0.1")) as slow:
        answers(opened(fast, slow), requests)
    assert len(slow.bodies) >= 4
    assert len(fast.bodies) > 1.5 * len(slow.bodies)
    with ScriptedServer(script=always("slow:0.02")) as good, ScriptedServer(script=always("503")) as bad:
        found = answers(opened(good, bad, backoff=0.02), requests)
    assert all(completion.error is None for completion in found.values())
    assert len(good.bodies) == 60
    assert 0 < len(bad.bodies) < 24


def test_a_replica_that_is_gone_is_set_aside_while_others_serve() -> None:
    requests = requests_of(60)
    with ScriptedServer(script=always("slow:0.01")) as stays, ScriptedServer(script=always("slow:0.01")) as leaves:
        found = {}
        for request, completion in opened(stays, leaves, retries=0, backoff=0.02).generate(iter(requests), WARM):
            found[request.uid] = completion
            if len(found) == 10:
                leaves.stop()
                broken = leaves.most
    gone = [completion for completion in found.values() if completion.error]
    assert len(found) == 60
    assert len(gone) <= broken  # those that were on their way: their connections broke, and no attempt was left
    assert len(leaves.bodies) < 40


def test_a_server_that_comes_back_goes_on() -> None:
    """While it is gone nothing is lost and no sample uses up its attempts."""
    requests = requests_of(30)
    server = ScriptedServer(script=always("slow:0.005"))
    found: dict[str, Completion] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        for request, completion in opened(server, retries=6, backoff=0.05).generate(iter(requests), WARM):
            found[request.uid] = completion
            if len(found) == 10:
                server.stop()
                server.most = 0
                back = threading.Timer(0.4, server.__enter__)
                back.start()
                stack.callback(server.stop)
                stack.callback(back.join)
    assert server.most > 1
    assert {uid: completion.text for uid, completion in found.items()} == {r.uid: expected(r) for r in requests}


def test_a_server_that_is_gone_for_good_ends_the_run_and_fails_no_sample() -> None:
    found: list[tuple[Request, Completion]] = []
    with ScriptedServer() as server:
        stream = opened(server, retries=3).generate(iter(requests_of(1000)), WARM)
        found += [next(stream) for _ in range(20)]
        server.stop()
        with pytest.raises(RunError, match=f"cannot reach {server.url} any more.*the same command goes on"):
            found.extend(stream)
    assert 20 <= len(found) < 100
    assert all(completion.error is None for _, completion in found)


def test_no_server_is_one_clear_line(tmp_path: Path) -> None:
    with ScriptedServer() as server, ScriptedServer() as other:
        url, port = server.url, server.port
        server.stop()
        for start in (ServerEngine, ServerEngine.identify):
            with pytest.raises(UserError, match=f"cannot reach {url} .*is the server running"):
                start("scripted", base_url=[url])
        assert answers(opened(other, base_url=[url, other.url]), requests_of(3))
    assert port
    with pytest.raises(UserError, match=r"cannot reach http://no\.such\.host\.invalid/v1"):
        ServerEngine.identify("m", base_url=["http://no.such.host.invalid"])


# Who it is


def test_identify_takes_the_only_model_there_is_or_names_what_there_is() -> None:
    with ScriptedServer() as server:
        options = {"base_url": [server.url], "concurrency": 3, "trust_remote_code": False, "request_timeout": 5.0}
        for model in (None, "auto", "scripted"):
            assert ServerEngine.identify(model, **options) == ("scripted", "scripted")
        extra = ["top_k=20", "stream=false", "limit_field=max_completion_tokens", "chat_template_kwargs={a: 1}"]
        _, identity = ServerEngine.identify(None, engine_args=extra, **options)
        assert identity == 'scripted?chat_template_kwargs={"a": 1}&top_k=20'
        with pytest.raises(UserError, match="serves scripted, not 'script'; did you mean 'scripted'"):
            ServerEngine.identify("script", **options)
    with ScriptedServer(models=[{"id": "a"}, {"id": "b"}]) as two, pytest.raises(UserError, match="serves a, b: name"):
        ServerEngine.identify(None, base_url=[two.url])
    with ScriptedServer(models=[]) as none, pytest.raises(UserError, match="serves no model"):
        ServerEngine.identify("a", base_url=[none.url])


def test_replicas_must_all_have_the_model(tmp_path: Path) -> None:
    with ScriptedServer(models=[{"id": "a"}]) as first, ScriptedServer(models=[{"id": "b"}]) as second:
        for model in (None, "a"):
            with pytest.raises(UserError, match=f"{second.url} serves b, not 'a'"):
                ServerEngine.identify(model, base_url=[first.url, second.url])
    roots = [tmp_path / "one", tmp_path / "two"]
    for size, root in enumerate(roots):
        root.mkdir()
        (root / "config.json").write_text(json.dumps({"hidden_size": size}))
    with (
        ScriptedServer(models=[{"id": "a", "root": str(roots[0])}]) as first,
        ScriptedServer(models=[{"id": "a", "root": str(roots[1])}]) as second,
        pytest.raises(UserError, match="different models"),
    ):
        ServerEngine.identify("a", base_url=[first.url, second.url])


def test_a_folder_that_lies_here_is_the_identity_and_the_shape() -> None:
    folder = nano.model_path()
    with ScriptedServer(models=[{"id": "teacher", "root": str(folder), "owned_by": "vllm"}]) as server:
        assert ServerEngine.identify(None, base_url=[server.url]) == ("teacher", model_identity(str(folder)))
        engine = opened(server, model="auto", concurrency=5)
    assert engine.config.hidden_size == 128
    assert engine.description == f"teacher at {server.url} (vllm), 5 in flight"
    with ScriptedServer() as server:
        assert opened(server).config is None


@pytest.mark.parametrize("status", [404, 405])
def test_a_server_without_a_list_is_believed(status: int) -> None:
    with ScriptedServer(listing=status) as server:
        assert ServerEngine.identify("whoever", base_url=[server.url]) == ("whoever", "whoever")
        assert answers(opened(server, model="whoever"), requests_of(1))["0"].error is None
        with pytest.raises(UserError, match="does not list its models: name one"):
            ServerEngine.identify("auto", base_url=[server.url])
    assert server.bodies[0]["model"] == "whoever"


def test_an_address_without_a_path_is_that_of_the_first_version() -> None:
    urls = ["http://h:1", "https://h/", "http://h:1/v1/", "http://[::1]:8/api/v3"]
    assert [endpoint.url for endpoint in parse_endpoints(urls)] == [
        *("http://h:1/v1", "https://h/v1", "http://h:1/v1", "http://[::1]:8/api/v3")
    ]


# Keys


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + str(error) + repr(error)


@pytest.mark.parametrize("name", ["DISTILL_API_KEY", "OPENAI_API_KEY"])
@pytest.mark.parametrize("fault", ["echo:401", "echo:403", "echo:400", "echo:500", "echo:429", None])
def test_the_key_goes_to_the_server_and_nowhere_else(
    fault: str | None,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, KEY)
    caplog.set_level(logging.DEBUG)
    said = ""
    with ScriptedServer(key=KEY, script=always(fault) if fault else first_time("500")) as server:
        engine = opened(server, retries=0 if fault else 3)
        said += repr(ServerEngine.identify(None, base_url=[server.url]))
        try:
            said += repr(answers(engine, requests_of(3)))
        except (UserError, RunError) as error:
            said += shown(error)
        said += repr(vars(engine)) + engine.description + str(engine.endpoints)
    assert fault is None or "***" in said
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    out, err = capfd.readouterr()
    everything = said + out + err + caplog.text
    assert KEY not in everything
    assert KEY[:8] not in everything


def test_a_wrong_key_is_told_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(key="right") as server:
        with pytest.raises(UserError, match=r"401: Incorrect API key provided: None \(no key: set DISTILL_API_KEY\)"):
            ServerEngine.identify(None, base_url=[server.url])
        monkeypatch.setenv("OPENAI_API_KEY", "right")
        assert ServerEngine.identify(None, base_url=[server.url])
        monkeypatch.setenv("DISTILL_API_KEY", KEY)  # the more special one counts
        with pytest.raises(UserError, match=r"Incorrect API key provided: Bearer \*\*\*$") as caught:
            ServerEngine.identify(None, base_url=[server.url])
        assert KEY not in shown(caught.value)
    for unfit in ("clé", "two words", "new\nline"):
        monkeypatch.setenv("DISTILL_API_KEY", unfit)
        with pytest.raises(UserError, match="DISTILL_API_KEY holds characters") as caught:
            ServerEngine.identify(None, base_url=["http://127.0.0.1:9"])
        assert unfit not in shown(caught.value)


def test_a_password_inside_an_address_is_no_different(monkeypatch: pytest.MonkeyPatch) -> None:
    """It becomes basic authentication, for that server alone, and is never shown, however wrong the address is."""
    monkeypatch.setenv("DISTILL_API_KEY", KEY)
    with ScriptedServer(script=always("echo:500")) as server:
        url = server.url.replace("//", "//user:s%40cret@")
        engine = opened(server, base_url=[url], retries=0)
        error = str(answers(engine, requests_of(1))["0"].error)
    assert server.headers[0]["authorization"] == "Basic dXNlcjpzQGNyZXQ="
    said = error + repr(vars(engine)) + engine.description
    for wrong in ("http://user:s%40cret@h:port", "user:s%40cret@h", "http://h/v1?key=s%40cret", f"http://{KEY}@"):
        with pytest.raises(UserError) as caught:
            parse_endpoints([wrong])
        said += shown(caught.value)
    closed = ["http://user:s%40cret@127.0.0.1:9/v1"]
    with pytest.raises(UserError, match="cannot reach") as caught:
        ServerEngine.identify("m", base_url=closed)
    said += shown(caught.value)
    for secret in ("s%40cret", "s@cret", "dXNlcjpzQGNyZXQ", KEY):
        assert secret not in said


@given(secret=st.text('ab+/="\\&', min_size=1, max_size=12), around=st.text(max_size=500), cut=st.integers(0, 500))
def test_redaction_comes_before_shortening(secret: str, around: str, cut: int) -> None:
    """Wherever a secret stands in a message, no part of it is left at the end of a shortened line."""
    clean = redactor([Endpoint("http://h/v1", {}, (secret,))])
    message = clean(around[:cut] + secret + around[cut:])
    assert secret not in message
    assert len(message) <= LONGEST_MESSAGE
    assert len(message.splitlines()) <= 1
    assert clean("x" * (LONGEST_MESSAGE - 2) + secret).startswith("x" * (LONGEST_MESSAGE - 2) + "*")


# The feed, and the end


def test_no_request_is_no_work_and_pulling_is_lazy() -> None:
    pulled = answered = most = 0

    def feed() -> Iterator[Request]:
        nonlocal pulled, most
        for request in requests_of(30):
            pulled += 1
            most = max(most, pulled - answered)
            yield request

    with ScriptedServer() as server:
        engine = opened(server)
        assert list(engine.generate(iter([]), WARM)) == []
        stream = engine.generate(feed(), WARM)
        assert pulled == 0
        for _ in stream:
            answered += 1
            assert pulled - answered <= 8
        assert (answered, pulled, most) == (30, 30, 8)
    assert len(server.bodies) == 30


def test_a_feed_that_waits_for_answers_is_asked_again() -> None:
    """Each answered request is worth one more, as under adaptive sampling; a None never comes to an idle engine."""
    left, ready, held = requests_of(25), 3, 0

    def feed() -> Iterator[Request | None]:
        nonlocal ready, held
        while left:
            if ready:
                ready, held = ready - 1, held + 1
                yield left.pop()
            else:
                assert held
                yield None

    with ScriptedServer() as server:
        seen = []
        for request, completion in opened(server).generate(feed(), WARM):
            seen.append(request.uid)
            assert completion.text == expected(request)
            ready, held = ready + 1, held - 1
    assert sorted(seen, key=int) == [str(index) for index in range(25)]
    assert server.most <= 3


def test_a_feed_is_asked_again_while_nothing_is_answered() -> None:
    """A request that becomes available while another hangs does not wait for it."""
    gate = threading.Event()
    with ScriptedServer(script=only("How many? 0", "slow:2")) as server:

        def feed() -> Iterator[Request | None]:
            yield requests_of(1)[0]
            while not gate.is_set():
                threading.Timer(0.1, gate.set).start()
                yield None
            yield requests_of(2)[1]

        assert [request.uid for request, _ in opened(server).generate(feed(), WARM)] == ["1", "0"]


def test_a_slow_consumer_loses_nothing() -> None:
    with ScriptedServer() as server:
        engine = opened(server, request_timeout=0.3)
        for request, completion in engine.generate(iter(requests_of(10)), WARM):
            time.sleep(0.1)  # all of it longer than a request may take
            assert completion.text == expected(request)


def queues() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "server-queue"]


def eventually(true: Callable[[], bool]) -> bool:
    limit = time.monotonic() + 10
    while not true() and time.monotonic() < limit:
        time.sleep(0.01)
    return true()


def test_closing_the_generator_cancels_what_is_in_flight() -> None:
    with ScriptedServer(script=lambda body, _: None if body["seed"] == 0 else "hang") as server:
        stream = opened(server).generate(iter(requests_of(20)), WARM)
        assert next(stream)[0].uid == "0"
        assert eventually(lambda: server.in_flight == 7)
        stream.close()
        assert not queues()
        assert len(server.bodies) == 8


def test_an_error_in_the_feed_and_one_in_the_consumer_close_it_too() -> None:
    def feed() -> Iterator[Request]:
        yield from requests_of(3)
        raise ZeroDivisionError

    with ScriptedServer(script=always("slow:0.05")) as server:
        with pytest.raises(ZeroDivisionError):
            list(opened(server).generate(feed(), WARM))
        assert not queues()
        with pytest.raises(ZeroDivisionError):
            sum(1 / 0 for _ in opened(server).generate(iter(requests_of(3)), WARM))
        assert eventually(lambda: not queues())


def test_ctrl_c_while_everything_hangs() -> None:
    with ScriptedServer(script=always("hang")) as server:
        stream = opened(server).generate(iter(requests_of(4)), WARM)
        interrupt = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        interrupt.join()
        assert not queues()


def test_torch_is_not_loaded() -> None:
    """In a process of its own, from the import to the last answer."""
    code = (
        "import sys; from teachers.engines.server import ServerEngine; from teachers.backend import Request;"
        "from distill.records import Prompt; from distill.signals import SignalSpec;"
        "engine = ServerEngine('auto', base_url=[sys.argv[1]]);"
        "prompt = Prompt(messages=({'role': 'user', 'content': 'x'},));"
        "request = Request(uid='0', prompt=prompt, sample_index=0, seed=0);"
        "sampling = {'temperature': 1.0, 'top_p': 1.0, 'max_completion_length': None};"
        "(_, completion), = engine.generate(iter([request]), sampling, signal=SignalSpec('top', 2));"
        "assert len(completion.signal) == completion.num_completion_tokens;"
        "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    with ScriptedServer() as server:
        command = [sys.executable, "-c", code, server.url]
        done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


# The teacher's numbers


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_k_likeliest_are_the_k_likeliest(size: int, stream: str) -> None:
    """Also where an unlikely token was drawn, which servers put first in a list that is then cut."""
    with ScriptedServer() as server:
        engine = opened(server, engine_args=[stream])
        found = answers(engine, requests_of(4), signal=SignalSpec("top", size))
    for completion in found.values():
        signal = completion.signal
        length = completion.num_completion_tokens
        places = np.arange(length)
        drawn = np.where(places % 3 == 0, 2, 0)
        assert signal.token_ids.tolist() == (100 * places + drawn).tolist()
        np.testing.assert_allclose(signal.token_logprobs, -0.5 - drawn)
        assert signal.ids.tolist() == (100 * places[:, None] + np.arange(size)).tolist()
        np.testing.assert_allclose(signal.logprobs, np.broadcast_to(-0.5 - np.arange(size), (length, size)))
        assert signal.counts is None
    assert {body["top_logprobs"] for body in server.bodies} == {size + 1}
    assert all(body["logprobs"] and body["return_tokens_as_token_ids"] for body in server.bodies)


def test_texts_instead_of_token_ids_are_refused() -> None:
    with ScriptedServer(token_ids=False) as server, pytest.raises(UserError, match="gives texts, not token ids"):
        answers(opened(server), requests_of(3), signal=SignalSpec("top", 3))


def position(drawn: int, logprob: float, top: Sequence[tuple[int, float]]) -> dict[str, Any]:
    def outcome(token: int, value: float) -> dict[str, Any]:
        return {"token": f"token_id:{token}", "logprob": value}

    return {**outcome(drawn, logprob), "top_logprobs": [outcome(*each) for each in top]}


def signalled(positions: Sequence[Mapping[str, Any]], tokens: int, size: int = 2) -> Completion:
    choice = {"message": {"content": "x"}, "finish_reason": "stop", "logprobs": {"content": list(positions)}}
    answer = Answer(size=size)
    usage = {"prompt_tokens": 1, "completion_tokens": tokens}
    answer.add(json.dumps({"choices": [choice], "usage": usage}).encode())
    return answer.completion(None)


def test_numbers_that_do_not_add_up_fail_the_sample() -> None:
    """vLLM writes -9999 for minus infinity, which is an empty place here."""
    good = position(7, -0.1, [(7, -0.1), (3, -9999.0)])
    signal = signalled([good], 1).signal
    assert (signal.ids.tolist(), signal.logprobs[0, 1]) == ([[7, -1]], -np.inf)
    assert "of 1 tokens came for 2" in str(signalled([good], 2).error)
    for wrong in (position(7, 0.5, [(7, 0.5)]), position(7, -0.1, [(7, -0.1), (3, -0.1)]), position(7, -1, [(7, -2)])):
        assert "not a signal" in str(signalled([wrong], 1).error)


# A real server


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """`vllm serve` with the embedded teacher, whose generation_config would have it penalise and keep the top 3."""
    folder = tmp_path_factory.mktemp("served") / "nano"
    shutil.copytree(nano.model_path(), folder)
    values = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**values, "repetition_penalty": 1.8, "top_k": 3}))
    with serve_nano(folder) as url:
        yield url, folder


@pytest.fixture(scope="module")
def heldout() -> list[Request]:
    problems = nano.problems(levels=nano.parse_levels(""), split="heldout", limit=16)
    return [Request(uid=str(i), prompt=prompt, sample_index=0, seed=i) for i, prompt in enumerate(problems)]


@pytest.mark.vllm
@pytest.mark.parametrize("stream", STREAMS)
def test_vllm_serve_says_what_transformers_says(
    real: tuple[str, Path], heldout: list[Request], stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = real
    engine = ServerEngine("auto", base_url=[url], concurrency=4, engine_args=[stream])
    reference = open_backend("transformers", str(folder))
    assert answers(engine, heldout, GREEDY) == answers(reference, heldout, GREEDY)
    assert ServerEngine.identify(None, base_url=[url]) == (str(folder), model_identity(str(folder)))


@pytest.mark.vllm
def test_vllm_serve_draws_by_seed(real: tuple[str, Path], heldout: list[Request]) -> None:
    engine = ServerEngine("auto", base_url=[real[0]])
    hot = {"temperature": 2.0, "top_p": 1.0, "max_completion_length": 24}
    nonsense = requests_of(1, text="Coins? {}") * 8
    one, other = (
        [Request(uid=f"{i}", prompt=r.prompt, sample_index=i, seed=base + i) for i, r in enumerate(nonsense)]
        for base in (0, 1000)
    )
    once, again, others = answers(engine, one, hot), answers(engine, one, hot), answers(engine, other, hot)
    assert once == again
    assert len({completion.text for completion in [*once.values(), *others.values()]}) > 8


@pytest.mark.vllm
def test_vllm_serve_gives_the_models_own_numbers(real: tuple[str, Path], heldout: list[Request]) -> None:
    """Equal to log-softmax of plain transformers over the very same tokens, at any temperature."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    url, folder = real
    size = 20
    engine = ServerEngine("auto", base_url=[url])
    hot = {"temperature": 1.7, "top_p": 0.9, "max_completion_length": 32}
    odd = requests_of(2, text="Coins? {}")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for request, completion in engine.generate(iter([*heldout[:3], *odd]), hot, signal=SignalSpec("top", size)):
        signal = completion.signal
        assert len(signal) == completion.num_completion_tokens
        prompt = tokenizer.apply_chat_template(
            list(request.prompt.messages), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        ids = torch.tensor([[*prompt, *signal.token_ids.tolist()]])
        with torch.inference_mode():
            truth = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        best = truth.topk(size)
        np.testing.assert_allclose(signal.logprobs, best.values.numpy(), atol=1e-3)
        np.testing.assert_allclose(truth.gather(1, torch.tensor(signal.ids).long()), signal.logprobs, atol=1e-3)
        own = truth.gather(1, torch.tensor(signal.token_ids).long()[:, None])[:, 0]
        np.testing.assert_allclose(own, signal.token_logprobs, atol=1e-3)


@pytest.mark.vllm
def test_vllm_serve_refuses_ends_and_cuts(real: tuple[str, Path], heldout: list[Request]) -> None:
    url, _ = real
    engine = ServerEngine("auto", base_url=[url])
    long = requests_of(2, text=" books" * 600 + "{}")[1:]
    tight = Request(uid="t", prompt=requests_of(1, text=" books" * 490)[0].prompt, sample_index=0, seed=0)
    found = answers(engine, [heldout[0], *long, tight], GREEDY)
    assert found["0"].error is None
    assert "maximum context length is 512" in str(found["1"].error)
    assert "the prompt has 496 tokens, the context 512: 64 more" in str(found["t"].error)
    budget = answers(engine, heldout[:2], {**GREEDY, "thinking_budget": 4})
    assert all(len(completion.text) < 60 and "</think>" in completion.text for completion in budget.values())
    loop = requests_of(1, text="books books books{}")
    assert answers(engine, loop, {**GREEDY, "loop_stop": [4, 3]})["0"].finish_reason in ("loop", "stop")
    for sampling, word in (({"temperature": 7.0}, "temperature"), ({"max_completion_length": 5000}, "max_tokens")):
        with pytest.raises(UserError, match=f"refuses these settings.*{word}"):
            answers(engine, heldout[:2], {**WARM, **sampling})
    with pytest.raises(UserError, match="greater than max allowed"):
        answers(engine, heldout[:2], signal=SignalSpec("top", 30))
    with pytest.raises(UserError, match="not 'nano'"):
        ServerEngine("nano", base_url=[url])
