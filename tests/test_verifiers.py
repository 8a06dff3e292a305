"""Verifiers: golds score 1, rubbish never does, and no text and no user function stops the pool."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import RunError, UserError
from distill.records import Prompt, Trace, Verdict
from teachers.prompts import read_prompts
from teachers.verifiers import JUDGES, PROMPT_UNIT, VERIFIERS
from teachers.verifiers.gold import GOLD, NEEDS, check_golds, gold_as_answer, missing, needs, verifier_name
from teachers.verifiers.pool import AT_ONCE, VerifierPool
from teachers.verifiers.worker import open_verifier

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
LIMIT = 2.5

# What is tested here: one trace at a time, and no model asked. tests/test_judging.py has the others.
SINGLE = [name for name in VERIFIERS if name not in JUDGES | PROMPT_UNIT]
TESTS = {
    "cases": [{"type": "code", "code": "assert inc(1) == 2"}, {"type": "code", "code": "assert inc(41) == 42"}],
    "solution": "def inc(x):\n    return x + 1",
}
LEGS = {"question": "A dog and a hen?", "answer": "6", "metadata": {"source_dataset": "leg_counting"}}
META: dict[str, dict[str, Any]] = {
    "choice": {"choices": {"A": "two", "B": "four"}},
    "code_tests": {"tests": TESTS},
    "reasoning-gym": {"reasoning_gym": {"task": "leg_counting", "entry": LEGS}},
}
# A gold and an answer equal to it, as a model writes it. A new verifier needs its line here.
EQUAL: dict[str, list[tuple[str, str]]] = {
    "math": [
        ("42", "The total is \\boxed{42}."),
        ("42", "so it is 42"),
        ("0.5", "\\boxed{\\frac{1}{2}}"),
        ("\\frac{\\sqrt{3}}{3}", "\\boxed{\\frac{1}{\\sqrt{3}}}"),
        ("1234", "\\boxed{1,234}"),
        ("$18", "\\boxed{18}"),
        ("\\$18", "\\boxed{18}"),
        ("(x+1)^2", "$\\boxed{x^2+2x+1}$"),
        ("x=5", "\\boxed{5}"),
    ],
    "choice": [("B", "The answer is (B)."), ("b", "\\boxed{\\text{B}}"), ("four", "B. four"), ("B", "\\boxed{four}")],
    "code_tests": [
        ("", "Here:\n```python\ndef inc(x):\n    return x + 1\n```\nDone."),
        ("", "def inc(x): return 1 + x"),
    ],
    "reasoning-gym": [("6", "<answer>6</answer>"), ("6", "So \\boxed{6}."), ("6", "4 + 2\n6"), ("6", "Answer: 6")],
}
WRONG: dict[str, list[tuple[str, str]]] = {
    "math": [
        ("42", "\\boxed{43}"),
        ("42", "no idea"),
        ("42", ""),
        ("42", "42 or 43"),
        ("42", "\\boxed{42}, \\boxed{43}"),
        ("(1,2)", "\\boxed{(2,1)}"),
    ],
    "choice": [("B", "\\boxed{A}"), ("B", "A or B"), ("B", ""), ("B", "no idea")],
    "code_tests": [
        ("", "```python\ndef inc(x):\n    return 2\n```"),
        ("", "```python\ndef inc(x)\n```"),
        ("", "I cannot."),
        ("", ""),
    ],
    "reasoning-gym": [("6", ""), ("6", "\\boxed{}")],
}
UNREADABLE: dict[str, list[str | None]] = {
    "math": [None, "", " ", "\\frac{", "}{", "???", "\ud800"],
    "choice": [None, "", " ", "E", "\\frac{", "\ud800", "six"],
    "code_tests": [],  # its tests are in the trace's meta, and so is
    "reasoning-gym": [],  # its entry: see test_without_what_it_needs_there_is_no_score
}
HOSTILE = [
    "",
    "\ud800\udfff\x00",
    "(" * 200_000,
    "\\boxed{" * 30_000,
    "\\boxed{9**9**9**9}",
    "$\\boxed{9^{9^{9^{9}}}}$",
    "\\boxed{\\frac{" + "1" * 5000 + "}{0}}",
    "\\boxed{" + "\\sqrt{" * 500 + "2" + "}" * 501,
]


def trace(gold: str | None, answer: str, index: int = 0) -> Trace:
    """Return a trace with this answer after its reasoning."""
    return Trace(
        uid=f"u{index}",
        prompt_uid="p",
        messages=({"role": "user", "content": "?"},),
        completion=answer,
        reasoning="",
        answer=answer,
        finish_reason="stop",
        num_prompt_tokens=1,
        num_completion_tokens=1,
        sample_index=index,
        seed=0,
        teacher="t",
        backend="b",
        gold=gold,
    )


def cases(table: dict[str, list[Any]]) -> list[tuple[Any, ...]]:
    return [
        (name, *(case if isinstance(case, tuple) else (case,))) for name, listed in table.items() for case in listed
    ]


def here(name: str, one: Trace, **options: Any) -> Verdict:
    """Judge in this process, as the worker does."""
    return open_verifier(name, options)([one])[0]


def of(name: str, gold: str | None, answer: str, index: int = 0) -> Trace:
    """Return a trace with all that a verifier needs."""
    return replace(trace(gold, answer, index), meta=META.get(name, {}))


@pytest.fixture(scope="module", params=SINGLE)
def pool(request: pytest.FixtureRequest) -> Iterator[VerifierPool]:
    """One worker of each registered verifier, shared, because it takes seconds to start."""
    with VerifierPool(request.param, limit_seconds=LIMIT) as opened:
        yield opened


def test_every_verifier_has_its_cases() -> None:
    assert EQUAL.keys() == WRONG.keys() == UNREADABLE.keys() == set(SINGLE) == NEEDS.keys()
    assert VERIFIERS.keys() > JUDGES | PROMPT_UNIT
    assert next(iter(VERIFIERS)) == "math"


@pytest.mark.parametrize(("name", "gold", "answer"), cases(EQUAL))
def test_what_equals_the_gold_scores_one(name: str, gold: str, answer: str) -> None:
    verdict = here(name, of(name, gold, answer))
    assert verdict.score == 1.0, verdict
    assert verdict.predicted
    assert (verdict.verifier, verdict.version[:6]) == (name, "rules ")
    assert here(name, of(name, gold, answer)) == verdict


@pytest.mark.parametrize(("name", "gold", "answer"), cases(WRONG))
def test_what_differs_scores_zero(name: str, gold: str, answer: str) -> None:
    verdict = here(name, of(name, gold, answer))
    assert verdict.score == 0.0, verdict
    assert verdict.reason


@pytest.mark.parametrize("name", SINGLE)
def test_without_what_it_needs_there_is_no_score(name: str) -> None:
    for _, answer in EQUAL[name]:
        verdict = here(name, trace(None, answer))
        assert (verdict.score, bool(verdict.reason)) == (None, True)


@pytest.mark.parametrize("name", SINGLE)
@settings(max_examples=25)
@given(text=st.text(st.characters(codec=None, categories=None)))
def test_any_text_has_the_same_verdict_twice(name: str, text: str) -> None:
    one = of(name, EQUAL[name][0][0], text)
    verdict = here(name, one)
    assert verdict == here(name, one)
    assert verdict.score is None or 0 <= verdict.score <= 1
    assert json.loads(json.dumps(asdict(verdict))) == asdict(verdict)


@pytest.mark.parametrize(("name", "gold"), cases(UNREADABLE))
def test_an_unreadable_gold_gives_no_score_even_to_itself(name: str, gold: str | None) -> None:
    for answer in (gold or "", f"\\boxed{{{gold}}}", "42"):
        verdict = here(name, of(name, gold, answer))
        assert verdict.score is None
        assert verdict.reason


def test_math_takes_the_gold_first() -> None:
    """A gold inequality may be answered by its interval, and not the other way round: the sides are told apart."""
    assert here("math", trace("1<x<2", "$\\boxed{(1,2)}$")).score == 1.0
    assert here("math", trace("(1,2)", "$\\boxed{1<x<2}$")).score == 0.0


def test_the_reasoning_is_not_the_answer() -> None:
    one = replace(trace("42", ""), reasoning="\\boxed{42}", completion="<think>\\boxed{42}")
    assert here("math", one).score == 0.0


@pytest.mark.parametrize("name", [name for name in ["math/math500.jsonl"] if (DATA / name).is_file()])
def test_real_golds_score_one_as_answers(name: str) -> None:
    prompts, _ = read_prompts(str(DATA / name))
    low = [p.gold for p in prompts if here("math", trace(p.gold, f"\\boxed{{{p.gold}}}")).score != 1.0]
    assert len(low) <= 0, low


def test_hostile_texts_come_back_in_time_and_the_pool_goes_on(pool: VerifierPool) -> None:
    gold, answer = EQUAL[pool.name][0]
    began = time.monotonic()
    for number, text in enumerate(HOSTILE):
        pool.submit(("answer", number), of(pool.name, gold, text))
    golds = HOSTILE[1:4] if needs(pool.name) == "gold" else []
    for number, text in enumerate(golds):
        pool.submit(("gold", number), of(pool.name, text, answer))
    pool.submit("last", of(pool.name, gold, answer))
    verdicts = {}
    while pool.outstanding:
        verdicts.update({key: verdict for key, _, verdict in pool.collect(wait=True)})
    asked = {("answer", n) for n in range(len(HOSTILE))} | {("gold", n) for n in range(len(golds))}
    assert verdicts.keys() == asked | {"last"}
    assert verdicts.pop("last").score == 1.0
    assert all(verdict.score is None or verdict.score < 0.1 for verdict in verdicts.values())
    assert all(verdict.reason for verdict in verdicts.values())
    assert time.monotonic() - began < 12 * (LIMIT + 30)  # each at most its limit and a new worker's start


def test_the_pool_gives_each_trace_its_own_verdict(pool: VerifierPool) -> None:
    gold, right = EQUAL[pool.name][0]
    wrong = WRONG[pool.name][0][1]
    traces = [(n, of(pool.name, gold, right if n % 5 == 2 else f"{wrong} {'?' * n}", n)) for n in range(25)]
    found = {key: (one, verdict) for key, one, verdict in pool.judge_all(iter(traces))}
    assert {key: one for key, (one, _) in found.items()} == dict(traces)
    assert [key for key, (_, verdict) in sorted(found.items()) if verdict.score == 1.0] == [2, 7, 12, 17, 22]
    assert {key: verdict for key, (_, verdict) in found.items()} == {key: here(pool.name, one) for key, one in traces}
    assert pool.outstanding == 0
    assert pool.collect(wait=True) == []


GOLDS: dict[str, list[tuple[str | None, dict[str, Any]]]] = {
    "math": [("42", {}), ("\\frac{", {}), ("7", {})],
    "choice": [("A", META["choice"]), ("C", META["choice"]), ("Q", {})],
    "code_tests": [
        (None, META["code_tests"]),
        (None, {"tests": {**TESTS, "solution": "def inc(x): return x"}}),
        (None, {"tests": {"cases": TESTS["cases"]}}),
    ],
    "reasoning-gym": [
        ("6", META["reasoning-gym"]),
        ("7", META["reasoning-gym"]),
        ("6", META["reasoning-gym"]),
    ],
}


def test_golds_are_checked_before_any_teacher_time(pool: VerifierPool) -> None:
    prompts = [
        Prompt(messages=({"role": "user", "content": str(number)},), gold=gold, meta=meta)
        for number, (gold, meta) in enumerate(GOLDS[pool.name])
    ]
    good, faults = check_golds(prompts, pool)
    assert good == [prompts[0], prompts[2]]
    assert [(prompt, bool(reason)) for prompt, reason in faults] == [(prompts[1], True)]


def test_golds_of_a_users_verifier_are_not_checked() -> None:
    prompt = Prompt(messages=({"role": "user", "content": "?"},), gold="\\frac{")
    assert gold_as_answer(prompt, "own.module:function") is None
    assert needs("own.module:function") is missing(prompt, "own.module:function") is None
    assert missing(prompt, "code_tests")
    assert missing(replace(prompt, gold=None), "math") == GOLD[1]


@pytest.mark.parametrize("name", NEEDS)
def test_auto_finds_the_verifier_by_what_the_prompts_have(name: str) -> None:
    prompt = Prompt(messages=({"role": "user", "content": "?"},), gold="A", meta=META.get(name, {}))
    bare = Prompt(messages=({"role": "user", "content": "??"},))
    assert verifier_name("auto", [prompt, bare, prompt]) == name
    assert verifier_name("auto", [bare]) is None
    assert verifier_name("none", [prompt]) is None
    other = Prompt(messages=prompt.messages, gold="A", meta={} if name != "math" else META["choice"])
    with pytest.raises(UserError, match=r"several verifiers .*name one by --verifier"):
        verifier_name("auto", [prompt, other])
    with pytest.raises(UserError, match="unknown verifier 'maths'"):
        verifier_name("maths", [prompt])


MINE = """
import os, signal, subprocess, sys, time
from distill.records import Verdict


