"""The command line as people meet it: help, mistakes in one line, and nothing lost by a mistake or by Ctrl-C."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli import app

ROOT = Path(__file__).parent.parent
CLI = [sys.executable, str(ROOT / "cli.py")]
COMMANDS = ("demo", "generate", "filter", "train", "eval", "compare", "align", "fetch-model")
HEAVY = ("torch", "transformers", "vllm", "datasets", "numpy", "pydantic_core._missing")
QUESTION = "Ana has 15 books. Mon buys 8. Total?"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def distill(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process; return its exit code, stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            app([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def one_line(err: str) -> str:
    """Return the one `error: ` line, which must be the last of stderr; progress lines may stand before it."""
    assert "Traceback" not in err
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1].removeprefix("error: ")


# Help


@pytest.mark.parametrize("arguments", [[], ["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["distill", *{arguments!r}]
import cli
try:
    cli.app()
except SystemExit as stop:
    assert not stop.code, stop.code
print(sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert "Usage: " in done.stdout
    if len(arguments) < 2:
        assert all(name in done.stdout for name in COMMANDS)


def test_help_answers_at_once() -> None:
    """Under half a second of processor time (the wall clock also counts what shares the machine): the best of three."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*CLI, "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


# Mistakes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Any, make_model: Any) -> Path:
    """A folder with good and bad inputs of every kind."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("world")
    row = json.dumps({"question": QUESTION, "answer": "23"})
    files = {
        "problems.jsonl": f"{row}\n",
        "empty.jsonl": "",
        "blank.jsonl": "\n\n",
        "malformed.jsonl": f'{row}\n{{"question": \n',
        "no_question.jsonl": f'{row}\n{{"qestion": "2+2?", "answer": "4"}}\n',
        "no_gold.jsonl": f'{row}\n\n{{"question": "2+2?"}}\n',
        "problems.txt": row,
        "file": "a file where a folder should be",
        "unknown_key.yaml": "prompts: nano\nteachr: nano\n",
        "not.yaml": "prompts: [nano\n",
        "list.yaml": "- prompts\n",
        "bad_rows.jsonl": '{"messages": [{"role": "user", "content": "2+2?"}]}\n',
        "text.jsonl": json.dumps(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        ),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    make_model().save_pretrained(folder / "no_tokenizer")
    make_model().save_pretrained(folder / "bytes")
    make_tokenizer().save_pretrained(folder / "bytes")
    make_tokenizer(None).save_pretrained(folder / "no_template")
    make_model().save_pretrained(folder / "no_template")
    for line in (
        "generate --prompts nano --limit 4 --out {w}/store",
        "eval --model nano --prompts nano --limit 2 --temperature 0 --out {w}/eval",
        "train --mode hard-labels --student llama-nano --data {w}/store --max-steps 1 --out {w}/run",
    ):
        with pytest.raises(SystemExit) as stop:
            app([word.format(w=folder) for word in line.split()])
        assert stop.value.code == 0
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file that a command must not change by failing."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


GENERATE = "generate --out {o} "
TRAIN = "train --student llama-nano --data {w}/store --out {o} "
# The command line, and what its one line must say. {w}: the world, {o}: a folder that does not exist.
MISTAKES: dict[str, tuple[str, list[str]]] = {
    "command": ("generat", ["generat", "generate"]),
    "flag": (GENERATE + "--promts nano", ["--promts", "--prompts"]),
    "flag without value": (GENERATE + "--prompts", ["--prompts", "argument"]),
    "extra word": (GENERATE + "--prompts nano more", ["more"]),
    "no prompts": (GENERATE, ["--prompts is required"]),
    "no out": ("generate --prompts nano", ["--out is required"]),
    "not a number": (GENERATE + "--prompts nano -n two", ["-n", "integer", "two"]),
    "number too small": (GENERATE + "--prompts nano --limit 0", ["--limit", "greater", "0"]),
    "negative temperature": (GENERATE + "--prompts nano --temperature -1", ["--temperature", "-1"]),
    "top-p above one": (GENERATE + "--prompts nano --top-p 1.5", ["--top-p", "1.5"]),
    "not a choice": (GENERATE + "--prompts nano --reasoning yes", ["--reasoning", "'auto'", "yes"]),
    "missing prompts": (
        GENERATE + "--teacher nano --prompts {w}/problem.jsonl",
        ["problem.jsonl", "mean 'problems.jsonl'"],
    ),
    "folder as prompts": (GENERATE + "--teacher nano --prompts {w}", ["is a folder"]),
    "kind of prompts": (GENERATE + "--teacher nano --prompts {w}/problems.txt", ["problems.txt", ".jsonl"]),
    "empty prompts": (GENERATE + "--teacher nano --prompts {w}/empty.jsonl", ["empty.jsonl", "empty"]),
    "blank prompts": (GENERATE + "--teacher nano --prompts {w}/blank.jsonl", ["blank.jsonl", "empty"]),
    "malformed line": (GENERATE + "--teacher nano --prompts {w}/malformed.jsonl", ["malformed.jsonl:2", "JSON"]),
    "no question": (
        GENERATE + "--teacher nano --prompts {w}/no_question.jsonl",
        ["no_question.jsonl:2", "no question", "mean 'question'", "--skip-bad-rows"],
    ),
    "no gold": (GENERATE + "--teacher nano --prompts {w}/no_gold.jsonl", ["no_gold.jsonl:3", "no gold", "--keep any"]),
    "nano level": (GENERATE + "--prompts nano:9", ["9", "level"]),
    "file without teacher": (GENERATE + "--prompts {w}/problems.jsonl", ["--teacher"]),
    "backend": (GENERATE + "--prompts nano --backend transformer", ["'transformer'", "mean 'transformers'"]),
    "engine argument": (GENERATE + "--prompts nano --engine-arg dtpe=float32", ["dtpe", "mean 'dtype'"]),
    "verifier": (GENERATE + "--prompts nano --verifier maths", ["'maths'", "mean 'math'"]),
    "verifier module": (GENERATE + "--prompts nano --verifier no_such_module:judge", ["no_such_module"]),
    "filter": (GENERATE + "--prompts nano --drop truncatd", ["'truncatd'", "mean 'truncated'"]),
    "keep": (GENERATE + "--prompts nano --keep corect", ["'corect'", "mean 'correct'"]),
    "teacher": (GENERATE + "--prompts nano --teacher {w}/byte", ["byte", "mean 'bytes'"]),
    "teacher is a file": (GENERATE + "--prompts nano --teacher {w}/file", ["is a file"]),
    "hub id offline": (GENERATE + "--prompts nano --teacher no-one/no-model", ["no-one/no-model", "hub"]),
    "no tokenizer": (GENERATE + "--prompts nano --teacher {w}/no_tokenizer", ["no tokenizer", "no_tokenizer"]),
    "no template": (GENERATE + "--prompts nano --teacher {w}/no_template", ["chat template"]),
    "out is a file": ("generate --prompts nano --out {w}/file", ["file", "output folder"]),
    "out under a file": ("generate --prompts nano --out {w}/file/out", ["file/out"]),
    "store of another recipe": (
        "generate --prompts nano --temperature 1 --limit 4 --out {w}/store",
        ["store", "another recipe", "temperature", "--out"],
    ),
    "recipe file": (GENERATE + "--config {w}/unknown_key.yaml", ["unknown_key.yaml", "'teachr'", "mean 'teacher'"]),
    "recipe not YAML": (GENERATE + "--config {w}/not.yaml", ["not.yaml", "not YAML"]),
    "recipe not a mapping": (GENERATE + "--config {w}/list.yaml", ["list.yaml", "mapping"]),
    "recipe missing": (GENERATE + "--config {w}/none.yaml", ["none.yaml"]),
    "filter without a store": ("filter", ["STORE"]),
    "filter of no store": ("filter {w}/run", ["run", "not a trace store"]),
    "filter of nothing": ("filter {w}/nothing", ["nothing", "not a trace store"]),
    "filter rule": ("filter {w}/store --drop duplicat", ["mean 'duplicate'"]),
    "filter verifier": ("filter {w}/store --verifier meth", ["mean 'math'"]),
    "filter into an evaluation": ("filter {w}/store --out {w}/eval", ["in use"]),
    "filter into a run": ("filter {w}/store --verifier math --out {w}/run", ["in use"]),
    "filter by no verifier": ("filter {w}/store --verifier none", ["--verifier none", "leave it out"]),
    "filter into a file": ("filter {w}/store --out {w}/file", ["file"]),
    "mode": (TRAIN + "--mode hard-label", ["'hard-label'", "mean 'hard-labels'"]),
    "preset": (
        "train --mode hard-labels --student lama-nano --data {w}/store --out {o}",
        ["lama-nano", "mean 'llama-nano'"],
    ),
    "preset override": (
        "train --mode hard-labels --student llama-nano:hiden_size=64 --data {w}/store --out {o}",
        ["hiden_size", "mean 'hidden_size'"],
    ),
    "soft-logits without teacher": (TRAIN + "--mode soft-logits", ["soft-logits", "--teacher"]),
    "neither mode nor loss": (TRAIN, ["--mode", "--loss", "neither"]),
    "loss without weight": (TRAIN + "--loss soft_logits", ["--loss", "key=value"]),
    "features without teacher": (TRAIN + "--mode features", ["features", "--teacher"]),
    "features over a missing layer": (
        TRAIN + "--mode features --teacher nano --set features.layers=1:9",
        ["9", "2 blocks"],
    ),
    "an option of another mode": (TRAIN + "--mode hard-labels --set features.layers=all", ["--set", "hard_labels"]),
    "an unknown option": (TRAIN + "--mode relations --teacher nano --set relations.knd=cka", ["mean 'kind'"]),
    "an unknown relation": (TRAIN + "--mode relations --teacher nano --set relations.kind=ckb", ["mean 'cka'"]),
    "a flag without effect": (TRAIN + "--mode hard-labels --temperature 2", ["--temperature", "hard_labels"]),
    "numbers that are not there": (TRAIN + "--mode soft-logits --signal {w}/eval", ["--teacher", "distill score"]),
    "on-policy in packed rows": (TRAIN + "--mode on-policy --teacher nano --packing", ["--packing", "on-policy"]),
    "adapters on nothing": (TRAIN + "--mode hard-labels --lora-r 4 --lora-target-modules q_prj", ["mean 'q_proj'"]),
    "4 bits without adapters": (TRAIN + "--mode hard-labels --load-in-4bit", ["--load-in-4bit"]),
    "an unknown reporter": (TRAIN + "--mode hard-labels --report-to tensorbord", ["mean 'tensorboard'"]),
    "other vocabulary": (
        TRAIN + "--mode soft-logits --teacher {w}/bytes --tokenizer nano --align identity",
        ["--mode hard-labels"],
    ),
    "align": (TRAIN + "--mode soft-logits --teacher nano --align identty", ["identty", "mean 'identity'"]),
    "divergence": (TRAIN + "--mode soft-logits --teacher nano --divergence forward_lk", ["mean 'forward_kl'"]),
    "schedule": (TRAIN + "--mode hard-labels --lr-scheduler-type cosin", ["mean 'cosine'"]),
    "data": ("train --mode hard-labels --student llama-nano --data {w}/stor --out {o}", ["stor", "--data"]),
    "data without a student's turn": (
        "train --mode hard-labels --student nano --data {w}/bad_rows.jsonl --out {o}",
        ["bad_rows.jsonl line 1", "assistant"],
    ),
    "preset without tokenizer": (
        "train --mode hard-labels --student llama-nano --data {w}/text.jsonl --out {o}",
        ["llama-nano", "--tokenizer"],
    ),
    "student without tokenizer": (
        "train --mode hard-labels --student {w}/no_tokenizer --data {w}/store --out {o}",
        ["no tokenizer"],
    ),
    "overlong": (TRAIN + "--mode hard-labels --max-length 8", ["longer than 8", "--max-length"]),
    "prune nothing": (
        "train --mode hard-labels --student prune:nano?layers=9 --data {w}/store --out {o}",
        ["9", "layers"],
    ),
    "train into a store": ("train --mode hard-labels --student llama-nano --data {w}/store --out {w}/store", ["store"]),
    "run of another recipe": (
        "train --mode hard-labels --student llama-nano --data {w}/store --max-steps 2 --out {w}/run",
        ["another recipe", "max_steps was 1, now 2"],
    ),
    "evaluation of another recipe": (
        "eval --model nano --prompts nano --limit 3 --temperature 0 --out {w}/eval",
        ["another recipe", "limit"],
    ),
    "evaluation without gold": (
        "eval --model nano --prompts {w}/no_gold.jsonl --out {o}",
        ["no_gold.jsonl:3", "no gold"],
    ),
    "evaluation without verifier": ("eval --model nano --prompts nano --verifier none --out {o}", ["--verifier"]),
    "evaluation of a missing text": (
        "eval --model nano --prompts nano --limit 1 --text {w}/x.jsonl --out {o}",
        ["x.jsonl"],
    ),
    "compare one": ("compare {w}/eval --out {o}", ["two"]),
    "compare no evaluation": ("compare {w}/eval {w}/store --out {o}", ["store", "eval.json"]),
    "fetch": ("fetch-model no-one/no-model --out {o}", ["no-one/no-model"]),
    "demo budget": ("demo --budget 1", ["--budget", "30"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_loses_nothing(name: str, world: Path, tmp_path: Path, distill: Run) -> None:
    line, wanted = MISTAKES[name]
    before = contents(world)
    code, out, err = distill(*(word.format(w=world, o=tmp_path / "out") for word in line.split()))
    said = one_line(err)
    assert code == 2, said
    assert out == ""
    assert [piece for piece in wanted if piece not in said] == [], said
    assert contents(world) == before


def test_debug_adds_the_traceback(world: Path, distill: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_DEBUG", "1")
    code, _, err = distill("filter", world / "run")
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_unreadable_golds_are_set_aside_and_reported(
    write_jsonl: Callable[..., Path], tmp_path: Path, distill: Run
) -> None:
    """Generating goes on without them and says so; an evaluation, whose number they would change, refuses."""
    rows = [
        {"question": QUESTION, "answer": "23"},
        {"question": "Ben has 4 pens. Tue buys 5. Total?", "answer": "\\frac{"},
    ]
    prompts = write_jsonl("rows.jsonl", rows)
    code, out, err = distill("generate", "--prompts", prompts, "--teacher", "nano", "--out", tmp_path / "s", "--json")
    assert code == 0
    assert "set aside rows.jsonl:2" in err
    assert json.loads(out)["samples"] == 1
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert [row["source"] for row in manifest["set_aside"]] == ["rows.jsonl:2"]
    code, out, err = distill("eval", "--prompts", prompts, "--model", "nano", "--out", tmp_path / "e")
    assert (code, out) == (2, "")
    assert "rows.jsonl:2" in one_line(err)


def test_bad_rows_are_skipped_only_when_asked(world: Path, tmp_path: Path, distill: Run) -> None:
    line = ["generate", "--teacher", "nano", "--skip-bad-rows", "--out", tmp_path / "s", "--json"]
    code, out, err = distill(*line, "--prompts", world / "malformed.jsonl")
    assert code == 0
    assert "skipped malformed.jsonl:2" in err
    assert json.loads(out)["samples"] == 1


def test_filtering_again_keeps_every_trace(world: Path, tmp_path: Path, distill: Run) -> None:
    """Judged anew, in place or into a folder that may be written again: no sample is lost, nor its old verdict."""
    store = tmp_path / "store"
    shutil.copytree(world / "store", store)
    uids = sorted(row["uid"] for row in lines_of(store / "traces.jsonl"))
    for verifier, verdicts in (("math", 2), ("auto", 3)):
        code, _, err = distill("filter", store, "--verifier", verifier)
        assert code == 0, err
        rows = lines_of(store / "traces.jsonl")
        assert sorted(row["uid"] for row in rows) == uids
        assert {len(row["verdicts"]) for row in rows} == {verdicts}
    before = contents(store)
    for keep in ("any", "correct"):
        code, out, err = distill("filter", store, "--keep", keep, "--out", tmp_path / "views", "--json")
        assert code == 0, err
        assert json.loads(out)["samples"] == len(uids)
    assert contents(store) == before


def test_nothing_survived_is_a_failed_run(write_jsonl: Callable[..., Path], tmp_path: Path, distill: Run) -> None:
    prompts = write_jsonl("rows.jsonl", [{"question": QUESTION, "answer": "7"}])
    code, _, err = distill("generate", "--prompts", prompts, "--teacher", "nano", "--out", tmp_path / "s")
    assert code == 1
    assert "1 wrong" in one_line(err)
    assert len((tmp_path / "s" / "rejected.jsonl").read_text().splitlines()) == 1


def test_a_loss_that_is_not_finite_stops_the_run(world: Path, tmp_path: Path, distill: Run) -> None:
    out = tmp_path / "run"
    line = "train --mode hard-labels --student llama-nano --learning-rate 1e30 --max-steps 20 --save-steps 1"
    code, _, err = distill(*line.split(), "--data", world / "store", "--out", out)
    said = one_line(err)
    assert code == 1
    assert "not finite" in said
    assert "step " in said
    kept = sorted((out / "checkpoints").glob("checkpoint-*"))
    assert kept
    assert any(str(path) in said for path in kept)
    assert not (out / "run.json").exists()


def test_json_puts_one_object_on_stdout(world: Path, tmp_path: Path, distill: Run) -> None:
    """Every command that prints a result, a finished run met again included."""
    lines = [
        f"generate --prompts nano --limit 4 --out {world}/store",
        f"filter {world}/store --out {tmp_path}/filtered",
        f"train --mode hard-labels --student llama-nano --data {world}/store --max-steps 1 --out {world}/run",
        f"train --mode hard-labels --student llama-nano --data {world}/store --max-steps 1 --out {tmp_path}/run",
        f"eval --model nano --prompts nano --limit 2 --temperature 0 --out {world}/eval",
        f"eval --model {world}/run --prompts nano --limit 2 --temperature 0 --out {tmp_path}/eval",
        f"compare {world}/eval {tmp_path}/eval --out {tmp_path}/compared",
    ]
    for line in lines:
        code, out, err = distill(*line.split(), "--json")
        assert code == 0, err
        assert isinstance(json.loads(out), dict)
        code, out, _ = distill(*line.split())
        assert code == 0
        assert out.strip()


# Ctrl-C


def interrupt_when(
    arguments: list[str], ready: Callable[[], bool], stop: signal.Signals = signal.SIGINT
) -> tuple[int, str]:
    """Run a command in its own process group, press Ctrl-C there once `ready`; return exit code and stderr."""
    process = subprocess.Popen(
        [*CLI, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while not ready():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        os.killpg(process.pid, stop)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, err


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
def test_ctrl_c_while_generating(tmp_path: Path, distill: Run, stop: signal.Signals) -> None:
    """130, one line, views of what is there; the same command goes on (concurrency is no part of a recipe).

    A scheduler's SIGTERM is a Ctrl-C.
    """
    store = tmp_path / "store"
    line = ["generate", "--prompts", "nano", "--limit", "300", "--out", str(store)]
    code, err = interrupt_when([*line, "--concurrency", "2"], lambda: count(store / "traces.jsonl") >= 8, stop)
    assert code == 130
    assert "interrupted" in one_line(err)
    done = count(store / "traces.jsonl")
    assert 8 <= done < 300
    assert count(store / "kept.jsonl") + count(store / "rejected.jsonl") == done
    assert json.loads((store / "funnel.json").read_text())["samples"] == done
    code, out, err = distill(*line, "--json")
    assert code == 0
    assert f"{done} samples are already in" in err
    assert json.loads(out)["samples"] == 300
    assert len({row["uid"] for row in lines_of(store / "traces.jsonl")}) == count(store / "traces.jsonl") == 300


def test_ctrl_c_while_training(world: Path, tmp_path: Path, distill: Run) -> None:
    """130, one line, whole checkpoints; `--resume` goes on, no step is repeated in metrics.jsonl."""
    run = tmp_path / "run"
    settings = f"--max-steps 80 --save-steps 4 --logging-steps 1 --data {world / 'store'} --out {run}"
    line = f"train --mode hard-labels --student llama-nano {settings}".split()
    code, err = interrupt_when(line, lambda: any((run / "checkpoints").glob("checkpoint-*/trainer_state.json")))
    assert code == 130
    assert "interrupted" in one_line(err)
    assert not (run / "run.json").exists()
    code, _, err = distill(*line)
    assert code == 2
    assert "--resume" in one_line(err)
    code, out, err = distill(*line, "--resume", "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 80
    steps = [row["step"] for row in lines_of(run / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 80


def test_an_evaluation_killed_before_its_cost_was_noted_goes_on(tmp_path: Path, distill: Run) -> None:
    """Every sample drawn, the kill before the manifest knows of a run: `eval.json` is made all the same."""
    line = ["eval", "--model", "nano", "--prompts", "nano", "--limit", "4", "--out", str(tmp_path / "e")]
    assert distill(*line)[0] == 0
    (tmp_path / "e" / "eval.json").unlink()
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    for key in ("runs", "ledger"):
        del manifest[key]
    (tmp_path / "e" / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = distill(*line)
    assert code == 0, err
    assert json.loads((tmp_path / "e" / "eval.json").read_text())["questions"] == 4


def test_another_pruning_is_another_model(tmp_path: Path, distill: Run) -> None:
    """The folder of one `prune:` spec must not answer for another, nor a half-written one for itself."""
    line = ["eval", "--prompts", "nano", "--limit", "2", "--max-completion-length", "4", "--out", str(tmp_path / "e")]
    assert distill(*line, "--model", "prune:nano?layers=1")[0] == 0
    before = (tmp_path / "e" / "eval.json").read_bytes()
    code, _, err = distill(*line, "--model", "prune:nano?keep=1")
    assert code == 2, err
    assert "belongs to another recipe" in err
    assert (tmp_path / "e" / "eval.json").read_bytes() == before
