"""What a recipe asks to be learnt: modes, weights, options, and where the teacher's word comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.config import TrainConfig
from distill.errors import UserError
from distill.objective import loss_options, loss_weights, read_objective, signal_folder, teacher_source


def recipe(tmp_path: Path, **values) -> TrainConfig:
    return TrainConfig(**{"student": "tiny", "data": tmp_path / "store", "out": tmp_path / "run", **values})


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """A store with stored numbers."""
    (tmp_path / "store" / "signal").mkdir(parents=True)
    (tmp_path / "store" / "signal" / "header.json").touch()
    return tmp_path


def test_a_mode_or_several_with_weights(tmp_path):
    assert loss_weights(recipe(tmp_path, mode="soft-logits")) == {"soft_logits": 1.0}
    assert loss_weights(recipe(tmp_path, loss="soft-logits=1, hard_labels=0.5")) == {
        "soft_logits": 1.0,
        "hard_labels": 0.5,
    }


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "--mode, or with --loss for several modes; neither was given"),
        ({"mode": "hard-labels", "loss": "hard_labels=1"}, "both was given"),
        ({"mode": "hard-label"}, "did you mean 'hard-labels'"),
        ({"loss": "hard-label=1"}, "did you mean 'hard-labels'"),
        ({"loss": "hard_labels"}, "--loss takes key=value"),
        ({"loss": "hard_labels=much"}, "--loss takes mode=number, not hard_labels='much'"),
        ({"loss": "hard_labels=true"}, "--loss takes mode=number"),
        ({"loss": "hard_labels=-1"}, "must be a positive number, not -1.0"),
        ({"loss": "hard_labels=.inf"}, "must be a positive number, not inf"),
    ],
)
def test_losses_that_mean_nothing_are_refused(tmp_path, values, said):
    with pytest.raises(UserError, match=said):
        loss_weights(recipe(tmp_path, **values))


def test_the_teacher_is_a_model_or_stored_numbers(scored):
    assert teacher_source(recipe(scored, mode="hard-labels")) is None
    assert teacher_source(recipe(scored, mode="hard-labels", teacher="t")) is None  # its tokenizer may serve a preset
    assert teacher_source(recipe(scored, mode="soft-logits", teacher="t")) == "model"
    stored = recipe(scored, mode="soft-logits")
    assert teacher_source(stored) == "signal"
    assert signal_folder(stored) == scored / "store" / "signal"
    assert teacher_source(recipe(scored, mode="features", teacher="t")) == "model"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mode": "soft-logits", "signal": "elsewhere"}, "name a model with --teacher, or store its numbers first"),
        ({"mode": "soft-logits", "signal": "elsewhere", "teacher": "t"}, "give one"),
        ({"mode": "hard-labels", "signal": "elsewhere"}, "--signal says nothing to hard-labels"),
        ({"mode": "features"}, "features needs a teacher that runs: name one with --teacher"),
        ({"loss": "soft_logits=1,features=1"}, "soft-logits, features needs a teacher that runs"),
        ({"loss": "soft_logits=1,features=1", "teacher": "t", "signal": "elsewhere"}, "without --signal"),
    ],
)
def test_a_missing_or_superfluous_teacher_is_refused(scored, values, said):
    with pytest.raises(UserError, match=said):
        teacher_source(recipe(scored, **values))


def test_settings_that_exclude_each_other_are_refused(scored):
    for values, said in (
        ({"mode": "on-policy", "teacher": "t", "packing": True}, "--packing and on-policy"),
        ({"mode": "hard-labels", "load_in_4bit": True}, "give --lora-r"),
    ):
        with pytest.raises(UserError, match=said):
            read_objective(recipe(scored, **values))


def test_a_pair_of_layers_is_no_number_of_seconds(tmp_path):
    config = recipe(tmp_path, mode="features", teacher="t", set=["features.layers=1:30"])
    assert loss_options(config) == {"features": {"layers": "1:30"}}


def test_options_come_from_flags_and_from_set_by_mode(tmp_path):
    config = recipe(
        tmp_path,
        loss="soft_logits=1,hard_labels=1",
        divergence="jsd",
        divergence_option=["weight=0.2"],
        temperature=2.0,
        set=["soft-logits.chunk_tokens=5", "trainer.adam_beta2=0.9", "hard_labels.chunk_tokens=7"],
    )
    assert loss_options(config) == {
        "soft_logits": {
            "divergence": "jsd",
            "divergence_options": {"weight": 0.2},
            "temperature": 2.0,
            "chunk_tokens": 5,
        },
        "hard_labels": {"chunk_tokens": 7},
    }


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mode": "hard-labels", "temperature": 2.0}, "--temperature says nothing to hard_labels"),
        ({"mode": "hard-labels", "divergence": "jsd"}, "--divergence says nothing to hard_labels"),
        ({"mode": "soft-logits", "divergence": "jsdd"}, "did you mean 'jsd'"),
        ({"mode": "soft-logits", "divergence_option": ["weight=0.2"]}, "takes no option 'weight'"),
        ({"mode": "soft-logits", "divergence_option": ["weight=a"]}, "--divergence-option takes name=number"),
        ({"mode": "soft-logits", "set": ["soft_logits.num_outcomes=3"]}, "'num_outcomes' is unknown here"),
        ({"mode": "soft-logits", "set": ["soft_logits.suport=dense"]}, "did you mean 'support'"),
        ({"mode": "soft-logits", "set": ["features.kind=mse"]}, "a section of trainer, soft_logits"),
        ({"mode": "soft-logits", "set": ["chunk_tokens=3"]}, "a section of trainer, soft_logits"),
        ({"mode": "soft-logits", "set": ["soft_logits.chunk_tokens"]}, "takes key=value"),
    ],
)
def test_options_that_nobody_takes_are_refused(tmp_path, values, said):
    with pytest.raises(UserError, match=said):
        loss_options(recipe(tmp_path, **values))