def mine(trace, *, step: int = 1):
    what = trace.answer
    if what == "loop":
        while True:
            pass
    if what == "sleep":
        time.sleep(100)
    if what == "print":
        print("{}")
        os.write(1, b"[1]\\n")
        sys.stdout.flush()
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        sys.exit(3)
    if what == "raise":
        raise ValueError("two\\nlines")
    if what == "memory":
        bytearray(64 << 30)
    if what == "deep":
        return deep(0)
    if what == "none":
        return None
    if what == "text":
        return Verdict(verifier="mine", version="1", score="1.0")
    if what == "high":
        return Verdict(verifier="mine", version="1", score=1.5)
    if what == "nan":
        return Verdict(verifier="mine", version="1", score=float("nan"))
    if what == "object":
        return Verdict(verifier="mine", version="1", score=1.0, predicted=object())
    return Verdict(verifier="mine", version="1", score=1.0, predicted=what)


def deep(n):
    return deep(n + 1)


def together(traces, *, step=1):
    if traces[0].answer == "few":
        return ()
    if traces[0].answer == "raise":
        raise ValueError("no")
    if traces[0].answer == "sleep":
        time.sleep(100)
    return tuple(Verdict(verifier="t", version="1", score=1.0, predicted=str(len(traces) * step)) for t in traces)


