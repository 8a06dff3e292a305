"""Exams by name, how often they ask, whose answers are one, and scores of another harness."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import app
from distill.config import EvalConfig
from distill.errors import UserError
from distill.power import Variances, detectable_effect, samples_needed, smallest_effect, variances_of
from distill.records import Trace, Verdict
from distill.store import write_json
from teachers.exams.catalogue import EXAMS, MIDDLING
from teachers.exams.harness import check_settings, in_words, scores_of
from teachers.exams.sample_size import WITHIN, samples_per_question
from teachers.exams.votes import wrong_classes
from teachers.prompts import read_prompts
from teachers.verifiers.gold import check_golds, verifier_name
from teachers.verifiers.pool import VerifierPool

DATA = Path(__file__).parents[2] / "shared" / "data"

# One row of each exam in its data set's own layout, with columns that must not matter, and what is made of it.
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gsm8k": ({"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}, "2 + 3?", "5"),
    "math-500": (
        {
            "problem": "Half?",
            "solution": "It is $\\boxed{\\frac{1}{3}}$.",
            "answer": "\\frac{1}{2}",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/1.json",
        },
        "Half?",
        "\\frac{1}{2}",
    ),
    "aime24": (
        {"id": 60, "problem": "How many?", "solution": "...", "answer": "033", "url": "u", "year": "2024"},
        "How many?",
        "033",
    ),
    "aime25": ({"problem": "How many?", "answer": "70", "id": "0"}, "How many?", "70"),
    "svamp": (
        {"ID": "chal-1", "Body": "Each costs 76. ", "Question": "How much?", "Equation": "( 76 )", "Answer": "76.0"},
        "Each costs 76. How much?",
        "76.0",
    ),
    "mcq": (
        {"question": "Largest?", "subject": "s", "choices": ["ant", "elephant"], "answer": 1},
        "Largest?\n\nA. ant\nB. elephant",
        "B",
    ),
}


@pytest.fixture(scope="module")
def math_pool() -> Any:
    with VerifierPool("math") as pool:
        yield pool


@pytest.mark.parametrize("name", EXAMS)
def test_a_row_in_the_data_sets_own_layout(name: str, write_jsonl: Callable[..., Path]) -> None:
    row, question, gold = ROWS[name]
    (prompt,), bad = read_prompts(f"{name}:{write_jsonl('rows.jsonl', [row])}")
    assert bad == []
    assert (prompt.messages, prompt.gold) == (({"role": "user", "content": question},), gold)
    assert prompt.source == "rows.jsonl:1"
    assert verifier_name("auto", [prompt]) == EXAMS[name].verifier
    assert prompt.meta.get("level") == row.get("level")


@pytest.mark.parametrize("name", EXAMS)
def test_a_row_of_another_layout_is_refused_by_number(name: str, write_jsonl: Callable[..., Path]) -> None:
    row, *_ = ROWS[name]
    required = [column.split("|") for column in EXAMS[name].columns]
    rows = [{key: value for key, value in row.items() if key not in columns} for columns in required]
    rows += [{key: None if key in columns else value for key, value in row.items()} for columns in required]
    prompts, bad = read_prompts(f"{name}:{write_jsonl('rows.jsonl', [row, *rows, [row]])}")
    assert len(prompts) == 1
    assert [each.source for each in bad] == [f"rows.jsonl:{number}" for number in range(2, len(rows) + 3)]
    assert all(f"lacks {'|'.join(columns)}" in each.reason for each, columns in zip(bad, required * 2, strict=False))


def test_a_multiple_choice_without_options_is_none(write_jsonl: Callable[..., Path]) -> None:
    rows = [{"question": "A) 3 or B) 4?", "choices": "A) 3 B) 4", "answer": "B"}, {**ROWS["mcq"][0], "choices": []}]
    prompts, bad = read_prompts(f"mcq:{write_jsonl('rows.jsonl', rows)}")
    assert prompts == []
    assert sorted(each.source for each in bad) == ["rows.jsonl:1", "rows.jsonl:2"]
    assert {each.reason.split()[-1] for each in bad} == {"by", "'answer'"}


@pytest.mark.parametrize(("split", "asked"), [("train", ["train"]), ("heldout", ["test"])])
def test_whoever_trains_and_whoever_evaluates_get_their_split(
    split: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder in the place of the hub, read by the same `datasets.load_dataset`."""
    for name in ("train", "test"):
        row = {"question": name, "answer": "#### 1"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    monkeypatch.setitem(EXAMS, "gsm8k", replace(EXAMS["gsm8k"], hub=str(tmp_path)))
    prompts, bad = read_prompts("gsm8k", split=split)
    assert ([prompt.messages[0]["content"] for prompt in prompts], bad) == (asked, [])


def test_training_on_an_exam_without_training_problems_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS["math-500"][0]) + "\n", encoding="utf-8")
    monkeypatch.setitem(EXAMS, "math-500", replace(EXAMS["math-500"], hub=str(tmp_path)))
    assert len(read_prompts("math-500", split="train")[0]) == 1
    assert "no problems to train on" in capsys.readouterr().err
    assert len(read_prompts("math-500", split="heldout")[0]) == 1
    assert capsys.readouterr().err == ""


