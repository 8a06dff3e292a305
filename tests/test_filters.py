"""Keep or reject: every filter fires when it should and only then, and no order of the journal changes a decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import UserError
from distill.records import Trace, Verdict
from teachers.filters import FILTERS, KeepRule, make_judge, parse_drop, parse_keep, with_flags

ANY = KeepRule(correct=False)
CORRECT = KeepRule(correct=True)


def trace(
    index: int = 0, *, prompt: str = "p", text: str = "<think>1+1</think>2", score: float | None = 1.0, tokens: int = 5
) -> Trace:
    """Return sample `index` of a prompt, judged with `score`, its completion split."""
    verdict = Verdict(verifier="v", version="1", score=score)
    made = Trace(
        uid=f"{prompt}-{index}",
        prompt_uid=prompt,
        messages=({"role": "user", "content": prompt},),
        completion=text,
        reasoning="",
        answer="",
        finish_reason="stop",
        num_prompt_tokens=3,
        num_completion_tokens=tokens,
        sample_index=index,
        seed=0,
        teacher="t",
        backend="b",
        verdicts=(verdict,),
    )
    return with_flags(made, reasoning="auto")


# What each filter must reject out of a pair, and its sibling that must stay. A new filter needs its line here.
FIRES: dict[str, Callable[[], tuple[Trace, Trace]]] = {
    "truncated": lambda: (replace(trace(1), finish_reason="length"), trace(0)),
    "malformed": lambda: (trace(1, text="<think>1+1"), trace(0)),
    "duplicate": lambda: (trace(1, text="<think>1+1</think>\n 2"), trace(0, text="<think>1+1</think> 2")),
}


def test_every_filter_has_its_case() -> None:
    assert FIRES.keys() == FILTERS.keys()


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_rejects_its_case_and_no_other(name: str) -> None:
    bad, good = FIRES[name]()
    judge = make_judge([bad, good], keep=ANY, drop=[name])
    assert (judge(bad), judge(good)) == ((name,), ())
    judge = make_judge([bad, good], keep=ANY, drop=[])
    assert (judge(bad), judge(good)) == ((), ())
    assert FILTERS[name].__doc__


@pytest.mark.parametrize(
    ("text", "reasoning", "flag"),
    [
        ("2", "think", "malformed: no <think>"),
        ("2", "auto", "no <think>"),
        ("", "none", "malformed: empty answer"),
        (" \n", "none", "malformed: empty answer"),
        ("<think>a</think>", "auto", "malformed: empty answer"),
        ("<think>a", "none", "malformed: unclosed <think>"),
        ("<think>a</think>\ud800", "think", "malformed: a lone surrogate"),
        ("2", "none", None),
        ("<think>a</think>2", "think", None),
        ("<think>a</think>2", "auto", None),
    ],
)
def test_flags_name_what_is_malformed(text: str, reasoning: str, flag: str | None) -> None:
    flagged = with_flags(trace(text=text), reasoning=reasoning)
    assert flagged.flags == ((flag,) if flag else ())
    assert with_flags(flagged, reasoning=reasoning) == flagged


@given(tagged=st.integers(0, 6), plain=st.integers(0, 6), cut=st.integers(0, 6))
def test_missing_tags_are_a_fault_where_most_complete_traces_have_them(tagged: int, plain: int, cut: int) -> None:
    made = [trace(i, text=f"<think>{i}</think>2") for i in range(tagged)]
    made += [trace(10 + i, text=f"2 {i}", tokens=1) for i in range(plain)]
    made += [replace(trace(20 + i, text=f"3 {i}"), finish_reason="length") for i in range(cut)]
    for keep in (ANY, KeepRule(correct=False, best_of=1)):
        judge = make_judge(made, keep=keep, drop=["truncated", "malformed"])
        for one in made:
            untagged = "<think>" not in one.completion
            assert ("malformed" in judge(one)) == (untagged and tagged > plain)
    kept = [one for one in made if not judge(one)]
    wanted = "<think>" in made[0].completion if tagged > plain else True
    assert len(kept) == (1 if tagged + plain else 0)
    assert not kept or tagged <= plain or ("<think>" in kept[0].completion) == wanted


TEXTS = st.sampled_from(["<think>a</think>2", "<think>a</think>  2", "<think>b</think>2", "<think>c</think>3"])


@given(data=st.data(), texts=st.lists(st.tuples(st.sampled_from("pq"), TEXTS), max_size=8))
def test_of_equal_samples_the_lowest_index_stays_in_any_order(
    data: st.DataObject, texts: list[tuple[str, str]]
) -> None:
    traces = [trace(index, prompt=prompt, text=text) for index, (prompt, text) in enumerate(texts)]
    first: dict[tuple[str, str], str] = {}
    for one in traces:
        first.setdefault((one.prompt_uid, " ".join(one.completion.split())), one.uid)
    shuffled = data.draw(st.permutations(traces))
    judge = make_judge(shuffled, keep=ANY, drop=["duplicate"])
    assert {t.uid for t in shuffled if not judge(t)} == set(first.values())


SAMPLES = st.tuples(st.sampled_from("pq"), TEXTS, st.sampled_from([0.0, 1.0, None]), st.integers(1, 4), st.booleans())


@given(data=st.data(), samples=st.lists(SAMPLES, max_size=10), n=st.integers(1, 3))
@settings(deadline=None)
def test_best_of_keeps_the_shortest_correct_in_any_order(data: st.DataObject, samples: list, n: int) -> None:
    traces = []
    for index, (prompt, text, score, tokens, cut) in enumerate(samples):
        made = trace(index, prompt=prompt, text=text, score=score, tokens=tokens)
        traces.append(replace(made, finish_reason="length" if cut else "stop"))
    drop = ["truncated", "duplicate"]
    shuffled = data.draw(st.permutations(traces))
    judge = make_judge(shuffled, keep=KeepRule(correct=True, best_of=n), drop=drop)
    plain = make_judge(traces, keep=CORRECT, drop=drop)
    for prompt in "pq":
        good = [t for t in traces if t.prompt_uid == prompt and not plain(t)]
        best = sorted(good, key=lambda t: (t.num_completion_tokens, t.sample_index))[:n]
        assert {t.uid for t in traces if t.prompt_uid == prompt and not judge(t)} == {t.uid for t in best}
        for one in good:
            assert judge(one) in ((), ("not_selected",))
    for one in traces:
        if plain(one):
            assert judge(one) == plain(one)  # a rejected sample keeps its own reasons
    assert [judge(t) for t in traces] == [judge(t) for t in traces]


@pytest.mark.parametrize(("score", "reason"), [(None, "unverified"), (0.0, "wrong"), (0.99, "wrong"), (1.0, None)])
@pytest.mark.parametrize("keep", [CORRECT, KeepRule(correct=True, best_of=1), ANY])
def test_only_a_score_of_one_is_correct(score: float | None, reason: str | None, keep: KeepRule) -> None:
    one = trace(score=score)
    judge = make_judge([one], keep=keep, drop=[])
    assert judge(one) == ((reason,) if reason and keep.correct else ())


def test_an_unjudged_trace_is_unverified() -> None:
    one = replace(trace(), verdicts=())
    assert make_judge([one], keep=CORRECT, drop=[])(one) == ("unverified",)


def test_reasons_come_in_the_order_of_the_filters_and_the_verdict_last() -> None:
    one = replace(trace(1, text="<think>1", score=0.0), finish_reason="length")
    twin = replace(one, uid="p-0", sample_index=0)
    judge = make_judge([one, twin], keep=CORRECT, drop=["truncated", "malformed", "duplicate"])
    assert judge(one) == ("truncated", "malformed", "duplicate", "wrong")
    assert judge(twin) == ("truncated", "malformed", "wrong")


def test_a_failed_sample_is_no_sibling() -> None:
    failed = replace(trace(0), error="the engine died")
    assert make_judge([failed, trace(1)], keep=ANY, drop=["duplicate"])(trace(1)) == ()


def test_keep_rules() -> None:
    assert parse_keep("correct") == CORRECT
    assert parse_keep("any") == ANY
    assert parse_keep("best-of:12") == KeepRule(correct=True, best_of=12)


@pytest.mark.parametrize(
    "text", ["", "corect", "best-of", "best-of:", "best-of:0", "best-of:-1", "best-of:1.5", "best_of:2", "Any"]
)
def test_an_unknown_keep_rule_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="--keep takes correct, any or best-of:N, not"):
        parse_keep(text)


def test_a_near_keep_rule_is_suggested() -> None:
    with pytest.raises(UserError, match="did you mean 'correct'"):
        parse_keep("corect")


def test_drop_lists() -> None:
    assert parse_drop("truncated, duplicate ,") == ["truncated", "duplicate"]
    assert parse_drop("none") == parse_drop("") == []


@pytest.mark.parametrize("text", ["truncatd", "truncated,loops", "none,truncated", "Truncated", "no.such:filter"])
def test_an_unknown_filter_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"unknown filter|cannot import"):
        parse_drop(text)


def test_a_filter_of_ones_own() -> None:
    name = f"{__name__}:too_long"
    judge = make_judge([trace(tokens=9)], keep=ANY, drop=parse_drop(name))
    assert (judge(trace(tokens=9)), judge(trace(tokens=3))) == ((name,), ())


def too_long(trace: Trace, siblings: object) -> bool:
    """Reject above 8 tokens."""
    return trace.num_completion_tokens > 8