together.unit = "prompt"
"""
FAULTS = {
    "loop": "timeout",
    "sleep": "timeout",
    "kill": "the verifier's process died",
    "exit": "the verifier's process died",
    "raise": "ValueError: two lines",
    "memory": "MemoryError: ",
    "deep": "RecursionError: maximum recursion depth exceeded",
    "none": "TypeError: returned NoneType, not a Verdict",
    "text": "TypeError: ",
    "high": "ValueError: score 1.5 outside [0, 1]",
    "nan": "ValueError: score nan outside [0, 1]",
    "object": "TypeError: ",
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the user's module in it, from where the command is run."""
    (tmp_path / "own_verifier.py").write_text(MINE)
    (tmp_path / "own_broken.py").write_text("raise RuntimeError('at import')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))))


@pytest.mark.usefixtures("own")
def test_whatever_a_users_function_does_the_pool_goes_on() -> None:
    asked = [what for fault in FAULTS for what in (fault, "fine")] + ["print", "fine"]
    with VerifierPool("own_verifier:mine", workers=2, limit_seconds=1.0) as pool:
        verdicts = {key: verdict for key, _, verdict in pool.judge_all((n, trace("1", a)) for n, a in enumerate(asked))}
    assert len(verdicts) == len(asked)
    for number, what in enumerate(asked):
        verdict = verdicts[number]
        if what in FAULTS:
            assert verdict.score is None
            assert verdict.reason.startswith(FAULTS[what]), (what, verdict)
        else:
            assert verdict == Verdict(verifier="mine", version="1", score=1.0, predicted=what)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_verifier:mien", "has no 'mien'; did you mean 'mine'"),
        ("own_absent:f", "cannot import 'own_absent'"),
        ("own_broken:f", "cannot import 'own_broken'.*RuntimeError: at import"),
        ("maths", "unknown verifier 'maths': known are math, .*; did you mean 'math'"),
        ("judge", "'judge' asks a model"),
    ],
)
def test_a_verifier_that_cannot_be_had_is_one_line(name: str, message: str) -> None:
    with VerifierPool(name) as pool:
        pool.submit(0, trace("1", "1"))
        with pytest.raises(UserError, match=message):
            pool.collect(wait=True)


