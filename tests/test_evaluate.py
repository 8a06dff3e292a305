"""Evaluations: every number in eval.json against closed forms and plain enumeration; bits per byte computed anew."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import EvalConfig
from distill.errors import UserError
from distill.evaluate import bits_per_byte, doublings, load_evaluation, majority_score, strata, summarise
from distill.records import Completion, Trace, Verdict
from distill.store import write_json
from teachers.backend import Request
from teachers.evaluate import run_eval
from teachers.plan import Author


def sample(question: int, index: int, predicted: str | None, *, right: bool = False, **changes: Any) -> Trace:
    """Return a judged sample; `predicted` None: no answer was found in it."""
    verdict = Verdict(verifier="v", version="1", score=float(right), predicted=predicted)
    made = Trace(
        uid=f"{question}-{index}",
        prompt_uid=f"q{question}",
        messages=({"role": "user", "content": "?"},),
        completion="",
        reasoning="",
        answer="",
        finish_reason="stop",
        num_prompt_tokens=1,
        num_completion_tokens=10 * question + index,
        sample_index=index,
        seed=0,
        teacher="t",
        backend="b",
        predicted=predicted,
        verdicts=(verdict,),
    )
    return replace(made, **changes)


def group(question: int, answers: str) -> list[Trace]:
    """Return a question's samples: R right, another letter a wrong answer of that text, - none."""
    return [
        sample(question, index, None if letter == "-" else letter, right=letter == "R")
        for index, letter in enumerate(answers)
    ]


def test_closed_forms() -> None:
    samples = group(0, "RRab") + group(1, "aabR") + group(2, "----")
    found = summarise(samples, samples_per_question=4)
    means = [0.5, 0.25, 0.0]
    mean = sum(means) / 3
    assert found["pass@1"] == pytest.approx(mean)
    assert found["pass@k"] == pytest.approx(2 / 3)  # of 4 samples 4 are drawn: any right one counts
    assert found["maj@k"] == pytest.approx((1 + 0 + 0) / 3)
    assert found["stderr"] == pytest.approx(math.sqrt(sum((m - mean) ** 2 for m in means) / 2 / 3))
    assert 0 <= found["ci95"][0] < mean < found["ci95"][1] <= 1
    assert (found["truncated"], found["no_answer"]) == (0, pytest.approx(4 / 12))
    assert found["mean_completion_tokens"] == pytest.approx(10 + 1.5)
    assert (found["questions"], found["samples_per_question"]) == (3, 4)


def test_one_sample_each_is_a_proportion_with_wilsons_interval() -> None:
    found = summarise([t for q in range(100) for t in group(q, "R" if q < 40 else "a")], samples_per_question=1)
    assert found["pass@1"] == found["pass@k"] == found["maj@k"] == pytest.approx(0.4)
    assert found["stderr"] == pytest.approx(math.sqrt(0.4 * 0.6 / 99))
    assert found["ci95"] == pytest.approx([0.3094, 0.4980], abs=0.005)


@given(answers=st.lists(st.text("Rab-", min_size=3, max_size=3), min_size=1, max_size=6), data=st.data())
@settings(deadline=None, max_examples=50)
def test_the_order_of_samples_changes_nothing(answers: list[str], data: st.DataObject) -> None:
    samples = [t for question, letters in enumerate(answers) for t in group(question, letters)]
    found = summarise(samples, samples_per_question=3)
    assert json.dumps(summarise(data.draw(st.permutations(samples)), samples_per_question=3)) == json.dumps(found)
    assert found["pass@1"] <= found["pass@k"] + 1e-12
    assert found["pass@1"] == pytest.approx(sum(letters.count("R") for letters in answers) / 3 / len(answers))
    assert found["pass@k"] == pytest.approx(sum("R" in letters for letters in answers) / len(answers))
    assert found["no_answer"] == pytest.approx(sum(letters.count("-") for letters in answers) / 3 / len(answers))


