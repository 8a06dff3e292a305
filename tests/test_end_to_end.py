"""The whole road through the command line on the embedded teacher, and its products in other people's tools."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from cli import app
from teachers import nano

QUESTIONS = 12
EVALUATION = f"eval --prompts nano --limit {QUESTIONS} --temperature 0 --max-completion-length 64"
TRAINING = "--data {w}/traces --max-steps 40 --per-device-train-batch-size 8 --learning-rate 5e-3 --logging-steps 1"
ROAD = f"""
generate --prompts nano --limit 48 --max-completion-length 64 --out {{w}}/traces
train --mode hard-labels --student llama-nano {TRAINING} --out {{w}}/students/preset
train --mode soft-logits --teacher nano --student prune:nano?layers=1 {TRAINING} --out {{w}}/students/pruned
{EVALUATION} --model nano --arm teacher --out {{w}}/evals/teacher
{EVALUATION} --model {{w}}/students/preset --arm preset --train-seed 0 --out {{w}}/evals/preset
{EVALUATION} --model {{w}}/students/pruned --arm pruned --train-seed 0 --out {{w}}/evals/pruned
compare {{w}}/evals/teacher {{w}}/evals/preset {{w}}/evals/pruned --store {{w}}/traces --out {{w}}
"""


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the whole road was walked: traces, students, evaluations, comparison."""
    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("road")
    for line in ROAD.strip().splitlines():
        with pytest.raises(SystemExit) as stop:
            app(line.format(w=folder).split())
        assert not stop.value.code, line
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def greedy(folder: Path, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Return the prompt's ids and plain transformers' greedy continuation, its end token included."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    mask = torch.ones(1, len(ids), dtype=torch.long)
    output = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=mask,
        do_sample=False,
        temperature=None,
        top_p=None,
        max_new_tokens=64,
    )
    return ids, output[0, len(ids) :].tolist()


def test_the_teacher_and_its_traces_are_right(road: Path) -> None:
    funnel = json.loads((road / "traces" / "funnel.json").read_text())
    assert funnel["kept"] >= 46
    assert json.loads((road / "evals" / "teacher" / "eval.json").read_text())["pass@1"] >= 0.9


def test_an_evaluation_says_what_it_promises(road: Path) -> None:
    """The keys of the contract, counted here anew from samples.jsonl."""
    for arm in ("teacher", "preset", "pruned"):
        result = json.loads((road / "evals" / arm / "eval.json").read_text())
        samples = rows(road / "evals" / arm / "samples.jsonl")
        assert (result["questions"], result["samples_per_question"], len(samples)) == (QUESTIONS, 1, QUESTIONS)
        right = sum(row["verdicts"][-1]["score"] == 1.0 for row in samples)
        assert result["pass@1"] == pytest.approx(right / QUESTIONS)
        assert result["ci95"][0] <= result["pass@1"] <= result["ci95"][1]
        assert result["truncated"] == pytest.approx(
            sum(row["finish_reason"] == "length" for row in samples) / QUESTIONS
        )
        tokens = sum(row["num_completion_tokens"] for row in samples)
        assert result["mean_completion_tokens"] == pytest.approx(tokens / QUESTIONS)
        assert {"maj@k", "pass@k", "stderr", "no_answer", "sampling", "model"} <= set(result)


def test_held_out_questions_were_not_trained_on(road: Path) -> None:
    trained = {row["prompt_uid"] for row in rows(road / "traces" / "traces.jsonl")}
    asked = {row["prompt_uid"] for row in rows(road / "evals" / "preset" / "samples.jsonl")}
    assert len(asked) == QUESTIONS
    assert not trained & asked