@pytest.mark.usefixtures("own")
def test_options_reach_the_verifier_and_unknown_ones_are_refused() -> None:
    with VerifierPool("own_verifier:together", options={"step": 3}) as pool:
        pool.submit(0, trace("1", "1"))
        ((_, _, verdict),) = pool.collect(wait=True)
        assert verdict.predicted == "3"
    for name, options, message in (
        ("own_verifier:mine", {"stop": 3}, "takes no option 'stop': accepted are step; did you mean 'step'"),
        ("math", {"step": 3}, "verifier 'math' takes no option 'step': accepted are none"),
    ):
        with VerifierPool(name, options=options) as pool:
            pool.submit(0, trace("1", "1"))
            with pytest.raises(UserError, match=message):
                pool.collect(wait=True)


@pytest.mark.usefixtures("own")
def test_a_verifier_of_whole_prompts_sees_them_whole() -> None:
    groups = {what: tuple(trace("1", what, n) for n in range(3)) for what in ("fine", "few", "raise", "sleep", "last")}
    with VerifierPool("own_verifier:together", limit_seconds=0.7) as pool:
        found = {key: (traces, verdicts) for key, traces, verdicts in pool.judge_groups(groups.items())}
        pool.submit_group("single", groups["fine"])
        assert [(key, verdict.predicted) for key, _, verdict in pool.collect(wait=True)] == [("single", "3")] * 3
    assert {key: traces for key, (traces, _) in found.items()} == groups
    reasons = {key: {(verdict.score, verdict.reason) for verdict in verdicts} for key, (_, verdicts) in found.items()}
    assert reasons == {
        "fine": {(1.0, "")},
        "few": {(None, "ValueError: returned 0 verdicts for 3 traces")},
        "raise": {(None, "ValueError: no")},
        "sleep": {(None, "timeout")},
        "last": {(1.0, "")},
    }
    assert all(len(verdicts) == 3 for _, verdicts in found.values())


