"""Reinforcement from questions to a trained student: what is sampled, rewarded, thrown away, counted and learnt."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from rewarding import LetterShare, rewarded

from distill.budget import Budget
from distill.config import TrainConfig
from distill.errors import UserError
from distill.material import Rewarded
from distill.objective import loss_options
from distill.reinforce.experience import Experience
from distill.reinforce.questions import Questions
from distill.reinforce.recipes import PRESETS, Recipe, recipe_of
from distill.reinforce.rewards import Answer, Reward
from distill.render import decode
from distill.rollouts import Rollouts
from distill.train import run_training
from teachers.rewards.open import open_rewards

TOKENS = 259
CPU = torch.device("cpu")


def config(tmp_path, **settings) -> TrainConfig:
    values = {
        "mode": "grpo",
        "student": "tiny",
        "data": "sums",
        "out": tmp_path / "run",
        "max_steps": 2,
        "max_length": 256,
        "max_completion_length": 12,
        "logging_steps": 1,
        "num_generations": 4,
        **settings,
    }
    return TrainConfig(**values)


def train(made: TrainConfig, *, model=None, asked=None, teacher=None) -> tuple[dict, torch.nn.Module]:
    student = tiny_model(seed=made.seed) if model is None else model
    run = run_training(made, model=student, tokenizer=byte_tokenizer(), teacher=teacher, rewarded=asked or rewarded())
    return run, student


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Scripted:
    """Rewards by the number of the answer within its group, for every second question: the others teach nothing."""

    def __init__(self, group: int) -> None:
        self.weights = {"scripted": 1.0}
        self.calls = 0
        self.group = group
        self.asked: list[str] = []

    def __call__(self, answers: Sequence[Answer], *, group: int) -> list[list[Reward]]:
        assert group == self.group
        self.asked += [each.question.source for each in answers[::group]]
        useful = [int(each.question.source.partition(":")[2]) % 2 == 0 for each in answers]
        return [
            [Reward(float(each.number) if is_useful else 1.0)] for each, is_useful in zip(answers, useful, strict=True)
        ]


def experience(scorer, recipe: Recipe, *, rows: int = 8, count: int = 24, world: int = 1, rank: int = 0) -> Experience:
    tokenizer, model = byte_tokenizer(), tiny_model()
    rollouts = Rollouts(
        model, end_ids=[258], pad_id=256, num_outcomes=TOKENS, max_length=128, seed=0, max_completion_length=4
    )
    return Experience(
        Questions(rewarded(count).prompts, tokenizer, seed=0),
        scorer,
        rollouts,
        recipe,
        lambda ids: decode(tokenizer, list(ids)),
        rows=rows,
        micro_batches=1,
        pad_id=256,
        world=world,
        rank=rank,
    )


def nothing_read(batch, by_reference):
    raise AssertionError("on the policy and without a reference, nothing is read again")


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


# -- what is asked


def test_every_question_comes_once_before_any_comes_twice():
    questions = Questions(rewarded(10).prompts, byte_tokenizer(), seed=3)
    stream = [questions.at(place).prompt.source for place in range(30)]
    for epoch in range(3):
        assert sorted(stream[10 * epoch : 10 * epoch + 10]) == sorted(q.prompt.source for q in questions.items)
    assert stream[:10] != stream[10:20]
    assert [questions.at(place).prompt.source for place in range(30)] == stream


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_stream_of_questions_and_draw_what_one_would(world):
    """The same questions with the same answers, whoever writes them."""
    recipe = Recipe(num_generations=2)

    def trained(made: Experience) -> set[tuple[int, ...]]:
        batch = made.step(0, nothing_read, CPU, reduce=same).batches[0]
        rows = batch.input_ids[batch.weights.sum(1) > 0].tolist()
        return {tuple(token for token in row if token != 256) for row in rows}

    ranks = [experience(LetterShare(), recipe, rows=8 // world, world=world, rank=rank) for rank in range(world)]
    assert set().union(*map(trained, ranks)) == trained(experience(LetterShare(), recipe, rows=8))


# -- dynamic sampling, masses, counts


def test_without_dynamic_sampling_useless_groups_stay_in_the_mass_and_leave_the_batch():
    scorer = Scripted(4)
    step = experience(scorer, Recipe(num_generations=4, loss_type="grpo"), rows=16).step(
        0, nothing_read, CPU, reduce=same
    )
    useful = [int(source.partition(":")[2]) % 2 == 0 for source in scorer.asked]
    assert len(useful) == 4
    assert len(step.batches[0].input_ids) == 4 * sum(useful)
    assert step.mass == 16.0
    assert step.metrics["groups_without_signal"].tolist() == [4 - sum(useful), 4]


def test_dynamic_sampling_fills_the_step_with_questions_that_teach():
    scorer = Scripted(4)
    made = experience(scorer, Recipe(num_generations=4, dynamic_sampling=10), rows=32)
    step = made.step(0, nothing_read, CPU, reduce=same)
    assert len(step.batches[0].input_ids) == 32
    assert bool((step.batches[0].policy.advantages.reshape(8, 4).abs().max(1).values > 0).all())
    # All that was sampled is paid for, what was thrown away too; and no question was asked twice.
    assert step.counts["questions"] == len(scorer.asked) > 8
    assert len(set(scorer.asked)) == len(scorer.asked)
    assert step.metrics["completion_length"][1] == 4 * len(scorer.asked)


def test_dynamic_sampling_gives_up_after_its_rounds_and_says_so():
    class Useless(LetterShare):
        def __call__(self, answers, *, group):
            return [[Reward(0.0)] for _ in answers]

    made = experience(Useless(), Recipe(num_generations=4, dynamic_sampling=2), rows=8)
    step = made.step(0, nothing_read, CPU, reduce=same)
    assert step.metrics["groups_without_signal"].tolist() == [6, 6]  # three rounds of two questions
    assert float(step.batches[0].weights.sum()) == 0.0  # nothing to learn, and a batch to run all the same


def test_answers_without_a_reward_and_cut_ones_teach_nothing():
    class Sometimes(LetterShare):
        def __call__(self, answers, *, group):
            return [[Reward(None if each.number == 0 else float(each.number))] for each in answers]

    made = experience(Sometimes(), Recipe(num_generations=4), rows=8)
    step = made.step(0, nothing_read, CPU, reduce=same)
    assert step.metrics["reward"].tolist() == [12.0, 6.0]
    assert len(step.batches[0].input_ids) == 2 * 2  # of 1, 2, 3 the mean has advantage 0, of 0 nothing is known
    masked = experience(Scripted(4), Recipe(num_generations=4, mask_truncated_completions=True), rows=8)
    step = masked.step(0, nothing_read, CPU, reduce=same)
    ended = [row for row in step.batches[0].input_ids.tolist() if 258 in row[-4:]]
    assert step.metrics["truncated"][0] > 0
    assert float(step.batches[0].weights.sum()) == 0.0 or len(ended) == len(step.batches[0].input_ids)


def test_a_sampling_of_several_updates_is_trained_on_whole_before_the_next():
    recipe = Recipe(num_generations=4, updates=2, num_iterations=2, loss_type="grpo")
    scorer = Scripted(4)
    made = experience(scorer, recipe, rows=16)

    def read(batch, by_reference):
        return torch.zeros(batch.input_ids.shape)

    steps = [made.step(number, read, CPU, reduce=same) for number in range(5)]
    asked = [float(step.counts.get("questions", 0.0)) for step in steps]
    assert asked == [8.0, 0.0, 0.0, 0.0, 8.0]
    for first, second in ((0, 2), (1, 3)):
        torch.testing.assert_close(steps[first].batches[0].input_ids, steps[second].batches[0].input_ids)
    rows = [tuple(row) for step in steps[:2] for row in step.batches[0].input_ids.tolist()]
    assert len(rows) == 4 * sum(int(s.partition(":")[2]) % 2 == 0 for s in scorer.asked[:8])


def test_the_ledger_counts_every_pass_through_the_student(tmp_path):
    """Written once, read once by itself and once by its reference, trained three times over."""
    from distill.ledger import forward_flops

    made = config(tmp_path, beta=0.1, num_iterations=2, max_steps=2, per_device_train_batch_size=8, loss_type="grpo")
    run, student = train(made)
    rows = [json.loads(line) for line in (made.out / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 8  # the whole of the one sampling
    lengths = np.array([row["num_prompt_tokens"] + row["num_completion_tokens"] for row in rows], float)
    forward = forward_flops(student.config, lengths.sum(), (lengths**2).sum() / lengths.sum() / 2)
    assert run["ledger"]["rollout_tokens"] == lengths.sum()
    assert run["ledger"]["tokens"] == 2 * lengths.sum()
    assert run["ledger"]["flops"] == pytest.approx((1 + 2 + 2 * 3) * forward, rel=1e-9)
    assert run["ledger"]["questions"] == 2


# -- what is learnt


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_every_preset_makes_the_rewarded_likelier(tmp_path, preset):
    made = config(
        tmp_path,
        preset=preset,
        reward=["upper=1"],
        max_steps=32,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        warmup_steps=0,
        per_device_train_batch_size=32,
        num_generations=8,
        steps_per_generation=4 if preset == "gspo" else 1,
        save_steps=1000,
    )
    train(made)
    rewards = [line["reward"] for line in lines(made.out) if not math.isnan(line.get("reward", math.nan))]
    assert np.mean(rewards[-2:]) > 2 * np.mean(rewards[:2])


def test_a_teachers_divergence_can_stand_beside_the_reward(tmp_path):
    made = config(tmp_path, mode=None, loss="grpo=1,on_policy=0.5", teacher="tiny", max_steps=2)
    run, _ = train(made, teacher=tiny_model(seed=7))
    assert run["metrics"]["reverse_kl"] > 0
    assert {"grpo", "on_policy", "reward"} <= run["metrics"].keys()
    # Completions of advantage 0 still hear the teacher.
    assert run["ledger"]["tokens"] == run["ledger"]["rollout_tokens"]


def test_a_beta_of_the_loss_brings_the_reference(tmp_path):
    run, _ = train(config(tmp_path, set=["grpo.beta=0.1"], max_steps=1))
    assert run["metrics"]["reference_kl"] == pytest.approx(0.0, abs=1e-6)
    assert run["reinforcement"]["beta"] == 0.1


def test_lora_reads_its_reference_without_a_second_model(tmp_path):
    run, _ = train(config(tmp_path, beta=0.1, lora_r=4, max_steps=2))
    assert lines(tmp_path / "run")[0]["reference_kl"] == pytest.approx(0.0, abs=1e-6)
    assert run["metrics"]["reference_kl"] >= 0


def test_a_runs_rollouts_are_traces_that_the_viewer_shows(tmp_path):
    from distill.config import ViewConfig
    from distill.records import Trace
    from distill.viewer.page import write_view

    made = config(tmp_path, data="nano:1", limit=8, reward=["accuracy=1", "format=0.5"], log_completions=3)
    with open_rewards(made) as (prompts, scorer):
        train(made, asked=Rewarded(prompts, scorer))
    rows = [json.loads(line) for line in (made.out / "rollouts.jsonl").read_text().splitlines()]
    traces = [Trace.from_json(row) for row in rows]
    assert [row["step"] for row in rows] == [1] * 3 + [2] * 3
    assert len({trace.uid for trace in traces}) == 6
    for trace in traces:
        assert [verdict.verifier for verdict in trace.verdicts] == ["format", "accuracy"]
        earned = trace.verdicts[1].score + 0.5 * trace.verdicts[0].score
        assert trace.meta["reward"] == pytest.approx(earned)
        assert trace.score == trace.verdicts[1].score
    shown = write_view(ViewConfig(dir=made.out, out=tmp_path / "view.html"))
    assert (shown["traces"], shown["of_traces"]) == (6, 6)


# -- recipes


def test_what_is_given_beats_the_preset(tmp_path):
    assert recipe_of(config(tmp_path, preset="dapo", num_generations=None)).num_generations == 16
    made = recipe_of(config(tmp_path, preset="dapo", epsilon_high=0.5, reward=["accuracy=2, format=0.5"]))
    assert (made.epsilon_high, made.dynamic_sampling, made.num_generations) == (0.5, 10, 4)
    assert made.rewards == ("accuracy=2", "format=0.5")
    options = loss_options(config(tmp_path, preset="grpo-r1"))
    assert options["grpo"]["epsilon"] == 10.0
    assert options["grpo"]["beta"] == 0.001
    assert loss_options(config(tmp_path, preset="grpo-r1", set=["grpo.beta=0.5"]))["grpo"]["beta"] == 0.5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_generations": 3}, "no multiple of --num-generations 3"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "no multiple of --gradient-accumulation-steps"),
        ({"mode": "hard-labels", "preset": "dapo", "num_generations": None}, "--preset says nothing to hard_labels"),
        (
            {"mode": "on-policy", "teacher": "x", "beta": 0.1, "num_generations": None},
            "--beta says nothing to on_policy",
        ),
        ({"rollout_top_p": 0.9}, "top_p must be 1"),
        ({"rollout_temperature": 0.0}, "temperature 0"),
        ({"packing": True}, "one sequence to a row"),
        ({"lora_r": 4, "beta": 0.1, "ref_model_sync_steps": 3}, "ref-model-sync-steps"),
        ({"max_flops": 1e9, "warmup_steps": 10}, "give a share of the run"),
        ({"max_length": 20}, "exceed the 20"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_anything_is_written(tmp_path, settings, said):
    made = config(tmp_path, **settings)
    with pytest.raises(UserError, match=said):
        train(made)
    assert not made.out.exists() or not any(made.out.iterdir())


# -- budgets and milestones


@given(st.floats(0.1, 1e6), st.floats(0, 1e7), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_budget_is_spent_by_its_most_spent_limit(limit, seconds, trained, written):
    ledger = {"flops": 3.0, "seconds": seconds, "tokens": trained, "rollout_tokens": written}
    share = Budget(seconds=limit, tokens=1000).share(ledger)
    assert share == max(seconds / limit, (trained + written) / 1000)


@pytest.mark.parametrize("mode", ["grpo", "hard-labels"])
def test_a_run_ends_with_the_step_that_reaches_its_budget_and_keeps_its_milestones(tmp_path, mode, write_jsonl):
    from transformers import AutoModelForCausalLM

    data = write_jsonl("data.jsonl", [{"prompt": f"{i}+1?", "completion": f" {i + 1}"} for i in range(8)])
    settings = {"mode": mode, "data": data, "max_steps": None, "save_steps": 1000, "learning_rate": 1e-3}
    settings |= {} if mode == "grpo" else {"num_generations": None}
    free = config(tmp_path, **settings | {"out": tmp_path / "free", "max_steps": 12})
    whole = train(free)[0]["ledger"]["flops"]
    made = config(tmp_path, **settings, max_flops=0.6 * whole, milestones=4)
    run, student = train(made)
    spent = [line["flops"] for line in lines(made.out)]
    assert spent[-1] >= 0.6 * whole > spent[-2]
    assert run["progress"] == 1.0
    rates = [line["learning_rate"] for line in lines(made.out)]
    assert rates[-1] < 0.3 * max(rates)  # the cosine has come down with what was spent
    kept = [json.loads((made.out / "milestones" / str(k) / "run.json").read_text()) for k in (1, 2, 3)]
    for k, record in enumerate(kept, 1):
        assert k / 4 <= record["progress"] < 1
        assert record["ledger"]["flops"] < run["ledger"]["flops"]
        model = AutoModelForCausalLM.from_pretrained(made.out / "milestones" / str(k))
        assert model.num_parameters() == student.num_parameters()
    assert [record["steps"] for record in kept] == sorted(record["steps"] for record in kept)