def test_exams_on_the_hub_name_their_splits() -> None:
    for exam in EXAMS.values():
        assert (exam.hub is None) == (exam.test is None)
        assert exam.hub is not None or exam.train is None
    with pytest.raises(UserError, match="mcq:FILE"):
        read_prompts("mcq")
    with pytest.raises(UserError, match="gsm8k:FILE"):
        read_prompts("gsm8k:")
    with pytest.raises(UserError, match="did you mean 'gsm8k'"):
        read_prompts("gsm8")


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("gsm8k", "gsm8k/test_first660.jsonl", 660),
        ("svamp", "svamp/svamp_first700.jsonl", 700),
        ("math-500", "math/math500.jsonl", 500),
    ],
)
def test_the_real_rows_and_their_golds(name: str, file: str, count: int, math_pool: VerifierPool) -> None:
    prompts, bad = read_prompts(f"{name}:{DATA / file}")
    assert (len(prompts), bad) == (count, [])
    assert read_prompts(str(DATA / file))[0] == prompts  # an exam asks what the file asks
    some = prompts[:: count // 60]
    assert check_golds(some, math_pool) == (some, [])


# Votes


def answer(text: str, *, right: bool, index: int, question: str = "q", **changes: Any) -> Trace:
    verdict = Verdict(verifier="math", version="1", score=float(right), predicted=text)
    made = Trace(
        uid=f"{question}-{index}",
        prompt_uid=question,
        messages=({"role": "user", "content": question},),
        completion=text,
        reasoning="",
        answer=f"\\boxed{{{text}}}",
        finish_reason="stop",
        num_prompt_tokens=1,
        num_completion_tokens=1,
        sample_index=index,
        seed=0,
        teacher="t",
        backend="b",
        gold="3",
        predicted=text,
        verdicts=(verdict,),
    )
    return replace(made, **changes)


def question(name: str, right: int, wrong: list[str]) -> list[Trace]:
    texts = ["3"] * right + wrong
    return [answer(text, right=index < right, index=index, question=name) for index, text in enumerate(texts)]


def test_equal_wrong_answers_are_one_class_and_only_open_questions_are_asked_about() -> None:
    samples = [
        *question("open", 1, ["\\frac{1}{2}", "0.5", "1/2", "7", "x^2+2x+1", "(x+1)^2"]),
        *question("none is right", 0, ["1/2", "0.5"]),
        *question("right leads", 3, ["1/2", "0.5"]),
        *question("written alike", 1, ["7", "7"]),
    ]
    classes, unclassed = wrong_classes(samples, "math", {})
    assert unclassed == 0
    assert set(classes) == {f"open-{index}" for index in range(1, 7)}
    of = [classes[f"open-{index}"] for index in range(1, 7)]
    assert Counter(of).most_common(1)[0][1] == 3
    assert (len(set(of[:3])), of[4] == of[5], len(set(of))) == (1, True, 3)
    assert wrong_classes(samples, "choice", {}) == ({}, 0)


def test_answers_that_cannot_be_compared_in_time_are_counted_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    """The limit is over before the worker has read its job."""
    classes, unclassed = wrong_classes(question("q", 1, ["1/2", "0.5"]), "math", {"limit_seconds": 0.0})
    assert (classes, unclassed) == ({}, 1)
    assert "1 question" in capsys.readouterr().err


# How many samples


def miller(questions: int, samples: float, between: float, within: float) -> float:
    """Return the minimum detectable effect from the formula for n, solved for delta by bisection."""
    z = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
    low, high = 0.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        needed = z**2 * (between + within / samples + within / samples) / middle**2 if middle else math.inf
        low, high = (middle, high) if needed > questions else (low, middle)
    return high


# The study's own figures: AIME 2024 with 64 samples, GPQA-Diamond with 16, MATH-500 with 4 and 16.
@pytest.mark.parametrize(
    ("questions", "samples", "between", "points"),
    [(30, 64, 0.10, 16.5), (60, 64, 0.10, 11.6), (198, 16, 0.06, 5.5), (500, 4, 0.03, 3.8), (500, 16, 0.03, 2.7)],
)
def test_detectable_effects_are_the_published_ones(questions: int, samples: int, between: float, points: float) -> None:
    found = detectable_effect(Variances(between=between, within=0.12), questions, samples)
    assert 100 * found == pytest.approx(points, abs=0.06)
    assert found == pytest.approx(miller(questions, samples, between, 0.12))


@given(
    target=st.floats(0.005, 1.0),
    questions=st.integers(2, 3000),
    between=st.floats(0.0, 0.5),
    within=st.floats(0.001, 0.25),
)
def test_the_fewest_samples_that_reach_the_target(target: float, questions: int, between: float, within: float) -> None:
    variances = Variances(between=between, within=within)
    found = samples_needed(target, variances, questions)
    if found is None:
        assert smallest_effect(variances, questions) >= target * (1 - 1e-9)
        return
    assert detectable_effect(variances, questions, found) <= target * (1 + 1e-9)
    if found > 1:
        assert detectable_effect(variances, questions, found - 1) > target * (1 - 1e-9)


def test_as_many_samples_find_the_difference_four_times_in_five() -> None:
    """2000 simulated comparisons of two models with this difference, sampled so often and tested at 5 %."""
    variances, questions, target, rng = Variances(between=0.06, within=0.12), 300, 0.05, np.random.default_rng(0)
    samples = samples_needed(target, variances, questions)
    assert samples is not None
    true = target + rng.normal(0, math.sqrt(variances.between), (2000, questions))
    noise = (rng.normal(0, math.sqrt(variances.within / samples), (2000, questions)) for _ in range(2))
    paired = true + next(noise) - next(noise)
    found = paired.mean(1) / (paired.std(1, ddof=1) / math.sqrt(questions)) > NormalDist().inv_cdf(0.975)
    assert found.mean() == pytest.approx(0.8, abs=0.03)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), shared=st.floats(0.0, 1.0))
