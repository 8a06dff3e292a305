"""Keep or reject: every filter fires when it should and only then, and no order of the journal changes a decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import UserError
from distill.records import Judgement, Trace, Verdict
from teachers.filters import (
    DEFAULT_DROP,
    FILTERS,
    EvaluationIndex,
    FilterOptions,
    Judge,
    KeepRule,
    Siblings,
    dropping,
    first_reason,
    make_judge,
    parse_band,
    parse_drop,
    parse_keep,
    with_flags,
)
from teachers.filters.keep import farthest_points
from teachers.filters.near_duplicates import signature
from teachers.nano import problems

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


def thinking(thoughts: str, index: int = 1, **more: Any) -> Trace:
    """Return a trace with these thoughts."""
    return trace(index, text=f"<think>{thoughts}</think>2", **more)


LONG_STORY = " ".join(f"word{i}" for i in range(200))
INDEX = EvaluationIndex([("test.jsonl", "test.jsonl:1", "How many plums has Ann?")])
OPTIONS = FilterOptions(length=(2, 8), pass_rate=(0.1, 0.9))

# What each filter must reject out of a pair, and its sibling that must stay. A new filter needs its line here.
FIRES: dict[str, Callable[[], tuple[Trace, Trace]]] = {
    "truncated": lambda: (replace(trace(1), finish_reason="length"), trace(0)),
    "malformed": lambda: (trace(1, text="<think>1+1"), trace(0)),
    "loop": lambda: (thinking("Wait, let me check. " * 40), trace(0)),
    "contaminated": lambda: (trace(1, prompt="Think. How many plums has Ann?", score=0.0), trace(0)),
    "length": lambda: (trace(1, tokens=9), trace(0, tokens=8)),
    "pass_rate": lambda: (trace(1, prompt="hard", score=0.0), trace(0, score=None)),
    "language_mix": lambda: (thinking("we add one and 因此 get two"), trace(0, text="<think>α×β</think>2")),
    "long_paragraph": lambda: (thinking("a b " * 999 + "c"), thinking("a\nb\n" * 2000, 0)),
    "code_block": lambda: (thinking("so\n```python\n1+1\n```\n"), thinking("so ``` in a line", 0)),
    "duplicate": lambda: (trace(1, text="<think>1+1</think>\n 2"), trace(0, text="<think>1+1</think> 2")),
    "near_duplicate": lambda: (
        thinking(LONG_STORY + " end"),
        trace(0, prompt="q", text=f"<think>{LONG_STORY}</think>2"),
    ),
}


def test_every_filter_has_its_case() -> None:
    assert FIRES.keys() == FILTERS.keys()


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_rejects_its_case_and_no_other(name: str) -> None:
    bad, good = FIRES[name]()
    one = {"length": FilterOptions(length=(2, 8)), "pass_rate": FilterOptions(pass_rate=(0.1, 0.9))}.get(name)
    index = INDEX if name == "contaminated" else None
    judge = make_judge([bad, good], keep=ANY, drop=[name], options=one, index=index)
    assert (judge(bad).reasons, judge(good).reasons) == ((name,), ())
    assert name in {flag.partition(":")[0] for flag in judge(bad).flags}
    assert name not in {flag.partition(":")[0] for flag in judge(good).flags}
    judge = make_judge([bad, good], keep=ANY, drop=[])
    assert (judge(bad).reasons, judge(good).reasons) == ((), ())
    assert FILTERS[name].__doc__


def test_what_does_not_drop_flags_and_costly_filters_run_only_where_they_drop() -> None:
    for name in FILTERS:
        bad, good = FIRES[name]()
        judge = make_judge([bad, good], keep=ANY, drop=["truncated"], options=FilterOptions())
        needs_more = name in ("near_duplicate", "contaminated", "length", "pass_rate")
        assert (name in {flag.partition(":")[0] for flag in judge(bad).flags}) == (not needs_more)


def test_a_journal_from_before_the_flags_is_judged_as_a_new_one() -> None:
    for name in ("loop", "language_mix", "long_paragraph", "code_block"):
        bad, good = FIRES[name]()
        assert name in bad.flags
        assert name not in good.flags
        old = replace(bad, flags=tuple(flag for flag in bad.flags if flag != name))
        stale = replace(good, flags=(*good.flags, name))
        for drop in ([name], []):
            judge = make_judge([bad, good], keep=ANY, drop=drop)
            assert judge(old) == judge(bad)
            assert judge(stale) == judge(good)


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
            assert ("malformed" in judge(one).reasons) == (untagged and tagged > plain)
    kept = [one for one in made if not judge(one).reasons]
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
    assert {t.uid for t in shuffled if not judge(t).reasons} == set(first.values())


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
        good = [t for t in traces if t.prompt_uid == prompt and not plain(t).reasons]
        best = sorted(good, key=lambda t: (t.num_completion_tokens, t.sample_index))[:n]
        assert {t.uid for t in traces if t.prompt_uid == prompt and not judge(t).reasons} == {t.uid for t in best}
        for one in good:
            assert judge(one).reasons in ((), ("not_selected",))
    for one in traces:
        if plain(one).reasons:
            assert judge(one) == plain(one)  # a rejected sample keeps its own reasons
    assert [judge(t) for t in traces] == [judge(t) for t in traces]


@pytest.mark.parametrize(("score", "reason"), [(None, "unverified"), (0.0, "wrong"), (0.99, "wrong"), (1.0, None)])
@pytest.mark.parametrize("keep", [CORRECT, KeepRule(correct=True, best_of=1), ANY])
def test_only_a_score_of_one_is_correct(score: float | None, reason: str | None, keep: KeepRule) -> None:
    one = trace(score=score)
    judge = make_judge([one], keep=keep, drop=[])
    assert judge(one).reasons == ((reason,) if reason and keep.correct else ())


def test_an_unjudged_trace_is_unverified() -> None:
    one = replace(trace(), verdicts=())
    assert make_judge([one], keep=CORRECT, drop=[])(one).reasons == ("unverified",)


def test_reasons_come_in_the_order_of_the_filters_and_the_verdict_last() -> None:
    one = replace(trace(1, text="<think>1", score=0.0), finish_reason="length")
    twin = replace(one, uid="p-0", sample_index=0)
    judge = make_judge([one, twin], keep=CORRECT, drop=["truncated", "malformed", "duplicate"])
    assert judge(one).reasons == ("truncated", "malformed", "duplicate", "wrong")
    assert judge(one).flags == ("malformed: unclosed <think>", "truncated", "duplicate")
    assert judge(twin).reasons == ("truncated", "malformed", "wrong")


def test_a_failed_sample_is_no_sibling() -> None:
    failed = replace(trace(0), error="the engine died")
    assert make_judge([failed, trace(1)], keep=ANY, drop=["duplicate"])(trace(1)).reasons == ()


def test_keep_rules() -> None:
    assert parse_keep("correct") == CORRECT
    assert parse_keep("any") == ANY
    assert parse_keep("best-of:12") == KeepRule(correct=True, best_of=12)
    assert parse_keep("diverse:3") == KeepRule(correct=True, diverse=3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "corect",
        "best-of",
        "best-of:",
        "best-of:0",
        "best-of:-1",
        "best-of:1.5",
        "best_of:2",
        "Any",
        "diverse",
        "diverse:0",
    ],
)
def test_an_unknown_keep_rule_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="--keep takes correct, any, best-of:N or diverse:N, not"):
        parse_keep(text)


def test_a_near_keep_rule_is_suggested() -> None:
    with pytest.raises(UserError, match="did you mean 'correct'"):
        parse_keep("corect")


def test_drop_lists() -> None:
    assert parse_drop("truncated, duplicate ,") == ["truncated", "duplicate"]
    assert parse_drop("none") == parse_drop("") == []
    assert parse_drop("truncated,truncated") == ["truncated"]
    assert parse_drop(DEFAULT_DROP) == ["truncated", "malformed", "loop", "contaminated"]


@pytest.mark.parametrize("text", ["truncatd", "truncated,loopy", "none,truncated", "Truncated", "no.such:filter"])
def test_an_unknown_filter_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"unknown filter|cannot import"):
        parse_drop(text)


def test_a_filter_of_ones_own() -> None:
    name = f"{__name__}:too_long"
    judge = make_judge([trace(tokens=9)], keep=ANY, drop=parse_drop(name))
    assert (judge(trace(tokens=9)).reasons, judge(trace(tokens=3)).reasons) == ((name,), ())
    assert name in judge(trace(tokens=9)).flags


def too_long(trace: Trace, siblings: object) -> bool:
    """Reject above 8 tokens."""
    return trace.num_completion_tokens > 8


@pytest.mark.parametrize(
    ("text", "kind", "band"),
    [
        ("16:4096", "length", (16, 4096)),
        ("16:", "length", (16, float("inf"))),
        (":4096", "length", (0, 4096)),
        ("7:7", "length", (7, 7)),
        ("0.1:0.9", "pass-rate", (0.1, 0.9)),
        (".5:", "pass-rate", (0.5, 1.0)),
        (":0", "pass-rate", (0.0, 0.0)),
        ("1:1.0", "pass-rate", (1.0, 1.0)),
    ],
)
def test_bands(text: str, kind: str, band: tuple[float, float]) -> None:
    assert parse_band(text, kind) == band


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *((text, "length") for text in ("", ":", "16", "a:b", "-1:5", "5:4", "1.5:2", "1:2:3", "1e3:", "٣:٤")),
        *(
            (text, "pass-rate")
            for text in ("", ":", "0.5", "0.9:0.1", "1.1:", ":2", "-0.1:1", "nan:1", "0:inf", "50%:")
        ),
    ],
)
def test_what_is_no_band_is_one_line(text: str, kind: str) -> None:
    with pytest.raises(UserError, match=f"^--{kind} "):
        parse_band(text, kind)


def test_an_option_makes_its_filter_drop_and_a_filter_needs_its_option() -> None:
    assert dropping(["truncated"], OPTIONS, index=True) == ["truncated", "length", "pass_rate", "contaminated"]
    assert dropping(["length", "truncated"], OPTIONS, index=False) == ["length", "truncated", "pass_rate"]
    assert dropping(["contaminated"], FilterOptions(), index=False) == ["contaminated"]
    for name, flag in (("length", "--length"), ("pass_rate", "--pass-rate")):
        with pytest.raises(UserError, match=f"--drop {name} needs {flag} LO:HI"):
            make_judge([], keep=ANY, drop=[name])
    judge = make_judge([trace(tokens=9)], keep=ANY, drop=[], options=FilterOptions(length=(2, 8)))
    assert judge(trace(tokens=9)).reasons == ("length",)


@given(lo=st.integers(0, 9), width=st.integers(0, 9), tokens=st.integers(0, 20))
def test_a_band_includes_both_its_ends(lo: int, width: int, tokens: int) -> None:
    judge = make_judge([], keep=ANY, drop=[], options=FilterOptions(length=(lo, lo + width)))
    assert (judge(trace(tokens=tokens)).reasons == ()) == (tokens in range(lo, lo + width + 1))


@given(scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, None]), min_size=1, max_size=8), quarter=st.integers(0, 4))
def test_the_pass_rate_counts_right_among_judged(scores: list[float | None], quarter: int) -> None:
    traces = [trace(index, score=score) for index, score in enumerate(scores)]
    judged = [score for score in scores if score is not None]
    band = (quarter / 4, 0.75)
    if band[0] > band[1]:
        return
    judge = make_judge(traces, keep=ANY, drop=[], options=FilterOptions(pass_rate=band))
    passes = not judged or band[0] <= sum(score == 1.0 for score in judged) / len(judged) <= band[1]
    assert {judge(each).reasons for each in traces} == {() if passes else ("pass_rate",)}


@pytest.mark.parametrize(
    ("question", "text", "mixed"),
    [
        ("Add.", "Then we get 因此 the sum.", True),
        ("Add.", "We add, поэтому two.", True),
        ("把它加起来", "Then 因此 the sum.", False),  # the prompt's own script
        ("Сложите.", "Тогда получим два.", False),
        ("Сложите.", "Тогда 因此 получим два.", True),
        ("Add.", "α + β ≤ γ·δ, ∑ x², 𝑥 ∈ ℝ, 90°, naïve café", False),
        ("Add.", "```python\nprint('因此因此因此')\n``` gives two", False),
        ("Add.", "an open fence ``` hides nothing: 因此", True),
        ("Add.", " ".join(["word"] * 300) + " 因", False),  # a small share
        ("足し算", "それでは足します", False),
        ("더하세요", "그래서 둘입니다 因此 因此", True),
    ],
)
def test_language_mix(question: str, text: str, mixed: bool) -> None:
    made = replace(trace(text=text), messages=({"role": "user", "content": question},))
    assert FILTERS["language_mix"](made, Siblings()) == mixed


@given(foreign=st.integers(0, 30), native=st.integers(0, 300))
def test_the_foreign_share_is_one_of_words(foreign: int, native: int) -> None:
    made = trace(text=" ".join(["да"] * foreign + ["yes"] * native))
    for share in (0.01, 0.1):
        siblings = Siblings(options=FilterOptions(foreign_share=share))
        assert FILTERS["language_mix"](made, siblings) == (foreign > share * (foreign + native))


HOSTILE = {
    "brackets": "(" * 200_000,
    "surrogates": "\ud800" * 200_000,
    "nulls": "\0" * 200_000,
    "one line": "x" * 1_000_000,
    "fences": "```" * 60_000,
    "spaces": " " * 200_000 + "x",
    "ideographs": "数学" * 100_000,
    "scripts": "".join(map(chr, range(0x400, 0xD800))) * 4,
    "commas": "1,111" * 40_000,
    "hyphens": "-*" * 100_000,
    "tags": "<think>" * 30_000,
    "fractal": "".join("ab"[bin(i).count("1") % 2] for i in range(200_000)),  # Thue and Morse: squares, but no cubes
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_is_judged_by_every_filter(kind: str) -> None:
    made = trace(text=HOSTILE[kind], prompt=HOSTILE[kind][:2000])
    options = replace(OPTIONS, seek_in_completions=True)
    judge = make_judge([made], keep=KeepRule(True, diverse=2), drop=list(FILTERS), options=options, index=INDEX)
    reasons = judge(made).reasons
    assert reasons == tuple(name for name in FILTERS if name in reasons)  # no other, and in this order
    assert ("loop" in reasons) == (kind != "fractal")


@given(text=st.text(alphabet=st.characters(exclude_categories=()), max_size=60))
def test_any_text_at_all_is_judged(text: str) -> None:
    made = trace(text=text, prompt=text)
    judge = make_judge([made], keep=KeepRule(correct=True, diverse=1), drop=["near_duplicate"], index=INDEX)
    assert judge(made).reasons in ((), ("contaminated",))


def test_nothing_is_found_in_the_traces_of_nano() -> None:
    prompts = list(problems(levels=(1, 2, 3, 4), split="train", limit=200))
    made = [
        trace(i, prompt=prompt.messages[-1]["content"], text=f"<think>{i}</think>\\boxed{{{prompt.gold}}}")
        for i, prompt in enumerate(prompts)
    ]
    judge = make_judge(made, keep=CORRECT, drop=["near_duplicate"], options=FilterOptions(near_duplicate=0.9))
    assert {judge(each) for each in made} == {judge(made[0])}
    assert judge(made[0]).reasons == judge(made[0]).flags == ()


WORDS = st.lists(st.sampled_from(["one", "two", "three", "four", "five", "six"]), min_size=1, max_size=12).map(" ".join)
STORES = st.lists(
    st.tuples(st.sampled_from("pqr"), WORDS, st.sampled_from([0.0, 1.0, None]), st.integers(1, 9)), max_size=9
)
KEEPS = st.sampled_from([ANY, CORRECT, KeepRule(correct=True, best_of=1), KeepRule(correct=True, diverse=2)])
DROPS = st.lists(st.sampled_from(sorted(FILTERS)), unique=True, max_size=5)


def store_of(samples: list[tuple[str, str, float | None, int]]) -> list[Trace]:
    """Return traces, of which some are cut."""
    made = [trace(i, prompt=p, text=text, score=score, tokens=n) for i, (p, text, score, n) in enumerate(samples)]
    return [replace(each, finish_reason="length") if each.num_completion_tokens == 9 else each for each in made]


@given(data=st.data(), samples=STORES, keep=KEEPS, drop=DROPS)
def test_the_order_of_the_journal_decides_nothing(
    data: st.DataObject, samples: list, keep: KeepRule, drop: list
) -> None:
    traces = store_of(samples)
    judge = make_judge(traces, keep=keep, drop=drop, options=OPTIONS, index=INDEX)
    other = make_judge(data.draw(st.permutations(traces)), keep=keep, drop=drop, options=OPTIONS, index=INDEX)
    assert [judge(each) for each in traces] == [other(each) for each in traces]
    for each in traces:  # what was flagged in a view is judged the same again
        assert judge(replace(each, flags=judge(each).flags)).reasons == judge(each).reasons


@given(samples=STORES, keep=KEEPS, drop=DROPS, text=WORDS, score=st.sampled_from([0.0, 1.0, None]))
def test_a_trace_of_another_prompt_changes_nothing(
    samples: list, keep: KeepRule, drop: list, text: str, score: float | None
) -> None:
    drop = [name for name in drop if name != "near_duplicate"]
    traces = [
        replace(each, flags=("malformed: once",) if each.num_completion_tokens == 8 else ())
        for each in store_of(samples)
    ]
    alone = make_judge(traces, keep=keep, drop=drop, options=OPTIONS)
    joined = make_judge([*traces, trace(99, prompt="z", text=text, score=score)], keep=keep, drop=drop, options=OPTIONS)
    assert [alone(each) for each in traces] == [joined(each) for each in traces]


@given(samples=STORES)
def test_a_copy_that_is_rejected_takes_no_other_with_it(samples: list) -> None:
    traces = store_of(samples)
    sound = make_judge(traces, keep=CORRECT, drop=["truncated"])
    judge = make_judge(traces, keep=CORRECT, drop=["truncated", "duplicate", "near_duplicate"])
    good = {each.completion for each in traces if not sound(each).reasons}
    kept = {each.completion for each in traces if not judge(each).reasons}
    assert kept <= good
    near = {each.completion for each in traces if "near_duplicate" in judge(each).reasons}
    assert good - kept <= near  # of every text that something sound says, a sound copy or near copy stays
    assert bool(kept) == bool(good)


def choose(texts: list[str], count: int, *, tokens: list[int] | None = None) -> list[int]:
    """Return the indices that `diverse` keeps."""
    lengths = tokens or [len(text) for text in texts]
    traces = [trace(i, text=text, tokens=lengths[i]) for i, text in enumerate(texts)]
    judge = make_judge(traces, keep=KeepRule(correct=True, diverse=count), drop=[])
    return [i for i, each in enumerate(traces) if not judge(each).reasons]


def test_diverse_starts_with_the_shortest_and_takes_what_differs_most() -> None:
    base = " ".join(f"a{i}" for i in range(100))
    near = " ".join(f"a{i}" for i in range(99)) + " b"
    half = " ".join(f"a{i}" for i in range(50)) + " " + " ".join(f"b{i}" for i in range(50))
    far = " ".join(f"c{i}" for i in range(100))
    texts = [near, far, base, half]
    tokens = [101, 400, 100, 200]
    assert choose(texts, 1, tokens=tokens) == [2]
    assert choose(texts, 2, tokens=tokens) == [1, 2]
    assert choose(texts, 3, tokens=tokens) == [1, 2, 3]
    assert choose(texts, 4, tokens=tokens) == choose(texts, 9, tokens=tokens) == [0, 1, 2, 3]


@given(texts=st.lists(WORDS, min_size=1, max_size=7), count=st.integers(1, 8))
def test_diverse_is_the_greedy_choice_and_at_most_twice_worse_than_the_best(texts: list[str], count: int) -> None:
    signatures = np.stack([signature(text) for text in texts])
    chosen = farthest_points(signatures, count)
    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen) == min(count, len(texts))
    distance = 1 - (signatures[:, None] == signatures[None]).mean(-1)
    for step in range(1, len(chosen)):
        gaps = distance[chosen[:step]].min(0)
        left = [i for i in range(len(texts)) if i not in chosen[:step]]
        assert gaps[chosen[step]] == max(gaps[left])
        assert chosen[step] == next(i for i in left if gaps[i] == gaps[chosen[step]])


def test_the_first_reason_of_a_fresh_trace() -> None:
    drop = parse_drop(DEFAULT_DROP)
    assert first_reason(trace(), drop) is None
    assert first_reason(trace(score=0.0), drop) == "wrong"
    assert first_reason(trace(score=None), drop) == "unverified"
    assert first_reason(trace(score=0.0), drop, keep=ANY) is None
    assert first_reason(replace(trace(score=0.0), finish_reason="length"), drop) == "truncated"
    assert first_reason(FIRES["loop"]()[0], drop) == "loop"
    assert first_reason(trace(tokens=9), ["length"], options=OPTIONS) == "length"
    for name in FILTERS:
        assert first_reason(trace(), [name]) is None


def test_the_judge_lists_what_it_met_of_the_evaluation() -> None:
    text = "Say: how many PLUMS has Ann"
    traces = [replace(trace(i, prompt=prompt), source=f"train:{i}") for i, prompt in enumerate([text, text, "other"])]
    judge = make_judge(traces, keep=ANY, drop=[], index=INDEX)
    assert isinstance(judge, Judge)
    row = {"source": "train:0", "prompt_uid": text, "uid": "", "file": "test.jsonl", "item": "test.jsonl:1"}
    assert judge.contamination() == [{**row, "kind": "whole", "level": "drop", "text": "how many plums has ann"}]
    assert make_judge(traces, keep=ANY, drop=[]).contamination() == []
    written = replace(trace(), completion="<think>x</think>How many plums has Ann? 2")
    judge = make_judge([written], keep=ANY, drop=[], index=INDEX)
    assert judge(written).reasons == ()
    judge = make_judge([written], keep=ANY, drop=[], index=INDEX, options=FilterOptions(seek_in_completions=True))
    assert judge(written).reasons == ("contaminated",)
    assert [row["uid"] for row in judge.contamination()] == [written.uid]


def test_a_shorter_overlap_flags() -> None:
    question = "If Ann has seven plums and eats two of them each day, on which day has she none?"
    index = EvaluationIndex([("e", "e:1", question)])
    one = trace(prompt="If Ann has seven plums and eats two, is she full?")
    judge = make_judge([one], keep=ANY, drop=[], index=index)
    assert judge(one) == Judgement(reasons=(), flags=("overlap",))
    assert [row["level"] for row in judge.contamination()] == ["flag"]
