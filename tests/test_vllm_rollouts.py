"""Rollouts by the real vLLM: its log-probabilities prove that it has the student's weights, and when they change."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from distill.config import TrainConfig
from distill.errors import UserError
from distill.material import Rewarded
from distill.models import load_model, load_tokenizer
from distill.objective import read_objective
from distill.train import run_training
from teachers import nano
from teachers.rewards.open import open_rewards

pytest.importorskip("vllm")


def logps(model, prompt: list[int], completion: list[int], temperature: float) -> np.ndarray:
    """What the student itself says of a completion's tokens."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        rows = (model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature).log_softmax(-1)
    return rows.gather(-1, torch.tensor(completion)[:, None])[:, 0].numpy()


@pytest.mark.vllm
def test_the_engine_has_the_students_weights_whenever_they_change_and_grpo_trains_with_it(tmp_path):
    from teachers.engines.vllm_rollouts import VllmWriter

    folder = str(nano.model_path())
    tokenizer, student = load_tokenizer(folder), load_model(folder)
    prompts = [list(tokenizer.encode(f"{n}+{n}?", add_special_tokens=False)) for n in range(2, 8)]
    asked = {"rooms": [12] * len(prompts), "seeds": list(range(len(prompts))), "temperature": 1.5}
    with VllmWriter(student, tokenizer, concurrency=16) as writer:
        first = writer.write(prompts, **asked)
        assert writer.write(prompts, **asked) == first
        for prompt, each in zip(prompts, first, strict=True):
            assert len(each.ids) == 12 or each.ended
            np.testing.assert_allclose(each.logps, logps(student, prompt, each.ids, 1.5), atol=2e-3)

        torch.manual_seed(0)
        with torch.no_grad():
            for weight in student.parameters():
                weight.add_(0.05 * weight.std() * torch.randn_like(weight))
        moved = [logps(student, prompt, each.ids, 1.5) for prompt, each in zip(prompts, first, strict=True)]
        assert max(np.abs(a - b.logps).max() for a, b in zip(moved, first, strict=True)) > 0.05
        writer.sync(student)
        for prompt, each in zip(prompts, writer.write(prompts, **asked), strict=True):
            np.testing.assert_allclose(each.logps, logps(student, prompt, each.ids, 1.5), atol=2e-3)

        config = TrainConfig(
            mode="grpo",
            student="nano",
            data="nano:1",
            limit=8,
            out=tmp_path / "run",
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-3,
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=32,
            rollout_temperature=1.5,
            rollout_backend="vllm",
            beta=0.01,  # so that every completion is trained on, whatever it earned
        )
        with open_rewards(config) as (questions, scorer):
            run_training(
                config, model=student, tokenizer=tokenizer, rewarded=Rewarded(questions, scorer), writer=writer
            )
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    ratios = [line["ratio"] for line in lines if line["trained_tokens"]]
    assert ratios
    # On the policy, what vLLM drew a token with is what the trainer finds.
    np.testing.assert_allclose(ratios, 1.0, atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "hard-labels", "rollout_backend": "vllm"}, "the student writes nothing"),
        ({"mode": "grpo", "rollout_engine_arg": ["seed=1"]}, "is for --rollout-backend vllm"),
    ],
)
def test_vllm_where_nothing_is_written_is_refused(tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        read_objective(TrainConfig(student="nano", data=tmp_path, out=tmp_path / "run", **settings))