def test_variances_are_found_again_in_drawn_scores(seed: int, shared: float) -> None:
    """Normal effects with known variances; 40 000 questions leave a relative error below 5 %."""
    rng, n = np.random.default_rng(seed), 40_000
    common = rng.normal(0, 0.4, n)
    ours, theirs = (math.sqrt(shared) * common + math.sqrt(1 - shared) * rng.normal(0, 0.4, n) for _ in range(2))
    first = ours[:, None] + rng.normal(0, 0.3, (n, 3))
    second = theirs[:, None] + rng.normal(0, 0.5, (n, 5))
    both, one = variances_of(first, second), variances_of(first)
    assert both.within == pytest.approx((0.09 + 0.25) / 2, rel=0.05)
    assert both.between == pytest.approx(2 * 0.16 * (1 - shared), rel=0.05, abs=0.008)
    assert one.within == pytest.approx(0.09, rel=0.05)
    assert one.between == pytest.approx(0.16, rel=0.05)  # 2 v (1 - 1/2)
    assert variances_of(first, first).between == 0.0  # noise alone is no difference


@pytest.mark.parametrize("scores", [[[1, 0]], [[1], [0]], [[1, 0], [0, 1], [0, 0]]])
def test_variances_need_questions_and_samples(scores: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="2 or more"):
        variances_of(scores, [[1, 0], [0, 1]])


