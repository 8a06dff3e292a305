"""Verifiers: golds score 1, rubbish never does, and no text and no user function stops the pool."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.errors import RunError, UserError
from distill.records import Prompt, Trace, Verdict
from distill.tables import lookup
from teachers.prompts import read_prompts
from teachers.sampling import check_golds
from teachers.verifiers import VERIFIERS
from teachers.verifiers.pool import VerifierPool
from teachers.verifiers.worker import judge

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
LIMIT = 2.5

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
    ]
}
WRONG: dict[str, list[tuple[str, str]]] = {
    "math": [
        ("42", "\\boxed{43}"),
        ("42", "no idea"),
        ("42", ""),
        ("42", "42 or 43"),
        ("42", "\\boxed{42}, \\boxed{43}"),
        ("(1,2)", "\\boxed{(2,1)}"),
    ]
}
UNREADABLE: dict[str, list[str | None]] = {"math": [None, "", " ", "\\frac{", "}{", "???", "\ud800"]}
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


def here(name: str, one: Trace) -> Verdict:
    """Judge in this process, as the worker does."""
    return judge(lookup(VERIFIERS, name, "verifier"), name, one)


@pytest.fixture(scope="module", params=VERIFIERS)
def pool(request: pytest.FixtureRequest) -> Iterator[VerifierPool]:
    """One worker of each registered verifier, shared, because it takes seconds to start."""
    with VerifierPool(request.param, limit_seconds=LIMIT) as opened:
        yield opened


def test_every_verifier_has_its_cases() -> None:
    assert EQUAL.keys() == WRONG.keys() == UNREADABLE.keys() == VERIFIERS.keys()


@pytest.mark.parametrize(("name", "gold", "answer"), cases(EQUAL))
def test_what_equals_the_gold_scores_one(name: str, gold: str, answer: str) -> None:
    verdict = here(name, trace(gold, answer))
    assert verdict.score == 1.0, verdict
    assert verdict.predicted
    assert (verdict.verifier, bool(verdict.version)) == (name, True)
    assert here(name, trace(gold, answer)) == verdict


@pytest.mark.parametrize(("name", "gold", "answer"), cases(WRONG))
def test_what_differs_scores_zero(name: str, gold: str, answer: str) -> None:
    assert here(name, trace(gold, answer)).score == 0.0


@pytest.mark.parametrize(("name", "gold"), cases(UNREADABLE))
def test_an_unreadable_gold_gives_no_score_even_to_itself(name: str, gold: str | None) -> None:
    for answer in (gold or "", f"\\boxed{{{gold}}}", "42"):
        verdict = here(name, trace(gold, answer))
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
        pool.submit(("answer", number), trace(gold, text))
    for number, text in enumerate(HOSTILE[1:4]):
        pool.submit(("gold", number), trace(text, answer))
    pool.submit("last", trace(gold, answer))
    verdicts = {}
    while pool.outstanding:
        verdicts.update({key: verdict for key, _, verdict in pool.collect(wait=True)})
    assert verdicts.keys() == {("answer", n) for n in range(len(HOSTILE))} | {("gold", n) for n in range(3)} | {"last"}
    assert verdicts.pop("last").score == 1.0
    assert all(verdict.score in (None, 0.0) for verdict in verdicts.values())
    assert all(verdict.reason for verdict in verdicts.values())
    assert time.monotonic() - began < 12 * (LIMIT + 30)  # each at most its limit and a new worker's start


def test_the_pool_gives_each_trace_its_own_verdict(pool: VerifierPool) -> None:
    gold, _ = EQUAL[pool.name][0]
    traces = [(n, trace(gold, f"\\boxed{{{40 + n % 5}}}", n)) for n in range(25)]
    found = {key: (one, verdict) for key, one, verdict in pool.judge_all(iter(traces))}
    assert {key: one for key, (one, _) in found.items()} == dict(traces)
    assert [key for key, (_, verdict) in sorted(found.items()) if verdict.score == 1.0] == [2, 7, 12, 17, 22]
    assert {key: verdict for key, (_, verdict) in found.items()} == {key: here(pool.name, one) for key, one in traces}
    assert pool.outstanding == 0
    assert pool.collect(wait=True) == []


def test_golds_are_checked_before_any_teacher_time(pool: VerifierPool) -> None:
    prompts = [Prompt(messages=({"role": "user", "content": gold},), gold=gold) for gold in ("42", "\\frac{", "7")]
    good, faults = check_golds(prompts, pool)
    assert [p.gold for p in good] == ["42", "7"]
    assert [(p.gold, bool(reason)) for p, reason in faults] == [("\\frac{", True)]


MINE = """
import os, signal, subprocess, sys, time
from distill.records import Verdict


def mine(trace):
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
        ("maths", "unknown verifier 'maths': known are math; did you mean 'math'"),
    ],
)
def test_a_verifier_that_cannot_be_had_is_one_line(name: str, message: str) -> None:
    with VerifierPool(name) as pool:
        pool.submit(0, trace("1", "1"))
        with pytest.raises(UserError, match=message):
            pool.collect(wait=True)


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
