"""FSDP2 and gloo: a student whose weights are spread over two processes takes the steps of one that is whole.

accelerate offers FSDP on GPUs alone, torch's `fully_shard` itself runs on CPUs: the child tells accelerate that its two
CPU processes are two GPU processes, and all else is what `accelerate launch` with recipes/accelerate/fsdp2.yaml does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from distill.config import TrainConfig
from distill.train import run_training

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "recipes" / "accelerate"

RANK = """
import json, pathlib, sys; sys.path.insert(0, "tests"); sys.path.insert(0, ".")
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from conftest import byte_tokenizer, tiny_model
from distill import train
from distill.config import TrainConfig

torch.set_num_threads(1)
arguments = train.training_arguments

def on_gpus(config):
    args = arguments(config)
    args.device  # makes the state
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args

train.training_arguments = on_gpus
recipe = json.loads(pathlib.Path(sys.argv[1]).read_text())
tied = recipe.pop("tied")
config = TrainConfig(**recipe)
student = tiny_model("llama", tie_word_embeddings=tied)
teacher = tiny_model("llama", seed=9, hidden_size=48, vocab_size=264)
train.run_training(config, model=student, tokenizer=byte_tokenizer(), teacher=teacher if config.teacher else None)
assert all(isinstance(weight, DTensor) for weight in student.parameters()), "nothing was sharded"
"""


@pytest.fixture
def data(write_jsonl) -> Path:
    thoughts = ["add", "add them, slowly", "sum"]
    return write_jsonl(
        "data.jsonl",
        [{"prompt": f"{i}+{i % 5}?", "completion": f"<think>{thoughts[i % 3]}</think>{i + i % 5}"} for i in range(12)],
    )


@pytest.mark.parametrize(
    ("learnt", "tied"),
    [
        ({"mode": "hard-labels"}, False),
        ({"mode": "soft-logits", "teacher": "t"}, True),
        ({"loss": "soft_logits=1,features=1,relations=0.5", "teacher": "t"}, False),
    ],
    ids=["hard-labels", "soft-logits-tied", "mixture"],
)
def test_a_sharded_student_takes_the_steps_of_a_whole_one(make_model, tokenizer, data, tmp_path, learnt, tied):
    settings = {
        "student": "tiny",
        "data": str(data),
        "learning_rate": 1e-3,
        "max_steps": 3,
        "save_steps": 2,
        "logging_steps": 1,
        "gradient_accumulation_steps": 2,
        **learnt,
    }
    sharded = {**settings, "out": str(tmp_path / "two"), "per_device_train_batch_size": 2, "tied": tied}
    (tmp_path / "recipe.json").write_text(json.dumps(sharded))
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(LAUNCH / "fsdp2.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [*command, str(tmp_path / "rank.py"), str(tmp_path / "recipe.json")], cwd=ROOT, env=environment, check=True
    )
    whole = TrainConfig(**settings, out=tmp_path / "one", per_device_train_batch_size=4)
    student = make_model("llama", tie_word_embeddings=tied)
    teacher = make_model("llama", seed=9, hidden_size=48, vocab_size=264) if whole.teacher else None
    run_training(whole, model=student, tokenizer=tokenizer, teacher=teacher)
    expected = student.state_dict()
    for key, value in load_file(tmp_path / "two" / "model.safetensors").items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-4)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for one, two in zip(*lines, strict=True):
        for name in one.keys() - {"top_k_overlap"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_launch_settings_are_those_accelerate_knows(path):
    from accelerate.commands.config.config_args import ClusterConfig

    settings = yaml.safe_load(path.read_text())
    config = ClusterConfig.from_yaml_file(str(path))
    assert settings["num_processes"] == config.num_processes > 1
    assert config.distributed_type == settings["distributed_type"]