def config(**given: Any) -> EvalConfig:
    return EvalConfig(**{"model": "m", "prompts": "nano", "out": Path("o"), **given})


def test_the_number_of_samples_is_said_with_what_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    assert samples_per_question(config(n=3), 10) == (3, None)
    n, plan = samples_per_question(config(mde=4, prompts="math-500"), 500)
    assert (n, plan["between_variance"], plan["within_variance"]) == (4, 0.03, WITHIN)
    assert plan["target"] == 0.04 >= plan["reached"] > miller(500, 5, 0.03, WITHIN)
    said = capsys.readouterr().err
    assert "500 questions x 4 samples" in said
    assert "omega^2 0.03" in said
    _, plan = samples_per_question(config(mde=20), 100)
    assert plan["between_variance"] == MIDDLING


@pytest.mark.parametrize(
    ("given_", "questions", "message"),
    [
        ({"mde": 5, "prompts": "aime24"}, 30, r"30 questions.*16\.5 points.*below 16\.2.*more questions"),
        ({"mde": 5, "n": 2}, 5000, "-n .* --mde"),
        ({"mde_from": [Path("e")]}, 5000, "--mde-from is for --mde"),
        ({"mde": 5, "mde_from": [Path("absent")]}, 5000, "absent is no evaluation"),
        ({"mde": 5, "mde_from": [Path("a"), Path("b"), Path("c")]}, 5000, "two models, not 3"),
    ],
)
def test_what_no_number_of_samples_reaches_is_refused(given_: dict[str, Any], questions: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        samples_per_question(config(**given_), questions)


def write_evaluation(folder: Path, scores: list[list[int]]) -> Path:
    """Write an evaluation with these scores: one row for each question, one column for each sample."""
    folder.mkdir()
    traces = [
        answer("3", right=bool(score), index=index, question=f"q{row}")
        for row, found in enumerate(scores)
        for index, score in enumerate(found)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(t.to_json()) + "\n" for t in traces), encoding="utf-8")
    write_json(folder / "eval.json", {"questions": len(scores), "samples_per_question": len(scores[0])})
    return folder


def test_variances_of_earlier_evaluations(tmp_path: Path) -> None:
    ours, theirs = [[1, 1], [1, 0], [0, 0], [0, 1], [1, 1]], [[0, 0], [1, 0], [0, 0], [0, 0], [1, 1]]
    folders = [write_evaluation(tmp_path / name, scores) for name, scores in (("a", ours), ("b", theirs))]
    for given_, expected in ((folders[:1], variances_of(ours)), (folders, variances_of(ours, theirs))):
        n, plan = samples_per_question(config(mde=5, mde_from=given_), 2000)
        assert (plan["between_variance"], plan["within_variance"]) == (expected.between, expected.within)
        assert n == samples_needed(0.05, expected, 2000)
    once = write_evaluation(tmp_path / "once", [[1], [0]])
    with pytest.raises(UserError, match="one sample"):
        samples_per_question(config(mde=5, mde_from=[once]), 2000)
    alike = write_evaluation(tmp_path / "alike", [[0, 0], [0, 0]])
    with pytest.raises(UserError, match="all its scores are alike"):
        samples_per_question(config(mde=5, mde_from=[alike]), 2000)
    other = write_evaluation(tmp_path / "other", ours[:4])
    with pytest.raises(UserError, match="different questions"):
        samples_per_question(config(mde=5, mde_from=[folders[0], other]), 2000)


# Another harness