def test_the_comparison_covers_every_arm_and_stands_alone(road: Path) -> None:
    result = json.loads((road / "compare.json").read_text())
    assert {"teacher", "preset", "pruned"} <= set(re.findall(r"\w+", json.dumps(result["arms"])))
    assert result["verdict"]
    page = (road / "report.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    for arm in ("teacher", "preset", "pruned"):
        assert arm in page


@pytest.mark.parametrize("student", ["preset", "pruned"])
def test_a_trained_folder_loads_in_plain_transformers(road: Path, student: str) -> None:
    """And answers there, greedily, as it did in `distill eval`."""
    folder = road / "students" / student
    for row in rows(road / "evals" / student / "samples.jsonl")[:4]:
        ids, new = greedy(folder, row["messages"])
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert row["completion"] == tokenizer.decode(new, skip_special_tokens=True)
        assert (row["num_prompt_tokens"], row["num_completion_tokens"]) == (len(ids), len(new))
    run = json.loads((folder / "run.json").read_text())
    assert run["steps"] == 40
    assert {"flops", "seconds", "tokens"} <= set(run["ledger"])
    assert not list(folder.glob("*.bin"))


def test_training_moved_the_students_towards_the_teacher(road: Path) -> None:
    """The loss falls; the pruned student's distribution comes nearer to the teacher's than the cut left it."""
    for student in ("preset", "pruned"):
        losses = [row["loss"] for row in rows(road / "students" / student / "metrics.jsonl")]
        assert len(losses) == 40
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    folder = road / "students" / "pruned"
    teacher = AutoModelForCausalLM.from_pretrained(nano.model_path())
    trained = AutoModelForCausalLM.from_pretrained(folder)
    assert trained.config.num_hidden_layers == 1
    cut = AutoModelForCausalLM.from_pretrained(nano.model_path(), num_hidden_layers=1, layer_types=["full_attention"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = rows(road / "traces" / "kept.jsonl")[0]["messages"]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    answered = slice(len(asked) - 1, -2)  # what predicts the answer and its end token; a newline stands behind it
    assert ids[0, answered][-1] == tokenizer("}", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        target, after, before = (model(ids).logits[:, answered].log_softmax(-1) for model in (teacher, trained, cut))
    kl = [float((target.exp() * (target - other)).sum(-1).mean()) for other in (after, before)]
    assert kl[0] < 0.7 * kl[1]


def test_kept_traces_train_under_plain_trl(road: Path, tmp_path: Path) -> None:
    """`kept.jsonl` as it is, loaded by `datasets`, in TRL's own SFTTrainer; the reasoning is in what it trains on."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    kept = road / "traces" / "kept.jsonl"
    dataset = load_dataset("json", data_files=str(kept), split="train", cache_dir=str(tmp_path / "cache"))
    settings = SFTConfig(output_dir=str(tmp_path / "sft"), max_steps=2, report_to="none", use_cpu=True, bf16=False)
    trainer = SFTTrainer(model=str(nano.model_path()), train_dataset=dataset, args=settings)
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    answer = rows(kept)[0]["messages"][-1]["content"]
    assert answer.startswith("<think>")
    assert answer in text
    assert trainer.train().global_step == 2


@pytest.fixture(scope="module")
def vllm_student(road: Path) -> Iterator[Any]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM

    engine = LLM(str(road / "students" / "preset"), dtype="float32", enforce_eager=True, max_num_seqs=8)
    yield engine
    engine.llm_engine.engine_core.shutdown()


@pytest.mark.vllm
def test_a_trained_folder_loads_in_vllm(road: Path, vllm_student: Any) -> None:
    """vllm.LLM takes the folder as it is; its greedy tokens are those of transformers."""
    from vllm import SamplingParams

    asked = [row["messages"] for row in rows(road / "evals" / "preset" / "samples.jsonl")[:8]]
    answers = vllm_student.chat(asked, SamplingParams(temperature=0, max_tokens=64), use_tqdm=False)
    for messages, answer in zip(asked, answers, strict=True):
        ids, new = greedy(road / "students" / "preset", messages)
        assert list(answer.prompt_token_ids) == ids
        assert list(answer.outputs[0].token_ids) == new
