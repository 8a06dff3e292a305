"""Self-consistency: classes of equal answers, whoever comes first; no majority where there is none."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import UserError
from distill.records import Trace, Verdict
from teachers.prompts import read_prompts
from teachers.verifiers.pool import VerifierPool
from teachers.verifiers.self_consistency import final_answer, self_consistency

MATH500 = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "math" / "math500.jsonl"
LIMIT = 5.0

# Every line is one answer, written in several ways.
SAME = [
    ["1/2", "0.5", "\\frac{1}{2}", "\\boxed{\\frac{1}{2}}", "The answer is \\boxed{0.5}.", "Thus $\\frac12$."],
    [
        "B",
        "(B)",
        "**B**",
        "The answer is B.",
        "Answer: (b)",
        "\\boxed{B}",
        "\\boxed{\\text{B}}",
        "\\boxed{\\text{(B)}}",
    ],
    ["\\boxed{Paris}", "Paris", "paris.", "The answer is **Paris**!", "\\boxed{\\text{Paris}}"],
    ["\\boxed{(x+1)^2}", "\\boxed{x^2+2x+1}"],
    ["\\boxed{x=5}", "\\boxed{5}", "so it is 5"],
    ["\\boxed{1,234}", "The total is 1234 dollars"],
    ["\\boxed{\\text{red apple}}", "The final answer: red apple\nI hope this helps."],
]
# Every line holds answers no two of which are equal.
DIFFERENT = [
    ["\\boxed{5}", "\\boxed{5!}", "\\boxed{.5}", "\\boxed{-5}", "\\boxed{5x}"],
    ["\\boxed{x^2}", "\\boxed{x_2}", "\\boxed{2x}", "\\boxed{x+2}"],
    ["\\boxed{(1,2)}", "\\boxed{(2,1)}", "\\boxed{[1,2]}", "\\boxed{12}"],
    ["\\boxed{no}", "\\boxed{none}", "\\boxed{yes}", "\\boxed{eyes}"],
    ["\\boxed{red apple}", "\\boxed{red pear}", "\\boxed{red}"],
    ["A", "B", "AB"],
    ["Long story.\nI hope this helps!", "Another story.\nI hope this helps!"],
]
HOSTILE = [
    "(" * 200_000,
    "\ud800\udfff\x00",
    "\\boxed{\ud800}",
    "\\boxed{" * 30_000,
    "\\boxed{" * 20_000 + "1" + "}" * 20_000,
    "\\text{" * 20_000 + "}" * 20_000,
    "\\boxed{9**9**9**9}",
    "$\\boxed{9^{9^{9^{9}}}}$",
    "\\boxed{(10^9)!}",
    "\\boxed{100!!}",
    "\\boxed{(a+b+c)^{5000}}",
    "$\\sum_{k=1}^{10^9} \\frac{1}{k^3}$",
    "\\boxed{\\frac{" + "1" * 5000 + "}{0}}",
    "\\boxed{" + "7" * 100_000 + "}",
    "answer is " * 20_000,
    "word " * 40_000,
]


def trace(answer: str, index: int = 0) -> Trace:
    """Return a whole sample with this answer after its reasoning."""
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
    )


def samples(answers: Sequence[str]) -> tuple[Trace, ...]:
    return tuple(trace(answer, index) for index, answer in enumerate(answers))


def scores(answers: Sequence[str], min_agreement: float = 0.0) -> list[float | None]:
    return [verdict.score for verdict in self_consistency(samples(answers), min_agreement=min_agreement)]


@pytest.mark.parametrize("answers", SAME)
def test_one_answer_in_many_forms_is_one_class(answers: list[str]) -> None:
    verdicts = self_consistency(samples([*answers, "\\boxed{999}"]))
    share = f"{len(answers)} of {len(answers) + 1} agree ({len(answers) / (len(answers) + 1):.3f})"
    assert [verdict.score for verdict in verdicts] == [1.0] * len(answers) + [0.0]
    assert {verdict.reason for verdict in verdicts[:-1]} == {share}
    assert verdicts[-1].reason.startswith(f"1 of {len(answers) + 1} agree")


@pytest.mark.parametrize("answers", DIFFERENT)
def test_different_answers_never_agree(answers: list[str]) -> None:
    for one in answers:
        for other in answers:
            if one != other:
                assert scores([one, one, other]) == [1.0, 1.0, 0.0], (one, other)


@pytest.mark.parametrize("answers", [line for line in SAME if len(line) > 2])
def test_every_two_forms_meet(answers: list[str]) -> None:
    for one in answers:
        for other in answers:
            assert scores([one, other]) == [1.0, 1.0], (one, other)


def test_unanimity_tie_and_share() -> None:
    assert scores(["\\boxed{7}"] * 8) == [1.0] * 8
    assert scores(["7"] * 5 + ["8"] * 2 + ["9"]) == [1.0] * 5 + [0.0] * 3
    reasons = [verdict.reason for verdict in self_consistency(samples(["7"] * 5 + ["8"] * 2 + ["9"]))]
    assert reasons[0] == "5 of 8 agree (0.625)"
    assert reasons[6:] == ["2 of 8 agree (0.250), the majority has 5", "1 of 8 agree (0.125), the majority has 5"]
    tied = self_consistency(samples(["7", "7", "8", "8", "9"]))
    assert [verdict.score for verdict in tied] == [None] * 5
    assert {verdict.reason for verdict in tied} == {"tie: 2 answers lead, 2 of 5 agree (0.400) on each"}
    assert scores(["7"] * 5 + ["8"] * 3, min_agreement=0.625) == [1.0] * 5 + [0.0] * 3
    low = self_consistency(samples(["7"] * 5 + ["8"] * 3), min_agreement=0.626)
    assert {(verdict.score, verdict.reason) for verdict in low} == {(None, "5 of 8 agree (0.625), less than 0.626")}
    assert "min_agreement 0.626" in low[0].version


def test_who_has_no_answer_does_not_vote_and_one_vote_is_no_majority() -> None:
    cut = replace(trace("8", 10), finish_reason="length")
    looping = replace(trace("8", 11), finish_reason="loop")
    failed = replace(trace("8", 12), finish_reason="error", error="the connection was lost")
    empty, wordless = trace("", 13), trace("?", 14)
    silent = (cut, looping, failed, empty)
    verdicts = self_consistency((*samples(["7", "7"]), *silent))
    assert [verdict.score for verdict in verdicts] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert verdicts[0].reason == "2 of 5 agree (0.400)"  # the failed one says nothing about the question
    assert [verdict.reason for verdict in verdicts[2:]] == [
        "no answer: the completion ended by length",
        "no answer: the completion ended by loop",
        "failed",
        "no answer",
    ]
    alone = self_consistency((trace("7"), *silent, wordless))
    assert {verdict.score for verdict in alone[:5]} == {None}
    assert self_consistency((trace("7"),))[0].score is None
    assert self_consistency(()) == ()
    assert {verdict.score for verdict in self_consistency(silent)} == {None}


def test_only_what_follows_the_reasoning_votes_and_no_gold_is_looked_at() -> None:
    said = [replace(trace(a, i), reasoning="\\boxed{9}", gold="9") for i, a in enumerate(("7", "7", "9"))]
    assert [verdict.score for verdict in self_consistency(tuple(said))] == [1.0, 1.0, 0.0]
    assert [verdict.predicted for verdict in self_consistency(tuple(said))] == ["7", "7", "9"]


def test_where_there_are_options_a_letter_is_the_vote() -> None:
    options = {"A": "12 apples", "B": "7 apples", "C": "none"}
    said = ["The answer is B. It is not 12.", "\\boxed{7 apples}", "**B**", "A. There are 7 left", "(C)", "no idea"]
    verdicts = self_consistency(tuple(replace(trace(a, i), meta={"choices": options}) for i, a in enumerate(said)))
    assert [verdict.predicted for verdict in verdicts] == ["B", "B", "B", "A", "C", None]
    assert [verdict.score for verdict in verdicts] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert verdicts[0].reason == "3 of 6 agree (0.500)"


ANSWERS = st.lists(st.sampled_from([form for line in SAME + DIFFERENT for form in line] + ["", "?"]), max_size=9)


@settings(max_examples=60)
@given(ANSWERS, st.integers(0, 2**32), st.sampled_from([0.0, 0.4]))
def test_the_order_of_the_samples_decides_nothing(answers: list[str], seed: int, min_agreement: float) -> None:
    traces = samples(answers)
    shuffled = random.Random(seed).sample(traces, len(traces))
    here = dict(zip((t.uid for t in traces), self_consistency(traces, min_agreement=min_agreement), strict=True))
    there = self_consistency(tuple(shuffled), min_agreement=min_agreement)
    assert {t.uid: verdict for t, verdict in zip(shuffled, there, strict=True)} == here


@settings(max_examples=60)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12), st.randoms())
def test_it_is_the_plain_majority_of_integers(numbers: list[int], chance: random.Random) -> None:
    """Written in any form, integers are counted as `Counter` counts them."""
    forms = ("{}", "\\boxed{{{}}}", "so it is ${}$", "The answer is {}.0", "\\boxed{{\\frac{{{}}}{{1}}}}")
    found = scores([chance.choice(forms).format(number) for number in numbers])
    counted = Counter(numbers).most_common()
    if len(counted) > 1 and counted[0][1] == counted[1][1]:
        assert found == [None] * len(numbers)
    else:
        assert found == [float(number == counted[0][0]) for number in numbers]


@settings(max_examples=40)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=5))
def test_any_text_gets_a_verdict(answers: list[str]) -> None:
    verdicts = self_consistency(samples(answers))
    assert len(verdicts) == len(answers)
    for verdict in verdicts:
        assert isinstance(verdict, Verdict)
        assert verdict.score in (None, 0.0, 1.0)
        assert verdict.reason


@pytest.mark.parametrize("share", [-0.1, 1.1, "half", True, None, float("nan")])
def test_min_agreement_is_a_share(share: object) -> None:
    with pytest.raises(UserError, match="min_agreement is a share"):
        self_consistency((), min_agreement=share)  # type: ignore[arg-type]


def test_hostile_answers_cost_the_others_nothing() -> None:
    """All of them among one prompt's samples, in the pool: the majority is found within the limit."""
    traces = samples([*HOSTILE, *["\\boxed{7}"] * 3])
    with VerifierPool("self-consistency", limit_seconds=LIMIT) as pool:
        ((_, judged, verdicts),) = pool.judge_groups([("p", traces)])
    assert judged == traces
    assert [verdict.score for verdict in verdicts] == [0.0] * len(HOSTILE) + [1.0] * 3, verdicts[0]
    assert verdicts[-1].reason == f"3 of {len(traces)} agree ({3 / len(traces):.3f})"


def test_the_pool_passes_options_and_refuses_others() -> None:
    with VerifierPool("self-consistency", options={"min_agreement": 0.9}) as pool:
        ((_, _, verdicts),) = pool.judge_groups([(0, samples(["7", "7", "8"]))])
    assert {verdict.score for verdict in verdicts} == {None}
    with VerifierPool("self-consistency", options={"agreement": 0.9}) as pool:
        pool.submit_group(0, samples(["7"]))
        with pytest.raises(UserError, match="accepted are min_agreement"):
            pool.collect_groups(wait=True)


@pytest.mark.skipif(not MATH500.is_file(), reason="MATH-500 is not here")
def test_real_golds_agree_with_themselves_and_not_with_others() -> None:
    golds = [str(prompt.gold) for prompt in read_prompts(str(MATH500), limit=60)[0]]
    for gold, other in zip(golds, reversed(golds), strict=True):
        answers = [f"\\boxed{{{gold}}}", f"So the answer is ${gold}$.", f"\\boxed{{{other}}}"]
        shared = final_answer(answers[0]) == final_answer(answers[2])
        assert scores(answers)[:2] == [1.0, 1.0], gold
        assert scores(answers)[2] == float(shared), (gold, other)
