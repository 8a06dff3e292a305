"""reasoning-gym: its own answers score 1 after a journal line, and train and held-out problems never meet."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from test_verifiers import trace

from distill.errors import UserError
from distill.records import Prompt, Trace
from teachers.prompts import read_prompts
from teachers.verifiers.gold import gold_as_answer
from teachers.verifiers.reasoning_gym import answers_of, reasoning_gym

pytest.importorskip("reasoning_gym")
TASKS = [
    "leg_counting",
    "countdown",
    "mini_sudoku",
    "coin_flip",
    "word_sorting",
    "knights_knaves",
    "family_relationships",
]


def answered(prompt: Prompt, text: str) -> Trace:
    """Return a trace as it comes back from the journal."""
    one = replace(trace(prompt.gold, text), meta=dict(prompt.meta))
    return Trace.from_json(json.loads(json.dumps(one.to_json())))


@pytest.mark.parametrize("task", TASKS)
def test_golds_score_one_and_rubbish_does_not(task: str) -> None:
    prompts, bad = read_prompts(f"reasoning-gym:{task}?size=5&seed=3")
    assert (len(prompts), bad) == (5, [])
    for prompt in prompts:
        gold = gold_as_answer(prompt, "reasoning-gym")
        assert gold is not None
        for text in (gold, f"Thus:\n{gold}", f"\\boxed{{{prompt.gold}}}", str(prompt.gold)):
            verdict = reasoning_gym(answered(prompt, text))
            if "boxed" not in text or "\n" not in str(prompt.gold):
                assert verdict.score == 1.0, (text, verdict)
        verdict = reasoning_gym(answered(prompt, "<answer>no idea</answer>"))
        assert verdict.score is not None
        assert 0 <= verdict.score < 0.2


@pytest.mark.parametrize("task", ["leg_counting", "coin_flip", "chain_sum"])
def test_train_and_heldout_share_no_question_whatever_the_seeds(task: str) -> None:
    def questions(seed: int, split: str) -> set[str]:
        prompts, _ = read_prompts(f"reasoning-gym:{task}?size=20&seed={seed}", split=split)
        assert len({prompt.uid for prompt in prompts}) == len(prompts) == 20
        return {prompt.uid for prompt in prompts}

    train = questions(0, "train") | questions(20, "train") | questions(1000, "train")
    heldout = questions(0, "heldout") | questions(5, "heldout")
    assert not train & heldout
    assert questions(0, "train") & questions(5, "train")  # which is why another seed alone would not do


def test_a_source_is_a_function_of_its_text() -> None:
    source = "reasoning-gym:leg_counting?size=30&seed=4&min_animals=2&max_animals=2"
    prompts, _ = read_prompts(source)
    assert prompts == read_prompts(source)[0]
    assert prompts[:7] == read_prompts(source, limit=7)[0]
    assert all(prompt.meta["reasoning_gym"]["entry"]["metadata"]["num_animals"] == 2 for prompt in prompts)
    assert prompts[0].source == "reasoning-gym:leg_counting:0"
    assert read_prompts(f"{source}&seed=5")[0] != prompts


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("leg_countin", "has no task 'leg_countin'; did you mean 'leg_counting'"),
        ("", "has no task ''"),
        ("leg_counting?sise=3", "has no 'sise': it has .*size; did you mean 'size'"),
        ("leg_counting?size=0", "size must be a whole number"),
        ("leg_counting?size=x", "size must be a whole number"),
        ("leg_counting?seed=true", "seed must be a whole number"),
        ("leg_counting?min_animals=0", "refuses its settings: min_animals must be positive"),
        ("leg_counting?min_animals=[]", "refuses its settings"),
        ("rush_hour", "cannot be used: its problems have no answer"),
        ("rearc", "cannot be used: its own answers do not score 1"),
    ],
)
def test_what_cannot_be_had_is_one_line(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        read_prompts(f"reasoning-gym:{spec}")
    assert "\n" not in str(refused.value)


def test_without_the_package_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="pip install reasoning-gym"):
        read_prompts("reasoning-gym:leg_counting")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("<answer>7</answer>", ["7"]),
        ("<answer>6</answer> no: <answer>7</answer>.", ["7"]),
        ("<answer>1 2\n3 4</answer> \\boxed{5}", ["1 2\n3 4"]),
        ("so \\boxed{7}", ["7"]),
        ("1 2\n3 4", ["1 2\n3 4", "3 4"]),
        ("It is so.\n**Answer: 7**", ["It is so.\n**Answer: 7**", "7"]),
        ("</answer> 7", ["</answer> 7", "</answer> 7"]),
    ],
)
def test_the_answer_as_a_person_would_take_it(text: str, read: list[str]) -> None:
    assert list(answers_of(text)) == read
