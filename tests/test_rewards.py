"""Reward functions: their values by hand, what they make of garbage, and how they are weighted and asked."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import TrainConfig
from distill.errors import UserError
from distill.records import Prompt, Trace
from distill.reinforce.rewards import Answer
from distill.tables import lookup
from teachers.rewards import REWARDS
from teachers.rewards.length import length
from teachers.rewards.open import open_rewards
from teachers.rewards.scorer import RewardScorer, read_weights
from teachers.rewards.shape import format, repetition, soft_overlong
from teachers.verifiers.pool import VerifierPool

TEXTS = st.text(max_size=60) | st.sampled_from(
    ["<think>", "</think>", "<think>a</think>", "<think>a</think> b", "é 日本"]
)


def trace(text: str = "", *, tokens: int = 5, question: str = "how many?") -> Trace:
    before, closed, after = text.rpartition("</think>")
    return Trace(
        uid="t",
        prompt_uid="p",
        messages=({"role": "user", "content": question},),
        completion=text,
        reasoning=before.partition("<think>")[2] if closed else "",
        answer=after,
        finish_reason="stop",
        num_prompt_tokens=3,
        num_completion_tokens=tokens,
        sample_index=0,
        seed=0,
        teacher="student",
        backend="rollouts",
    )


def answer(text: str, *, gold: str | None = "4", ended: bool = True, number: int = 0, tokens: int = 5) -> Answer:
    prompt = Prompt(messages=({"role": "user", "content": "2+2?"},), gold=gold, source="here:1", meta={"level": 1})
    return Answer(prompt, text, list(range(tokens)), 3, ended, number, 0)


@pytest.mark.parametrize("name", REWARDS)
@given(text=TEXTS, tokens=st.integers(0, 100))
def test_every_reward_survives_any_text_and_is_a_finite_number(name, text, tokens):
    function = lookup(REWARDS, name, "reward")
    given_trace = trace(text, tokens=tokens)
    if getattr(function, "unit", "") == "group":
        values = [each.value for each in function([given_trace, trace("a", tokens=7)], [1.0, 0.0])]
    else:
        values = [function(given_trace, **({"limit": 50} if name == "soft_overlong" else {})).value]
    assert all(-1.0 <= value <= 1.0 for value in values)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>so</think> 4", 1.0),
        ("<think>so</think>", 0.0),  # no answer
        ("4", 0.0),
        ("<think>so", 0.0),
        ("<think>so</think><think>so</think> 4", 0.0),
        ("well <think>so</think> 4", 0.0),
    ],
)
def test_format_wants_one_reasoning_and_an_answer(text, value):
    assert format(trace(text)).value == value
    assert (format(trace(text)).reason == "") is (value == 1.0)


@pytest.mark.parametrize(("tokens", "value"), [(0, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (120, -1.0)])
def test_soft_overlong_falls_in_a_line_over_the_cache(tokens, value):
    assert soft_overlong(trace(tokens=tokens), limit=100).value == pytest.approx(value)
    assert soft_overlong(trace(tokens=tokens), limit=100, cache=20).value == pytest.approx(value)


def test_repetition_is_the_share_of_grams_that_came_before():
    assert repetition(trace("a b c d e")).value == 0.0
    # abc bca cab abc bca cab abc: 7 grams, 3 of them new
    assert repetition(trace("a b c a b c a b c")).value == pytest.approx(-4 / 7)
    assert repetition(trace("a b c a b c a b c"), ngram=1, penalty=0.5).value == pytest.approx(-0.5 * 6 / 9)


def test_language_consistency_is_the_share_of_the_reasoning_in_the_questions_scripts():
    consistent = lookup(REWARDS, "language_consistency", "reward")
    assert consistent(trace("<think>two and two</think> 4")).value == 1.0
    assert consistent(trace("<think>two 二 two</think> 四四四四")).value == pytest.approx(1 - 1 / 4)
    assert consistent(trace("<think>two 二 two</think> 4", question="二?")).value == 1.0


def test_length_prefers_the_shorter_of_the_right_and_never_pays_for_wrong_ones():
    traces = [trace(tokens=tokens) for tokens in (10, 20, 30, 30, 10)]
    assert [each.value for each in length(traces, [1.0, 1.0, 1.0, 0.0, None])] == [0.5, 0.0, -0.5, -0.5, None]
    assert [each.value for each in length(traces[:1] + traces[4:], [0.0, 1.0])] == [0.0, 0.0]


# -- weights, verifier, a user's own


def test_weights_are_read_and_unknown_ones_answered_with_the_nearest():
    assert read_weights(["accuracy=1", "format", "soft_overlong=-0.5"]) == {
        "accuracy": 1.0,
        "format": 1.0,
        "soft_overlong": -0.5,
    }
    for words, said in (
        (["acuracy=1"], "did you mean 'accuracy'"),
        (["format=much"], "a number other than 0"),
        (["format=0"], "a number other than 0"),
        (["format=nan"], "a number other than 0"),
        (["format", "format=2"], "named twice"),
    ):
        with pytest.raises(UserError, match=said):
            read_weights(words)


def test_accuracy_is_the_verifiers_and_has_no_opinion_without_a_gold():
    with VerifierPool("math") as pool:
        scorer = RewardScorer({"accuracy": 1.0, "format": 0.5, "length": 1.0}, limit=50, pool=pool)
        answers = [
            answer("<think>so</think> \\boxed{4}", number=0, tokens=4),
            answer("\\boxed{8/2}", number=1, tokens=8),
            answer("\\boxed{5}", number=2),
            answer("\\boxed{4}", number=3, ended=False),
            answer("\\boxed{4}", gold=None, number=0),
            answer("\\boxed{4}", gold=None, ended=False, number=1),
            answer("", number=2),
            answer("nothing", number=3),
        ]
        rows = scorer(answers, group=4)
    assert [row[0].value for row in rows] == [1.0, 1.0, 0.0, 0.0, None, None, 0.0, 0.0]
    assert rows[3][0].reason == "truncated"
    assert [row[1].value for row in rows[:2]] == [1.0, 0.0]
    assert [row[2].value for row in rows[:2]] == [0.5, -0.5]
    assert rows[4][2].value is None  # no verdict, so no opinion on its length either
    assert scorer.calls == 5


def by_letters(prompts, completions, completion_ids, solution, **columns):
    """As TRL calls a reward: conversational prompts and completions, columns as lists."""
    assert prompts[0][0]["role"] == "user"
    assert completions[0][0]["role"] == "assistant"
    assert len(completion_ids[0]) == 5
    assert columns["level"] == [1] * len(prompts)
    return [
        None if gold is None else float(len(each[0]["content"]))
        for each, gold in zip(completions, solution, strict=True)
    ]


def too_few(prompts, completions, **columns):
    return [1.0]


def test_a_users_reward_has_trls_signature(monkeypatch):
    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(__file__).parent))
    scorer = RewardScorer({"test_rewards:by_letters": 1.0}, limit=50, pool=None)
    rows = scorer([answer("abc"), answer("abcd", gold=None)], group=2)
    assert [row[0].value for row in rows] == [3.0, None]
    with pytest.raises(UserError, match="a number or None for each of the 2 completions"):
        RewardScorer({"test_rewards:too_few": 1.0}, limit=50, pool=None)([answer("a"), answer("b")], group=2)


def test_options_reach_their_reward_and_no_other():
    scorer = RewardScorer({"repetition": 1.0}, options=["repetition.ngram=1"], limit=50, pool=None)
    assert scorer([answer("a a")], group=1)[0][0].value == -0.5
    for options, said in (
        (["repetition.words=1"], "accepted are ngram, penalty"),
        (["format.strict=1"], "with a reward of repetition"),
        (["ngram=1"], "REWARD.NAME=VALUE"),
    ):
        with pytest.raises(UserError, match=said):
            RewardScorer({"repetition": 1.0}, options=options, limit=50, pool=None)


# -- the questions of a run


def config(data, **settings) -> TrainConfig:
    return TrainConfig(mode="grpo", student="tiny", data=data, out="run", **settings)


def test_questions_come_from_a_source_or_once_each_from_a_trace_store(tmp_path):
    with open_rewards(config("nano:1", limit=5)) as (prompts, scorer):
        assert len(prompts) == 5
        assert list(scorer.weights) == ["accuracy"]
    store = tmp_path / "store"
    store.mkdir()
    made = [replace(trace("x"), prompt_uid=f"q{n % 3}", gold=str(n % 3), sample_index=n, uid=f"t{n}") for n in range(9)]
    made = [replace(t, messages=({"role": "user", "content": f"{t.gold}+0?"},)) for t in made]
    (store / "traces.jsonl").write_text("".join(json.dumps(t.to_json()) + "\n" for t in made), encoding="utf-8")
    with open_rewards(config(store)) as (prompts, _):
        assert sorted(prompt.gold for prompt in prompts) == ["0", "1", "2"]


def test_questions_whose_gold_cannot_be_verified_are_left_out_and_said(write_jsonl, capsys):
    rows = [{"question": "1+1?", "answer": "2"}, {"question": "which?", "answer": "\\frac{"}]
    with open_rewards(config(write_jsonl("q.jsonl", rows))) as (prompts, _):
        assert [prompt.gold for prompt in prompts] == ["2"]
    assert "left out 1 questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([{"question": "1+1?"}], {}, "needs questions with a gold answer"),
        ([{"answer": "2"}], {"reward": ["format"]}, "q.jsonl"),
        ([{"question": "1+1?", "answer": "2"}], {"reward": ["kindness"]}, "unknown reward 'kindness'"),
    ],
)
def test_unusable_questions_and_rewards_are_refused(write_jsonl, rows, settings, said):
    data = write_jsonl("q.jsonl", rows)
    with pytest.raises(UserError, match=said), open_rewards(config(data, **settings)):
        pass


def test_rewards_without_a_gold_need_none(write_jsonl):
    data = write_jsonl("q.jsonl", [{"question": "sing"}])
    with open_rewards(config(data, reward=["format=1", "repetition=0.5"])) as (prompts, scorer):
        assert len(prompts) == 1
        assert scorer.pool is None