# What lm-eval 0.4.13 returned, and wrote as its results file, for a group of two small tasks on a model of 260k
# parameters; the task "tiny_nan" is added by hand with the marks that lm-eval has for what it cannot work out.
RECORDED: dict[str, Any] = {
    "results": {
        "tiny_sum": {
            "name": "tiny_sum",
            "alias": "tiny_sum",
            "sample_len": 6,
            "acc,none": 0.3333333333333333,
            "acc_stderr,none": 0.210818510677892,
        },
        "tiny_say": {
            "name": "tiny_say",
            "alias": "tiny_say",
            "sample_len": 6,
            "exact_match,none": 0.0,
            "exact_match_stderr,none": 0.0,
        },
        "tiny": {
            "alias": "tiny",
            "name": "tiny",
            "sample_len": 12,
            "acc,none": 0.3333333333333333,
            "acc_stderr,none": 0.21081851067789198,
            "sample_count": {"acc,none": 6},
        },
        "tiny_nan": {"alias": "tiny_nan", "bits,flexible": math.nan, "bits_stderr,flexible": "N/A"},
    },
    "group_subtasks": {"tiny": ["tiny_sum", "tiny_say"]},
    "versions": {"tiny": "1.0", "tiny_say": 2.0, "tiny_sum": 1.0},
    "n-shot": {"tiny": 0, "tiny_say": 0, "tiny_sum": 0},
    "higher_is_better": {
        "tiny": {"acc": True, "exact_match": True},
        "tiny_say": {"exact_match": True},
        "tiny_sum": {"acc": True},
    },
    "n-samples": {"tiny_sum": {"original": 6, "effective": 6}, "tiny_say": {"original": 6, "effective": 4}},
}


def test_scores_in_recorded_results() -> None:
    found = scores_of(RECORDED)
    assert found["tiny_sum"] == {
        "scores": {"acc,none": {"value": 1 / 3, "stderr": 0.210818510677892, "higher_is_better": True}},
        "version": 1.0,
        "num_fewshot": 0,
        "questions": 6,
    }
    assert found["tiny_say"]["questions"] == 4
    assert (found["tiny"]["questions"], list(found["tiny"]["scores"])) == (12, ["acc,none"])
    assert found["tiny_nan"] == {
        "scores": {"bits,flexible": {"value": None, "stderr": None, "higher_is_better": None}},
        "version": None,
        "num_fewshot": None,
        "questions": None,
    }
    json.dumps(found, allow_nan=False)
    lines = in_words({"tasks": found})
    assert lines[0] == "tiny_sum acc,none 0.3333 +- 0.2108"
    assert lines[-1] == "tiny_nan bits,flexible not a number"


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"prompts": ""}, "--prompts is required"),
        ({"tasks": "arc_easy"}, "--tasks is for --harness"),
        ({"harness": "lm-eval", "tasks": "arc_easy"}, "--prompts is not for --harness"),
        ({"harness": "lm-eval", "prompts": "", "n": 4, "tasks": "a"}, "-n is not for --harness"),
    ],
)
def test_the_two_ways_are_not_mixed(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(config(**given_))


def test_a_harness_needs_tasks() -> None:
    with pytest.raises(UserError, match="needs --tasks"):
        check_settings(EvalConfig(model="m", out=Path("o"), harness="lm-eval"))


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        app([str(each) for each in arguments])
    return int(stop.value.code or 0)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_harness_the_extra_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "e"
    assert run("eval", "--model", "nano", "--harness", "lm-eval", "--tasks", "arc_easy", "--out", out) == 2
    assert "pip install 'distill[lm-eval]'" in capsys.readouterr().err
    assert not out.exists()


TASK = """\
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["1", "2", "3"]
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_harness_runs_a_task(
    tmp_path: Path,
    tokenizer: Any,
    make_model: Callable[..., Any],
    write_jsonl: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = tmp_path / "model", tmp_path / "e"
    make_model().save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = write_jsonl("rows.jsonl", [{"question": f"{i} + 1 =", "answer": i} for i in range(3)])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(TASK.format(rows=rows), encoding="utf-8")
    include = f"include_path={tmp_path / 'tasks'}"
    line = ["eval", "--model", model, "--harness", "lm-eval", "--harness-arg", include, "--out", out]
    assert run(*line, "--tasks", "sumss") == 2
    assert "did you mean 'sums'" in capsys.readouterr().err
    assert run(*line, "--tasks", "sums", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "eval.json").read_text())
    assert found["tasks"]["sums"]["questions"] == 3
    assert 0 <= found["tasks"]["sums"]["scores"]["acc,none"]["value"] <= 1
    assert run(*line, "--tasks", "sums", "--arm", "a", "--train-seed", "1") == 0  # finished: only the name is new
    assert json.loads((out / "eval.json").read_text()) == {**found, "arm": "a", "train_seed": 1}
    assert run(*line, "--tasks", "sums", "--limit", "2") == 2
    assert "another evaluation" in capsys.readouterr().err