CUTS = {
    "length": {"finish_reason": "length"},
    "loop": {"finish_reason": "loop"},
    "error": {"finish_reason": "error", "error": "the engine died"},
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_sample_that_was_cut_is_wrong_and_no_answer_whatever_stands_in_it(cut: dict[str, str]) -> None:
    right = sample(0, 0, "42", right=True)
    assert summarise([right], samples_per_question=1)["pass@1"] == 1.0
    found = summarise([replace(right, **cut)], samples_per_question=1)
    assert (found["pass@1"], found["pass@k"], found["maj@k"], found["no_answer"]) == (0, 0, 0, 1)
    assert found["truncated"] == float(cut["finish_reason"] == "length")


@given(letters=st.text("Rab-", min_size=2, max_size=6), data=st.data())
def test_a_sample_that_was_cut_counts_as_one_without_an_answer_in_every_score(
    letters: str, data: st.DataObject
) -> None:
    """Not even a vote: whatever was written and judged, only `truncated` may tell it from silence."""
    place = data.draw(st.integers(0, len(letters) - 1))
    cut = data.draw(st.sampled_from(list(CUTS.values())))
    silent = letters[:place] + "-" + letters[place + 1 :]
    cut_short = [replace(t, **cut) if t.sample_index == place else t for t in group(0, letters)]
    found, expected = (summarise(each, samples_per_question=len(letters)) for each in (cut_short, group(0, silent)))
    assert found.pop("truncated") == (cut["finish_reason"] == "length") / len(letters)
    assert expected.pop("truncated") == 0
    assert found == expected


@given(scores=st.lists(st.booleans(), min_size=1, max_size=7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(scores: list[bool]) -> None:
    n = len(scores)
    found = summarise(group(0, "".join("R" if right else "a" for right in scores)), samples_per_question=n)
    assert list(found["pass@k_by_k"]) == [str(k) for k in (1, 2, 4, 8) if k < n] + [str(n)]
    for k, share in found["pass@k_by_k"].items():
        subsets = list(itertools.combinations(scores, int(k)))
        assert share == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert found["pass@k"] == found["pass@k_by_k"][str(n)] == any(scores)
    assert found["pass@1"] == pytest.approx(found["pass@k_by_k"]["1"])


def test_doublings() -> None:
    assert [doublings(n) for n in (1, 2, 3, 8, 9)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 9]]


def test_repetition_and_mixed_languages_are_shares_of_samples() -> None:
    flags = [(), ("loop",), ("loop", "language_mix"), ("malformed: unclosed", "code_block")]
    found = summarise(
        [replace(t, flags=f) for t, f in zip(group(0, "Raaa"), flags, strict=True)], samples_per_question=4
    )
    assert (found["repetition"], found["language_mixed"]) == (0.5, 0.25)


def test_an_unjudged_sample_is_wrong() -> None:
    judged = Verdict(verifier="v", version="1", score=None, reason="timeout")
    for verdicts in ((), (judged,)):
        assert summarise([sample(0, 0, "1", verdicts=verdicts)], samples_per_question=1)["pass@1"] == 0.0


@pytest.mark.parametrize("samples", [[], group(0, "R"), group(0, "RR") + group(1, "R"), group(0, "RRR")])
def test_every_question_needs_its_samples(samples: list[Trace]) -> None:
    with pytest.raises(ValueError, match="every question needs 2 samples"):
        summarise(samples, samples_per_question=2)


@given(letters=st.text("Rabc-", min_size=1, max_size=7), names=st.permutations("xyz"), equal=st.booleans())
def test_a_majority_is_drawn_by_lot_among_the_largest_classes(letters: str, names: list[str], equal: bool) -> None:
    """Every lot enumerated: who leads after each order of counting, if the first to reach the most votes wins."""
    samples = group(0, letters)
    named = dict(zip("abc", [names[0], names[0], names[1]] if equal else names, strict=True))
    classes = {t.uid: named[letter] for t, letter in zip(samples, letters, strict=True) if letter in named}
    votes = [named.get(letter, letter) for letter in letters if letter != "-"]
    lots = list(itertools.permutations(sorted(set(votes))))
    won = [max(lot, key=votes.count) for lot in lots if lot]  # max takes the first of equals
    expected = sum(winner == "R" for winner in won) / len(won) if won else 0.0
    assert majority_score(samples, classes) == pytest.approx(expected)
    if not equal:
        assert majority_score(samples) == majority_score(samples, classes)


def test_right_answers_are_one_class_however_they_are_written() -> None:
    written = [sample(0, i, text, right=text != "3") for i, text in enumerate(["1/2", "0.5", "3", "3", "\\frac{1}{2}"])]
    assert majority_score(written) == 1.0


class Scripted:
    """A backend that answers every question with the same texts, one for each sample."""

    name, provides, description, config = "scripted", frozenset({"text"}), "a list of answers", None

    def __init__(self, *answers: str, cut: Iterable[int] = ()) -> None:
        self.answers, self.cut = answers, set(cut)

    def generate(self, requests: Iterable[Request | None], sampling: Any) -> Iterator[tuple[Request, Completion]]:
        for request in filter(None, requests):
            ended = "length" if request.sample_index in self.cut else "stop"
            text = self.answers[request.sample_index]
            yield request, Completion(text=text, finish_reason=ended, num_prompt_tokens=1, num_completion_tokens=2)

    def close(self) -> None: ...


@pytest.fixture
def evaluate(tmp_path: Path, write_jsonl: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """Evaluate answers to two questions whose gold is 3."""
    questions = write_jsonl("questions.jsonl", [{"question": f"{i}?", "answer": "3"} for i in range(2)])

    def run(*answers: str, model: Path = tmp_path, cut: Iterable[int] = (), **settings: Any) -> dict[str, Any]:
        config = EvalConfig(model="m", prompts=str(questions), out=tmp_path / "e", n=len(answers), **settings)
        author = Author(name="m", location=str(model), identity="m@1")
        return run_eval(config, author, lambda: Scripted(*answers, cut=cut))

    return run


def test_wrong_answers_that_are_equal_vote_together(evaluate: Callable[..., dict[str, Any]]) -> None:
    answers = ["\\boxed{3}", "so it is 3.0", "\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", "\\boxed{1/2}"]
    found = evaluate(*answers)
    assert (found["pass@1"], found["maj@k"], found["maj@k_unclassed"]) == (pytest.approx(0.4), 0.0, 0)
    assert evaluate(*answers) == found  # from the journal alone


def test_a_cut_answer_does_not_vote_with_its_equals(
    evaluate: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Three halves would outvote two threes; two of them tie, and lots are drawn."""
    answers = ["\\boxed{3}", "\\boxed{3}", "\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", "\\boxed{1/2}"]
    found = evaluate(*answers, cut=[4])
    assert (found["truncated"], found["no_answer"], found["maj@k"]) == (0.2, 0.2, 0.5)
    assert "40% accepted, 4 wrong, 2 cut" in capsys.readouterr().err


def test_loops_and_foreign_scripts_are_found_by_the_filters(evaluate: Callable[..., dict[str, Any]]) -> None:
    answers = ["wait, " * 200 + "\\boxed{3}", "那么答案 \\boxed{3}", "\\boxed{3}", "\\boxed{3}"]
    found = evaluate(*answers)
    assert (found["repetition"], found["language_mixed"], found["pass@1"]) == (0.25, 0.25, 1.0)


def test_what_a_model_cost_and_its_step_stand_beside_what_it_scores(
    tmp_path: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    milestone = tmp_path / "run" / "milestones" / "1"
    milestone.mkdir(parents=True)
    ledger = {"flops": 1.0, "seconds": 2.0, "tokens": 3}
    write_json(milestone / "run.json", {"steps": 40, "ledger": ledger, "progress": 0.25})
    found = evaluate("3", model=milestone, arm="a", train_seed=0)
    assert (found["train_step"], found["training"], found["arm"], found["train_seed"]) == (40, ledger, "a", 0)
    loaded = load_evaluation(tmp_path / "e")
    assert loaded.summary["train_step"] == 40
    assert not {"train_step", "training", "arm", "train_seed"} & evaluate("3").keys()


def test_scores_of_a_harness_are_no_evaluation(tmp_path: Path) -> None:
    write_json(tmp_path / "eval.json", {"harness": "lm-eval", "tasks": {}})
    with pytest.raises(UserError, match=r"made by lm-eval.*--prompts"):
        load_evaluation(tmp_path)


def test_one_question_has_no_error_and_its_summary_is_json(tmp_path: Path) -> None:
    write_json(tmp_path / "eval.json", summarise(group(0, "Ra"), samples_per_question=2))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads((tmp_path / "eval.json").read_text(), parse_constant=refuse)
    assert found["stderr"] is None
    assert found["pass@1"] == 0.5


def test_strata() -> None:
    samples = [replace(t, meta={"level": q}) for q in (2, 1) for t in group(q, "Ra" if q == 1 else "aa")]
    assert strata([*samples, *group(9, "R")], "level") == {"1": 0.5, "2": 0.0}
    assert strata(group(0, "R"), "level") == {}


CONVERSATIONS = [
    [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}],
    [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<think>é 数</think>\nbecause"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "?"}, {"role": "assistant", "content": "x" * 40}],
]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bits_per_byte_equals_the_sum_over_plain_logits(
    family: str, tokenizer: Any, make_model: Callable[..., Any]
) -> None:
    """With a byte tokenizer the ids are the bytes; ChatML's turns and the end token are known."""
    import torch

    model = make_model(family).eval()
    bits = 0.0
    num_bytes = 0
    for messages in CONVERSATIONS:
        asked = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages[:-1])
        prompt = tokenizer(asked + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0].double()
        logp = torch.log_softmax(logits, -1)
        for position, token in enumerate(answer, len(prompt)):
            bits -= logp[position - 1, token].item() / math.log(2)
        num_bytes += len(messages[-1]["content"].encode())
    results = [bits_per_byte(model, tokenizer, CONVERSATIONS, batch_size=size) for size in (1, 2, 8)]
    for found in results:
        assert found["bits_per_byte"] == pytest.approx(bits / num_bytes, rel=1e-5)
        assert found["bytes"] == num_bytes
        assert found["tokens"] == num_bytes + len(CONVERSATIONS)
        assert found["conversations"] == 3
    for one, other in itertools.pairwise(results):
        assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"], rel=1e-6)


def test_bits_per_byte_needs_a_conversation(tokenizer: Any, make_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="at least one conversation"):
        bits_per_byte(make_model(), tokenizer, [])
