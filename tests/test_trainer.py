"""The trainer and `run_training`: how a step is split changes nothing, and nothing that goes wrong loses work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rewarding import rewarded

from distill.batch import collate
from distill.callbacks import keep_until
from distill.checkpoints import last_checkpoint
from distill.config import TrainConfig
from distill.errors import RunError, UserError
from distill.losses import LOSSES
from distill.objective import loss_options, loss_weights, needs
from distill.render import Example
from distill.run_folder import open_run
from distill.train import run_training
from distill.trainer import DistillTrainer
from distill.training_arguments import training_arguments

ROOT = Path(__file__).parent.parent
MODES = pytest.mark.parametrize("mode", [name.replace("_", "-") for name in LOSSES])
GRPO = {"num_generations": 4, "beta": 0.05, "num_iterations": 2, "steps_per_generation": 4, "ref_model_sync_steps": 5}


def rows(count: int = 24) -> list[dict]:
    thoughts = ["add", "add them, slowly", "sum"]
    return [
        {
            "messages": [
                {"role": "user", "content": f"{i}+{i % 5}?"},
                {"role": "assistant", "content": f"<think>\n{thoughts[i % 3]}\n</think>\n\n\\boxed{{{i + i % 5}}}"},
            ]
        }
        for i in range(count)
    ]


@pytest.fixture
def data(write_jsonl) -> Path:
    return write_jsonl("data.jsonl", rows())


@pytest.fixture
def recipe(data, tmp_path):
    """Build a recipe: small, and in a folder of its own."""

    def make(mode: str | None = "hard-labels", out: str = "run", **overrides) -> TrainConfig:
        settings = {"learning_rate": 3e-3, "max_steps": 6, "save_steps": 2, "logging_steps": 2, "max_length": 256}
        settings |= {"max_completion_length": 40, "num_generations": 4 if mode == "grpo" else None}
        weights = loss_weights(TrainConfig(student="", data="", out="", mode=mode, loss=overrides.get("loss")))
        teacher = "teacher" if needs(weights) & {"teacher", "teacher_logits"} else None
        values = {"student": "tiny", "data": data, "out": tmp_path / out, "teacher": teacher, **settings, **overrides}
        return TrainConfig(mode=mode, **values)

    return make


@pytest.fixture
def train(make_model, tokenizer):
    """Run a recipe on fresh tiny models; return (run.json's content, the trained student)."""

    def go(config: TrainConfig, student_family: str = "llama", **model_overrides):
        student = make_model(student_family, seed=config.seed, **model_overrides)
        teacher = make_model("llama", seed=9, hidden_size=48, vocab_size=264) if config.teacher else None
        asked = rewarded() if config.mode == "grpo" else None
        run = run_training(config, model=student, tokenizer=tokenizer, teacher=teacher, rewarded=asked)
        return run, student

    return go


def comparable(line: dict) -> dict:
    """A line of metrics without what is measured on a few rows of each forward pass."""
    return {name: value for name, value in line.items() if name != "top_k_overlap"}


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# -- a step is a step


@MODES
def test_splitting_a_step_into_micro_batches_changes_nothing(recipe, train, mode):
    trained = {}
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        config = recipe(
            mode,
            out=f"{size}x{accumulation}",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-3,
        )
        run, student = train(config)
        trained[size] = student.state_dict(), metrics(config.out), run["ledger"]["tokens"]
    for size in (2, 1):
        for key, value in trained[4][0].items():
            torch.testing.assert_close(trained[size][0][key], value, atol=1e-6, rtol=1e-4)
        for ours, whole in zip(trained[size][1], trained[4][1], strict=True):
            assert comparable(ours) == pytest.approx(comparable(whole), rel=1e-4, abs=1e-5)
        assert trained[size][2] == trained[4][2]


def test_the_logged_loss_and_gradient_are_per_trained_token_of_the_whole_step(make_model, tokenizer, tmp_path):
    """Four sequences with 1 to 30 trained tokens each: means of means would be far off."""
    rng = np.random.default_rng(0)
    lengths = [33, 4, 9, 20]
    examples = [
        Example(rng.integers(0, 256, n).astype(np.int32), np.array([0, 0, 0] + [1] * (n - 3), np.float32))
        for n in lengths
    ]
    model = make_model()
    reference = make_model()
    total = sum(
        reference(
            input_ids=(ids := torch.tensor(example.input_ids, dtype=torch.int64)[None]),
            labels=ids.masked_fill(torch.tensor(example.weights)[None] == 0, -100),
        ).loss
        * example.weights.sum()
        for example in examples
    )
    (total / sum(example.weights.sum() for example in examples)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
    config = TrainConfig(
        mode="hard-labels",
        student="tiny",
        data=tmp_path,
        out=tmp_path,
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    trainer = DistillTrainer(
        model,
        args=training_arguments(config),
        train_dataset=examples,
        collate=partial(collate, pad_id=0),
        processing_class=tokenizer,
        loss="hard_labels",
    )
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(total.item() / (sum(lengths) - 12), rel=1e-6)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert line["trained_tokens"] == sum(lengths) - 12


@pytest.mark.parametrize("mode", [name.replace("_", "-") for name in LOSSES if name != "grpo"])
def test_training_learns(recipe, train, mode):
    config = recipe(mode, max_steps=40, logging_steps=40, save_steps=1000, learning_rate=1e-2)
    before = recipe(mode, out="before", max_steps=1, logging_steps=1)
    train(before)
    run, _ = train(config)
    assert run["metrics"]["loss"] < 0.7 * metrics(before.out)[0]["loss"]


RANK = """
import json, pathlib, sys; sys.path.insert(0, "tests"); sys.path.insert(0, ".")
import torch
from conftest import byte_tokenizer, tiny_model
from distill.config import TrainConfig
from distill.train import run_training
torch.set_num_threads(1)
config = TrainConfig(**json.loads(pathlib.Path(sys.argv[1]).read_text()))
teacher = tiny_model("llama", seed=9, hidden_size=48, vocab_size=264)
asked = None
if config.mode == "grpo":
    from rewarding import rewarded
    asked, teacher = rewarded(), None
run_training(config, model=tiny_model("llama"), tokenizer=byte_tokenizer(), teacher=teacher, rewarded=asked)
"""


MIXED = "features=1,relations=0.5,hard_labels=0.1"


@pytest.mark.parametrize(
    "learnt",
    [
        {"mode": "soft-logits"},
        {"mode": None, "loss": MIXED},
        {"mode": "on-policy"},
        {"mode": "grpo", "scale_rewards": "batch", "beta": 0.1},
    ],
    ids=["soft-logits", "projectors", "on-policy", "grpo"],
)
def test_two_ranks_take_the_steps_of_one(recipe, train, tmp_path, learnt):
    settings = {"gradient_accumulation_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, **learnt}
    one, two = (recipe(out=f"ranks{4 // size}", per_device_train_batch_size=size, **settings) for size in (4, 2))
    (tmp_path / "recipe.json").write_text(two.model_dump_json())
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [*command, str(tmp_path / "rank.py"), str(tmp_path / "recipe.json")], cwd=ROOT, env=environment, check=True
    )
    run, student = train(one)
    from safetensors.torch import load_file

    for key, value in load_file(two.out / "model.safetensors").items():
        torch.testing.assert_close(value, student.state_dict()[key], atol=1e-6, rtol=1e-4)
    for ours, whole in zip(metrics(two.out), metrics(one.out), strict=True):
        assert comparable(ours) == pytest.approx(comparable(whole), rel=1e-4, abs=1e-6)
    assert json.loads((two.out / "run.json").read_text())["ledger"]["flops"] == run["ledger"]["flops"]


# -- what is left behind


@MODES
def test_the_folder_is_a_plain_model_and_says_what_it_cost(recipe, train, mode, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = recipe(mode)
    run, student = train(config, "qwen3", tie_word_embeddings=True)
    loaded = AutoModelForCausalLM.from_pretrained(config.out)
    assert type(loaded).__name__ == "Qwen3ForCausalLM"
    assert loaded.generation_config.eos_token_id in (258, [258])
    for key, value in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    reloaded = AutoTokenizer.from_pretrained(config.out)
    assert reloaded.chat_template == tokenizer.chat_template
    assert reloaded.get_vocab() == tokenizer.get_vocab()

    assert run == json.loads((config.out / "run.json").read_text())
    assert run["ledger"]["tokens"] > run["ledger"]["trained_tokens"] > 0
    assert run["ledger"]["seconds"] > 0
    if mode == "grpo":
        assert (run["questions"], run["reinforcement"]["rewards"]) == (24, {"upper": 1.0})
    else:
        assert 0.2 < run["trained_share"] < 1
    assert run["num_parameters"] == student.num_parameters()
    assert run["recipe"]["learning_rate"] == config.learning_rate
    lines = metrics(config.out)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["flops"] == run["ledger"]["flops"]
    assert {"loss", "learning_rate", "grad_norm", "tokens", "epoch"} <= lines[0].keys()
    assert [path.name for path in sorted((config.out / "checkpoints").iterdir())] == ["checkpoint-4", "checkpoint-6"]
    assert not list(config.out.glob(".*"))


def test_soft_logits_cost_the_teachers_forward_too(recipe, train):
    hard, _ = train(recipe("hard-labels", out="hard"))
    soft, _ = train(recipe("soft-logits", out="soft"))
    assert soft["ledger"]["tokens"] == hard["ledger"]["tokens"]
    assert 1.3 < soft["ledger"]["flops"] / hard["ledger"]["flops"] < 2.0  # a wider teacher, forward only


# -- stop and go on


def test_a_finished_run_is_left_alone_and_another_recipe_is_refused(recipe, train):
    config = recipe()
    run, _ = train(config)
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    again, _ = train(config)
    assert again == run
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == before
    with pytest.raises(UserError, match=r"learning_rate was 0\.003, now 0.1"):
        train(recipe(learning_rate=0.1))


def test_data_that_changed_is_another_recipe(recipe, train, data):
    train(recipe())
    with data.open("a") as stream:
        stream.write(json.dumps(rows(1)[0]) + "\n")
    with pytest.raises(UserError, match=r"data \(content\) was"):
        open_run(recipe())


def test_a_folder_that_is_something_else_is_refused(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty"):
        open_run(recipe())
    with pytest.raises(UserError, match="is a file"):
        open_run(recipe(out="data.jsonl"))


CHILD = """
import sys; sys.path.insert(0, "tests"); sys.path.insert(0, ".")
import json, torch
from conftest import byte_tokenizer, tiny_model
from distill.config import TrainConfig
from distill.train import run_training
torch.set_num_threads(1)
config = TrainConfig(**json.loads(sys.argv[1]))
teacher = tiny_model("llama", seed=9) if config.teacher else None
student = tiny_model("llama", seed=1, attention_dropout=0.1)  # the random state must be restored too
asked = None
if config.mode == "grpo":
    from rewarding import rewarded
    asked = rewarded()
run_training(config, model=student, tokenizer=byte_tokenizer(), teacher=teacher, rewarded=asked)
"""


def start(config: TrainConfig, code: str = CHILD) -> subprocess.Popen:
    command = [sys.executable, "-c", code, config.model_dump_json()]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "learnt",
    [
        {"mode": "soft-logits"},
        {"mode": None, "loss": MIXED},
        {"mode": "on-policy", "student_share": 0.6},
        {"mode": "grpo", **GRPO},
    ],
    ids=["soft-logits", "projectors", "on-policy", "grpo"],
)
def test_a_killed_run_resumes_to_the_same_bytes(recipe, learnt):
    settings = {"max_steps": 30, "save_steps": 7, "logging_steps": 4, "per_device_train_batch_size": 2}
    settings |= {"gradient_accumulation_steps": 2, "warmup_steps": 3, **learnt}
    whole, killed = (recipe(out=name, **settings) for name in ("whole", "killed"))
    uninterrupted, victim = start(whole), start(killed)
    deadline = time.monotonic() + 120
    while last_checkpoint(killed.out / "checkpoints") is None and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert uninterrupted.communicate()[1] is not None
    assert uninterrupted.returncode == 0
    assert not (killed.out / "run.json").exists(), "the run ended before it could be killed"

    with pytest.raises(UserError, match=r"unfinished run at checkpoint-.*--resume"):
        open_run(killed)
    resumed = start(killed.model_copy(update={"resume": True}))
    said = resumed.communicate()[1]
    assert resumed.returncode == 0, said
    further = {"features": ["beside/projectors.safetensors"], "grpo": ["rollouts.jsonl"]}
    beside = [name for mode, names in further.items() for name in names if mode in str(learnt)]
    for name in ("metrics.jsonl", "model.safetensors", *beside):
        assert (killed.out / name).read_bytes() == (whole.out / name).read_bytes(), name
    ledgers = [json.loads((out / "run.json").read_text())["ledger"] for out in (whole.out, killed.out)]
    assert ledgers[0]["tokens"] == ledgers[1]["tokens"]
    assert ledgers[0]["flops"] == ledgers[1]["flops"]


@pytest.mark.parametrize("max_steps", [4, 6])  # in mid-epoch, and at the end of one
def test_a_run_that_only_missed_its_last_save_takes_no_further_step(recipe, train, max_steps):
    config = recipe(max_steps=max_steps, save_steps=100, per_device_train_batch_size=4)
    run, student = train(config)
    lines = metrics(config.out)
    (config.out / "run.json").unlink()
    (config.out / "model.safetensors").unlink()
    again, resumed = train(config.model_copy(update={"resume": True}))
    assert again["steps"] == run["steps"] == max_steps
    assert metrics(config.out) == lines
    for key, value in student.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)
    assert again["metrics"] == run["metrics"]


def test_lines_after_the_checkpoint_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"step"')
    keep_until(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


# -- runs that fail


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_last_checkpoint(recipe, train):
    config = recipe(learning_rate=1e30, max_grad_norm=1e30, save_steps=1, warmup_steps=4, max_steps=20)
    with pytest.raises(
        RunError, match=r"not finite .* at step (\d+); the last checkpoint is .*checkpoint-\d+$"
    ) as error:
        train(config, "gemma2", final_logit_softcapping=None)
    step = int(str(error.value).split("at step ")[1].split(";")[0])
    kept = last_checkpoint(config.out / "checkpoints")
    assert kept.name == f"checkpoint-{step - 1}"
    from safetensors.torch import load_file

    assert all(value.isfinite().all() for value in load_file(kept / "model.safetensors").values())
    assert not (config.out / "run.json").exists()


def test_nan_weights_are_named_before_anything_is_written(recipe, make_model, tokenizer):
    config = recipe()
    student = make_model()
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match="at step 1; no checkpoint had been written"):
        run_training(config, model=student, tokenizer=tokenizer)


LIMITED = """
import resource
from transformers import TrainerCallback
from distill import train
class SmallDisk(train.Progress):
    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
train.Progress = SmallDisk
"""


def test_a_disk_that_refuses_a_checkpoint_leaves_the_earlier_ones_whole(recipe, train):
    """From the sixth step on the operating system refuses files above 20 kB: the third checkpoint cannot be written."""
    config = recipe(max_steps=8, save_steps=2, logging_steps=1)
    child = start(config, CHILD.replace("config = ", LIMITED + "config = ", 1))
    said = child.communicate()[1].strip().splitlines()[-1]
    assert child.returncode != 0
    assert "RunError: cannot write" in said
    assert "checkpoint-6" in said
    assert said.endswith("checkpoint-4")
    assert [path.name for path in sorted((config.out / "checkpoints").iterdir())] == ["checkpoint-2", "checkpoint-4"]
    run, _ = train(config.model_copy(update={"resume": True}))
    assert run["steps"] == 8
    assert [line["step"] for line in metrics(config.out)] == list(range(1, 9))


# -- settings and data


def test_unknown_names_are_answered_with_the_nearest(recipe, train):
    with pytest.raises(UserError, match=r"unknown mode 'soft-logit'.*did you mean 'soft-logits'"):
        train(recipe("soft-logit"))
    with pytest.raises(UserError, match=r"unknown lr_scheduler_type 'cosin'.*did you mean 'cosine'"):
        train(recipe(lr_scheduler_type="cosin"))
    with pytest.raises(UserError, match=r"unknown divergence 'forward-kl'.*did you mean 'forward_kl'"):
        train(recipe("soft-logits", divergence="forward-kl"))
    assert not recipe().out.exists()  # a mistake does not take the folder


def test_soft_logits_without_a_teacher_or_with_another_vocabulary_is_refused(
    recipe, make_model, make_tokenizer, tokenizer
):
    config = recipe("soft-logits")
    with pytest.raises(UserError, match="--teacher"):
        run_training(config, model=make_model(), tokenizer=tokenizer)
    with pytest.raises(UserError, match="the teacher has 200 output embeddings for a tokenizer of 259"):
        run_training(
            config,
            model=make_model(),
            tokenizer=tokenizer,
            teacher=make_model(vocab_size=200, pad_token_id=0, eos_token_id=1),
        )
    assert not config.out.exists()


def test_a_length_beyond_the_models_positions_is_refused(recipe, train):
    with pytest.raises(UserError, match="--max-length 1000 is above the 512 positions"):
        train(recipe(max_length=1000))


def test_bf16_and_gradient_checkpointing_train(recipe, train):
    run, _ = train(recipe("soft-logits", bf16=True, gradient_checkpointing=True, out="bf16"))
    plain, _ = train(recipe("soft-logits", out="fp32"))
    assert run["metrics"]["loss"] == pytest.approx(plain["metrics"]["loss"], rel=0.05)


def test_every_recipe_field_that_shapes_training_reaches_transformers(recipe):
    config = recipe(weight_decay=0.1, gradient_accumulation_steps=3, warmup_steps=0.5, seed=7, max_grad_norm=2.0)
    args = training_arguments(config)
    shared = config.model_dump().keys() & args.to_dict().keys() - {"max_steps", "report_to"}
    assert len(shared) > 10
    for key in shared:
        assert getattr(args, key) == getattr(config, key), key
    assert os.fspath(config.out / "checkpoints") == args.output_dir


def test_set_reaches_transformers_own_settings_and_nothing_else(recipe):
    arguments = training_arguments(recipe(set=["trainer.adam_beta2=0.95", "trainer.neftune_noise_alpha=null"]))
    assert arguments.adam_beta2 == 0.95
    for pair, message in {
        "adam_beta2=0.95": r"--set takes SECTION\.NAME=VALUE with a section of trainer, hard_labels",
        "features.layers=all": r"--set takes SECTION\.NAME=VALUE with a section of trainer, hard_labels",
        "hard_labels.chunk=3": "did you mean 'chunk_tokens'",
        "trainer.adam_beta2": r"--set takes SECTION\.NAME=VALUE",
        "trainer.adam_betta2=0.95": "did you mean 'adam_beta2'",
        "trainer.learning_rate=1": "learning_rate is set by distill train itself",
        "trainer.adam_beta2=fast": "adam_beta2 takes a float",
        "trainer.label_smoothing_factor=0.1": "would change nothing here",
        "trainer.eval_steps=5": "would change nothing here",
    }.items():
        read = training_arguments if pair.startswith("trainer.") else loss_options
        with pytest.raises(UserError, match=message):
            read(recipe(set=[pair]))