@pytest.mark.usefixtures("own")
def test_a_worker_that_dies_before_it_reads_takes_no_verdict_with_it() -> None:
    with VerifierPool("own_verifier:mine") as pool:
        pool.submit("first", trace("1", "fine"))
        assert [key for key, _, _ in pool.collect(wait=True)] == ["first"]
        (worker,) = pool.workers
        os.kill(worker.process.pid, signal.SIGSTOP)
        pool.submit("second", trace("1", "fine"))
        pool._assign(now=True)
        assert worker.jobs  # the pool has handed it over
        os.kill(worker.process.pid, signal.SIGKILL)
        ((key, _, verdict),) = pool.collect(wait=True)
        assert (key, verdict.score) == ("second", 1.0)
        (worker,) = pool.workers
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        pool.submit("third", trace("1", "fine"))  # into a broken pipe
        assert [(key, verdict.score) for key, _, verdict in pool.collect(wait=True)] == [("third", 1.0)]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("fault", ["sleep", "kill"])
def test_jobs_that_are_handed_over_together_stand_and_fall_apart(fault: str) -> None:
    asked = ["fine", fault, "fine", "raise", *["fine"] * (AT_ONCE - 4)]
    with VerifierPool("own_verifier:mine", limit_seconds=1.0) as pool:
        for number, what in enumerate(asked):
            pool.submit(number, trace("1", what))
        verdicts = {}
        while pool.outstanding:
            verdicts |= {key: verdict for key, _, verdict in pool.collect(wait=True)}
    assert [verdicts[number].score for number in range(AT_ONCE)] == [1.0 if what == "fine" else None for what in asked]
    assert verdicts[1].reason == FAULTS[fault]


@pytest.mark.usefixtures("own")
def test_nobody_waits_to_hand_over_a_long_text_behind_a_hanging_one() -> None:
    texts = ["sleep", *["x" * 300_000] * 3]
    with VerifierPool("own_verifier:mine", limit_seconds=1.0) as pool:
        for number, what in enumerate(texts):
            pool.submit(number, trace("1", what))
        found = [(key, verdict.reason) for _ in texts for key, _, verdict in pool.collect(wait=True)]
    assert found[0] == (0, "timeout")
    assert sorted(key for key, _ in found) == [0, 1, 2, 3]


@pytest.mark.usefixtures("own")
def test_a_job_that_nobody_waits_for_is_judged_in_the_end() -> None:
    with VerifierPool("own_verifier:mine") as pool:
        pool.submit("first", trace("1", "fine"))
        found: list[Any] = []
        end = time.monotonic() + 60
        while not found and time.monotonic() < end:
            found = pool.collect()
        assert [key for key, _, _ in found] == ["first"]


def test_a_verifier_is_in_no_session_of_its_own() -> None:
    """Linux shares out the processor by sessions first; but Ctrl-C, which goes to a group, must not reach it."""
    with VerifierPool("math") as pool:
        (worker,) = pool.workers
        pid = worker.process.pid
        assert os.getsid(pid) == os.getsid(0)
        assert os.getpgid(pid) == pid != os.getpgid(0)


def test_a_worker_that_does_not_start_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_dying.py").write_text("import os\nos._exit(1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))))
    with VerifierPool("own_dying:f") as pool:
        pool.submit(0, trace("1", "1"))
        with pytest.raises(RunError, match="does not start"):
            pool.collect(wait=True)


def test_the_pool_leaves_no_process() -> None:
    with VerifierPool("math", workers=2) as pool:
        processes = [worker.process for worker in pool.workers]
    assert all(process.poll() is not None for process in processes)


def test_a_verdict_survives_its_line() -> None:
    verdict = here("math", trace("42", "\\boxed{42}"))
    row = replace(trace("42", "\\boxed{42}"), verdicts=(verdict,)).to_json()
    assert Trace.from_json(json.loads(json.dumps(row))).verdicts == (verdict,)
