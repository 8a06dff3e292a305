"""Comparisons of evaluation folders: what they conclude, what they refuse, and that samples decide, not summaries."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from distill.compare import compare, render_table
from distill.compare.words import findings, pair_verdict
from distill.errors import UserError
from distill.evaluate import load_evaluation
from distill.records import Prompt, Trace, Verdict, trace_uid
from distill.statistics import paired_bootstrap, wilson_interval

SAMPLING = {"temperature": 0.6, "top_p": 0.95, "max_completion_length": 64, "seed": 0}
REMOVE = object()


def write_evaluation(
    folder: Path,
    right: np.ndarray,
    *,
    cut: Callable[[int, int], bool] = lambda question, sample: False,
    completion: Callable[[int, int], str] | None = None,
    first_question: int = 0,
    gold: str = "11",
    levels: int = 4,
    judge: str = "1",
    **summary: Any,
) -> Path:
    """Write what `distill eval` does. `right` is (questions, samples) of 0/1; REMOVE drops a key of eval.json."""
    folder.mkdir(parents=True)
    questions, samples = right.shape
    counted = 0.0
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for q in range(questions):
            prompt = Prompt(
                messages=({"role": "user", "content": f"Question {first_question + q}: how many?"},), gold=gold
            )
            for k in range(samples):
                truncated, correct = cut(q, k), bool(right[q, k])
                counted += correct and not truncated
                predicted = None if truncated else gold if correct else "7"
                text = completion(q, k) if completion else f"<think>\nCount {q}.\n</think>\n\\boxed{{{predicted}}}"
                trace = Trace(
                    uid=trace_uid(prompt.uid, folder.name, SAMPLING, k),
                    prompt_uid=prompt.uid,
                    messages=prompt.messages,
                    completion=text,
                    reasoning=f"Count {q}.",
                    answer=f"\\boxed{{{predicted}}}",
                    finish_reason="length" if truncated else "stop",
                    num_prompt_tokens=8,
                    num_completion_tokens=64 if truncated else 20 + q % 7,
                    sample_index=k,
                    seed=k,
                    teacher="student",
                    backend="transformers",
                    gold=gold,
                    predicted=predicted,
                    verdicts=(Verdict(verifier="math", version=judge, score=float(correct)),),
                    meta={"level": 1 + q % levels},
                )
                file.write(json.dumps(trace.to_json()) + "\n")
    values = {
        "pass@1": counted / (questions * samples),
        "questions": questions,
        "samples_per_question": samples,
        "sampling": SAMPLING,
        "model": str(folder),
        "prompts_hash": f"{first_question}-{questions}",
        "ledger": {"flops": 1e12, "seconds": 10.0, "tokens": 1000},
        **summary,
    }
    text = json.dumps({k: v for k, v in values.items() if v is not REMOVE})
    (folder / "eval.json").write_text(text, encoding="utf-8")
    return folder


def bits(accuracy: float, questions: int = 120, samples: int = 1, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((questions, samples)) < accuracy).astype(int)


def test_a_clear_difference_is_said_with_its_interval(tmp_path: Path) -> None:
    base = write_evaluation(tmp_path / "a", bits(0.1), arm="base")
    hard = write_evaluation(tmp_path / "b", bits(0.8, seed=1), arm="hard-labels", train_seed=0)
    result = compare([base, hard], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == result
    (pair,) = result["pairs"]
    first, second = bits(0.8, seed=1).mean(1), bits(0.1).mean(1)
    expected = paired_bootstrap(first, second)
    assert (pair["a"], pair["b"]) == ("hard-labels", "base")
    assert pair["difference"] == pytest.approx((first - second).mean())
    assert pair["ci95"] == [float(expected.low), float(expected.high)]
    assert pair["p"] < 0.001
    assert pair["wins"] - pair["losses"] == pytest.approx(120 * pair["difference"])
    low, high = (100 * v for v in pair["ci95"])
    assert result["verdict"] == (
        f"hard-labels answers {100 * pair['difference']:.1f} points more than base [{low:.1f}, {high:.1f}]"
    )
    arm = result["arms"][1]
    assert arm["ci95"] == pytest.approx(wilson_interval(first.sum(), 120))
    assert arm["mean_completion_tokens"] == pytest.approx(np.mean([20 + q % 7 for q in range(120)]))
    assert arm["ledger"] == {"flops": 1e12, "seconds": 10.0, "tokens": 1000}
    assert any("One training seed: hard-labels" in note for note in result["notes"])


def test_the_better_arm_is_named_first_whichever_came_first(tmp_path: Path) -> None:
    good = write_evaluation(tmp_path / "good", bits(0.9))
    bad = write_evaluation(tmp_path / "bad", bits(0.2, seed=1))
    result = compare([good, bad], tmp_path / "out")
    assert result["pairs"][0]["difference"] < 0
    assert result["verdict"].startswith("good answers ")
    assert " more than bad [" in result["verdict"]
    shown = result["verdict"].split("[")[1].rstrip("]").split(", ")
    assert 0 < float(shown[0]) < float(shown[1])


def test_an_arm_against_its_own_samples_keeps_a_width(tmp_path: Path) -> None:
    same = bits(0.5)
    result = compare([write_evaluation(tmp_path / x, same) for x in "ab"], tmp_path / "out")
    assert result["verdict"].startswith("no detectable difference between b and a [-3.1, +3.1]; ")
    assert result["pairs"][0]["minimum_detectable_effect"] > 0.03


def test_training_seeds_are_grouped_and_widen(tmp_path: Path) -> None:
    base = write_evaluation(tmp_path / "base", bits(0.2))
    shares = [0.5, 0.7, 0.9]
    runs = [write_evaluation(tmp_path / f"h{s}", bits(shares[s], seed=s), arm="hard", train_seed=s) for s in (2, 0, 1)]
    result = compare([base, *runs], tmp_path / "out")
    arm = result["arms"][1]
    assert arm["seeds"] == [0, 1, 2]
    assert arm["scores"] == [pytest.approx(bits(shares[s], seed=s).mean()) for s in range(3)]
    assert arm["accuracy"] == pytest.approx(np.mean(arm["scores"]))
    alone = compare([base, runs[2]], tmp_path / "alone")
    width = np.diff(result["pairs"][0]["ci95"])[0]
    assert width > 2 * np.diff(alone["pairs"][0]["ci95"])[0]


def test_a_truncated_sample_is_wrong_and_no_answer(tmp_path: Path) -> None:
    one = write_evaluation(tmp_path / "one", np.ones((40, 2), int), cut=lambda q, k: q < 10 and k == 0)
    two = write_evaluation(tmp_path / "two", np.ones((40, 2), int))
    cut, whole = compare([one, two], tmp_path / "out")["arms"]
    assert (cut["accuracy"], cut["truncated"], cut["no_answer"]) == (0.875, 0.125, 0.125)
    assert cut["pass@k"] == 1.0
    assert (whole["accuracy"], whole["truncated"], whole["no_answer"]) == (1.0, 0.0, 0.0)


def test_several_arms_are_corrected_and_summed_up(tmp_path: Path) -> None:
    shares = {"base": 0.1, "answers": 0.4, "hard": 0.85, "soft": 0.85}
    folders = [write_evaluation(tmp_path / n, bits(p, 200, seed=i)) for i, (n, p) in enumerate(shares.items())]
    result = compare(folders, tmp_path / "out")
    assert [(p["a"], p["b"]) for p in result["pairs"]][:3] == [("answers", "base"), ("hard", "base"), ("soft", "base")]
    assert len(result["pairs"]) == 6
    for pair in result["pairs"]:
        assert pair["p"] <= pair["p_holm"] <= 1
        assert (pair["ci95"][0] <= 0 <= pair["ci95"][1]) == ("no detectable difference" in pair["verdict"])
    assert result["verdict"].startswith("no detectable difference between ")
    assert " more than answers [" in result["verdict"]
    assert " more than base [" in result["verdict"]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_table(result))
    text = console.export_text()
    for arm in result["arms"]:
        assert arm["name"] in text
        assert f"{100 * arm['accuracy']:.1f} [{100 * arm['ci95'][0]:.1f}, {100 * arm['ci95'][1]:.1f}]" in text
    assert "…" not in text


def test_holm_is_mentioned_where_it_takes_a_claim_back() -> None:
    pair = {"a": "x", "b": "y", "difference": 0.03, "ci95": [0.002, 0.058], "p_holm": 0.11}
    assert pair_verdict(pair, 6) == (
        "x answers 3.0 points more than y [0.2, 5.8], "
        "not significant after correction for 6 comparisons (Holm p = 0.11)"
    )


def test_findings_of_a_single_winner() -> None:
    arms = [{"name": n, "accuracy": a} for n, a in (("base", 0.1), ("mid", 0.5), ("top", 0.9))]
    pairs = [
        {"a": a, "b": b, "ci95": [0.2, 0.6], "verdict": f"{a} over {b}"}
        for a, b in (("mid", "base"), ("top", "base"), ("top", "mid"))
    ]
    assert findings(arms, pairs) == ["top over mid", "top over base"]


def test_names_come_from_labels_then_arm_then_folders(tmp_path: Path) -> None:
    a = write_evaluation(tmp_path / "base" / "eval", bits(0.3))
    b = write_evaluation(tmp_path / "student" / "eval", bits(0.4))
    c = write_evaluation(tmp_path / "c", bits(0.5), arm="named")
    names = [arm["name"] for arm in compare([a, b, c], tmp_path / "out", labels={str(a): "before"})["arms"]]
    assert names == ["before", "eval", "named"]
    names = [arm["name"] for arm in compare([a, b, c], tmp_path / "out")["arms"]]
    assert names == ["base/eval", "student/eval", "named"]


OTHERS: Mapping[str, tuple[dict[str, Any], str]] = {
    "questions": ({"first_question": 100}, "share 20 questions of 120 and 120"),
    "gold": ({"gold": "12"}, "120 of 120 shared questions have another gold"),
    "sampling": ({"sampling": {**SAMPLING, "temperature": 1.0}}, r"sampled differently \(temperature 0.6 and 1.0\)"),
    "verifier": ({"judge": "2"}, "judged by math 1 and math 2"),
    "hash": ({"prompts_hash": "other"}, "prompts_hash is 0-120 and other"),
    "score": ({"pass@1": 0.99}, "eval.json says pass@1 0.9900, its samples say"),
    "count": ({"questions": 121}, "holds 120 samples, eval.json promises 121 questions x 1"),
    "summary": ({"questions": REMOVE}, "eval.json is unreadable"),
    "same seed": ({"arm": "one"}, "'one' has several evaluations that are not different training seeds"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_comparable_is_refused(tmp_path: Path, case: str) -> None:
    changes, message = OTHERS[case]
    one = write_evaluation(tmp_path / "one", bits(0.3), arm="one")
    two = write_evaluation(tmp_path / "two", bits(0.6), **{"arm": "two", **changes})
    with pytest.raises(UserError, match=message):
        compare([one, two], tmp_path / "out")
    assert not (tmp_path / "out" / "compare.json").exists()


def test_another_number_of_samples_is_refused_and_another_sampling_seed_is_not(tmp_path: Path) -> None:
    one = write_evaluation(tmp_path / "one", bits(0.3))
    two = write_evaluation(tmp_path / "two", bits(0.3, samples=2))
    with pytest.raises(UserError, match="samples_per_question is 1 and 2"):
        compare([one, two], tmp_path / "out")
    three = write_evaluation(tmp_path / "three", bits(0.3), sampling={**SAMPLING, "seed": 5})
    assert "seed" not in compare([one, three], tmp_path / "out")["sampling"]


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    one = write_evaluation(tmp_path / "one", bits(0.3, 4))
    two = write_evaluation(tmp_path / "two", bits(0.3, 4))
    lines = (two / "samples.jsonl").read_text().splitlines(keepends=True)
    for text, message in [
        ("".join(lines[:3]), "holds 3 samples"),
        ("".join(lines[:3]) + lines[3][:40], "samples.jsonl:4 is no sample"),
        ("".join(lines[:3]) + lines[0], "not 1 different ones"),
    ]:
        (two / "samples.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            load_evaluation(two)
    (two / "eval.json").unlink()
    with pytest.raises(UserError, match="is no evaluation"):
        compare([one, two], tmp_path / "out")
    with pytest.raises(UserError, match="is given 2 times"):
        compare([one, one], tmp_path / "out")
    with pytest.raises(UserError, match="give at least two arms"):
        compare([one], tmp_path / "out")
    with pytest.raises(UserError, match="give at least two evaluation folders"):
        compare([], tmp_path / "out")
    with pytest.raises(UserError, match="label for 'nowhere'"):
        compare([one], tmp_path / "out", labels={"nowhere": "x"})
