"""What is drawn: fixed plans and adaptive ones, on any history of verdicts, interrupted anywhere."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from distill.records import Completion, Prompt, Trace, Verdict
from teachers.backend import Request
from teachers.plan import AdaptivePlan, Author, FixedPlan, Plan
from teachers.sampling import trace_of

AUTHOR = Author(name="a", location="a", identity="a")
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_completion_length": None}
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(0, 4), st.integers(0, 2))
LENGTH = 10


def prompts(count: int) -> list[Prompt]:
    return [Prompt(messages=({"role": "user", "content": str(index)},), gold="1") for index in range(count)]


def answered(request: Request, right: bool | None) -> Trace:
    """A sample that is right, wrong, or (None) failed."""
    completion = Completion(
        text="1",
        finish_reason="stop",
        num_prompt_tokens=1,
        num_completion_tokens=LENGTH,
        error="dead" if right is None else None,
    )
    trace = trace_of(request, completion, AUTHOR, "test")
    return trace if right is None else replace(trace, verdicts=(Verdict(verifier="v", version="1", score=right),))


def work(
    plan: Plan, outcome: Callable[[Request], bool | None], rng: random.Random, room: int, stop: int | None = None
) -> list[Trace]:
    """Draw a plan with up to `room` requests in flight, answered in any order; return the journal.

    A request in flight when `stop` samples are journaled is lost, as by a kill.
    """
    held: list[Request] = []
    journal: list[Trace] = []
    while stop is None or len(journal) < stop:
        while len(held) < room and (request := plan.next()) is not None:
            held.append(request)
        if not held:
            assert not plan.waiting
            break
        request = held.pop(rng.randrange(len(held)))
        journal.append(answered(request, outcome(request)))
        plan.settle(journal[-1])
    return journal


def adaptive(count: int, correct: int, extra: int, ahead: int) -> AdaptivePlan:
    return AdaptivePlan(prompts(count), AUTHOR, SAMPLING, 0, correct=correct, most=correct + extra, ahead=ahead)


def by_fate(rng_seed: int) -> Callable[[Request], bool | None]:
    """Whether a sample is right depends on the sample alone, not on when it is drawn."""
    return lambda request: random.Random(f"{rng_seed}{request.uid}").choice([True, False, False, None])


@given(sizes=SIZES, seed=st.integers(0, 9999), room=st.integers(1, 9), stop=st.integers(0, 40))
def test_adaptive_draws_until_enough_are_right_and_no_more(
    sizes: tuple[int, int, int, int], seed: int, room: int, stop: int
) -> None:
    """Killed and resumed or not: every prompt ends solved or exhausted, no sample is drawn twice, none is wasted."""
    count, correct, extra, ahead = sizes
    rng, outcome = random.Random(seed), by_fate(seed)
    journal = work(adaptive(*sizes), outcome, rng, room, stop)
    kept = [trace for trace in journal if trace.error is None]
    plan = adaptive(*sizes)
    assert plan.resume(kept) == len(kept)
    journal = kept + work(plan, outcome, rng, room)
    assert max(Counter(trace.uid for trace in journal).values()) == 1
    assert plan.progress == (count, count)
    for prompt in prompts(count):
        samples = [trace for trace in journal if trace.prompt_uid == prompt.uid]
        right = sum(trace.score == 1.0 for trace in samples)
        assert right >= correct or len(samples) == correct + extra
        # What is in flight when the last right one comes in can be at most `ahead` too many, before and after a kill.
        assert right <= correct + ahead
    summary = plan.summary()
    assert summary["solved"] + summary["exhausted"] == count
    assert summary["samples"] == len(journal)
    assert summary["samples_saved"] == count * (correct + extra) - len(journal)
    assert summary["tokens_saved"] == LENGTH * summary["samples_saved"]


@given(sizes=SIZES, seed=st.integers(0, 9999), room=st.integers(1, 9))
def test_without_ahead_nothing_is_drawn_after_a_prompt_is_solved(
    sizes: tuple[int, int, int, int], seed: int, room: int
) -> None:
    """However answers interleave: a sample is only in flight while its prompt lacks that many right ones."""
    count, correct, extra, _ = sizes
    journal = work(adaptive(count, correct, extra, 0), by_fate(seed), random.Random(seed), room)
    for prompt in prompts(count):
        scores = [trace.score == 1.0 for trace in journal if trace.prompt_uid == prompt.uid]
        assert sum(scores) <= correct
        assert scores[-1] or len(scores) == correct + extra  # the last one drawn was the one that was missing


def test_what_was_begun_comes_first() -> None:
    """A wrong answer's prompt is drawn again before a fresh prompt is."""
    plan = adaptive(3, 1, 3, 0)
    first = plan.next()
    assert first is not None
    plan.settle(answered(first, False))
    again = plan.next()
    assert again is not None
    assert (again.prompt, again.sample_index) == (first.prompt, 1)
    fresh = plan.next()
    assert fresh is not None
    assert fresh.prompt != first.prompt


def test_an_earlier_run_of_a_fixed_number_counts() -> None:
    """The uids are the same, so samples of `-n` serve an adaptive plan; those of other settings do not."""
    fixed = FixedPlan(prompts(2), 2, AUTHOR, SAMPLING, 0)
    journal = work(fixed, lambda request: request.sample_index == 1, random.Random(0), 1)
    plan = adaptive(2, 1, 3, 0)
    assert plan.resume(journal) == 4
    assert plan.next() is None
    assert plan.progress == (2, 2)
    hotter = AdaptivePlan(prompts(2), AUTHOR, {**SAMPLING, "temperature": 2.0}, 0, correct=1, most=4)
    assert hotter.resume(journal) == 0
    assert hotter.progress == (0, 2)


@given(n=st.integers(1, 4), more=st.integers(0, 3), stop=st.integers(0, 12), seed=st.integers(0, 99))
def test_a_fixed_plan_draws_only_the_difference(n: int, more: int, stop: int, seed: int) -> None:
    """Stopped anywhere, extended and reordered: each sample once."""
    rng = random.Random(seed)
    journal = work(FixedPlan(prompts(3), n, AUTHOR, SAMPLING, 0), lambda _: True, rng, 3, stop)
    plan = FixedPlan(prompts(5)[::-1], n + more, AUTHOR, SAMPLING, 0)
    assert plan.resume(journal) == len(journal)
    journal += work(plan, lambda _: True, rng, 3)
    assert len(journal) == len({trace.uid for trace in journal}) == 5 * (n + more)
    assert plan.progress == (5 * (n + more), 5 * (n + more))
