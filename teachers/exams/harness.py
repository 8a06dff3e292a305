"""`--harness lm-eval`: lm-evaluation-harness asks and judges, and its scores become an `eval.json` of their own kind.

For the tests that this project does not hold. A task there says itself how it prompts, samples and scores, so none of
our sampling or verifying applies, and such scores cannot be compared question by question. What the harness has
answered is kept in its own cache inside the folder; a run that was killed goes on from there, greedy answers and
log-probabilities at least. Nothing here knows a task.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from numbers import Real
from pathlib import Path
from typing import Any

from distill.config import EvalConfig, key_values
from distill.errors import RunError, UserError
from distill.store import MANIFEST, read_manifest, write_json
from distill.tables import suggest
from teachers import choose_backend
from teachers.evaluate import SUMMARY, whose
from teachers.plan import Author

NAME = "lm-eval"
OURS = {"harness", "tasks", "harness_arg"}
SHARED = {"model", "out", "limit", "seed", "system_prompt", "arm", "train_seed"}
ENGINE = {"backend", "engine_arg", "trust_remote_code", "tensor_parallel_size", "data_parallel_size"}
KINDS = {"transformers": "hf", "vllm": "vllm"}  # our backends by the harness's names of models
SET_HERE = {"model", "model_args", "tasks", "limit", "system_instruction", "use_cache", "log_samples", "task_manager"}
OF_PROGRAMS = {"evaluation_tracker", "metadata", "samples", "verbosity"}  # no values that a command line can give


def check_settings(config: EvalConfig) -> None:
    """Refuse settings that belong to the other way of evaluating, and a harness that is not there.

    Raises:
        UserError: naming the first setting, or the extra to install.
    """
    given = sorted(config.model_fields_set)
    if config.harness is None:
        for key in given:
            if key in OURS:
                raise UserError(f"{_flag(key)} is for --harness, which is not given")
        if not config.prompts:
            raise UserError("--prompts is required")
        return
    for key in given:
        if key not in OURS | SHARED | ENGINE:
            raise UserError(
                f"{_flag(key)} is not for --harness {config.harness}: its tasks ask and judge in their own way"
            )
    if not config.tasks:
        raise UserError(f"--harness {config.harness} needs --tasks, the names of its tasks")
    _installed()


def run_harness(config: EvalConfig, author: Author) -> dict[str, Any]:
    """Have the harness evaluate a model, write its scores as `eval.json` at `config.out` and return them.

    Raises:
        UserError: an unknown task or argument, or a folder of another evaluation.
        RunError: the harness failed.
    """
    lm_eval, managers = _installed()
    names = [name.strip() for name in str(config.tasks).split(",") if name.strip()]
    accepted = inspect.signature(lm_eval.simple_evaluate).parameters.keys() - SET_HERE - OF_PROGRAMS | {"include_path"}
    options = key_values(config.harness_arg, "--harness-arg", sorted(accepted))
    kind, model_args, device = _model(config, author)
    recipe = {
        "harness": NAME,
        "version": lm_eval.__version__,
        "tasks": names,
        "arguments": sorted(config.harness_arg),
        "model": author.identity,
        "engine": [kind, *sorted(config.engine_arg)],
        **{key: getattr(config, key) for key in ("limit", "seed", "system_prompt")},
    }
    _check_folder(config.out, recipe, own=Path(author.location).name)
    if (config.out / SUMMARY).is_file():
        result = json.loads((config.out / SUMMARY).read_text(encoding="utf-8")) | whose(config, author)
        write_json(config.out / SUMMARY, result)
        return result
    options = {"device": device, **options}
    manager = managers.TaskManager(include_path=options.pop("include_path", None), metadata=model_args)
    _known(names, manager.all_tasks)
    _claim(config.out, recipe)
    if "seed" in config.model_fields_set:  # else the harness's own, which published scores have
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        options = dict.fromkeys(seeds, config.seed) | options
    began = time.monotonic()
    try:
        with redirect_stdout(sys.stderr):
            found = lm_eval.simple_evaluate(
                model=kind,
                model_args=model_args,
                tasks=names,
                limit=config.limit,
                system_instruction=config.system_prompt,
                use_cache=str(config.out / "answers"),
                log_samples=False,
                task_manager=manager,
                **options,
            )
    except Exception as error:  # tasks are other people's code, and their data is on the hub: anything may be raised
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise RunError(f"{NAME} failed: {what}") from error
    result = {
        "harness": NAME,
        "version": lm_eval.__version__,
        "tasks": scores_of(found),
        "arguments": sorted(config.harness_arg),
        "limit": config.limit,
        "seconds": time.monotonic() - began,
        **whose(config, author),
    }
    write_json(config.out / SUMMARY, result)
    return result


def scores_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores in what the harness returns, and writes as its results file, by task, metric and filter.

    A number that is no number (nan) is None, and so is the error of a score that has none.
    """
    tasks = {}
    for task, row in results["results"].items():
        scores = {}
        for key, value in row.items():
            metric, comma, made_by = key.partition(",")
            if comma and not metric.endswith("_stderr") and not isinstance(value, str):
                scores[key] = {
                    "value": _number(value),
                    "stderr": _number(row.get(f"{metric}_stderr,{made_by}")),
                    "higher_is_better": results.get("higher_is_better", {}).get(task, {}).get(metric),
                }
        tasks[task] = {
            "scores": scores,
            "version": results.get("versions", {}).get(task),
            "num_fewshot": results.get("n-shot", {}).get(task),
            "questions": results.get("n-samples", {}).get(task, {}).get("effective", row.get("sample_len")),
        }
    return tasks


def in_words(result: Mapping[str, Any]) -> list[str]:
    """Return a line for each score."""

    def shown(score: Mapping[str, Any]) -> str:
        numbers = [f"{score[key]:.4f}" for key in ("value", "stderr") if score[key] is not None]
        return " +- ".join(numbers) or "not a number"

    scores = ((task, *pair) for task, told in result["tasks"].items() for pair in told["scores"].items())
    return [f"{task} {name} {shown(score)}" for task, name, score in scores]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None  # numpy's numbers are Real, too


def _installed() -> tuple[Any, Any]:
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(f"--harness {NAME} is not installed: pip install 'distill[lm-eval]' ({error})") from error
    return lm_eval, lm_eval.tasks


def _model(config: EvalConfig, author: Author) -> tuple[str, dict[str, Any], str]:
    """Return the harness's name for the backend, what it starts the model with, and on which device."""
    import torch

    backend, _ = choose_backend(config.backend, author.location, config.base_url)
    if backend not in KINDS:
        raise UserError(f"--harness {NAME} runs models by {' or '.join(KINDS)}, not by the {backend} backend")
    arguments: dict[str, Any] = {"pretrained": author.location, "trust_remote_code": config.trust_remote_code}
    for key in ("tensor_parallel_size", "data_parallel_size"):
        if getattr(config, key) is not None:
            if backend != "vllm":
                raise UserError(f"{_flag(key)} is for --backend vllm here")
            arguments[key] = getattr(config, key)
    arguments |= key_values(config.engine_arg, "--engine-arg")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # left to itself it tries cuda where there is none
    return KINDS[backend], arguments, device


def _known(names: Iterable[str], tasks: Iterable[str]) -> None:
    known = set(tasks)
    for name in names:
        if name not in known:
            raise UserError(
                f"--tasks {name!r} is none of {NAME}'s {len(known)} tasks{suggest(name, sorted(known))}; "
                "`lm-eval ls tasks` lists them"
            )


def _check_folder(out: Path, recipe: Mapping[str, Any], *, own: str) -> None:
    """Refuse a folder that holds something else: another model's cached answers must not stand for this one's.

    Args:
        own: a name that the command itself may have put into a new folder.

    Raises:
        UserError: naming what differs.
    """
    if (out / MANIFEST).exists():
        before = read_manifest(out).get("recipe", {})
        differing = [key for key in {**before, **recipe} if before.get(key) != recipe.get(key)]
        if differing:
            listed = ", ".join(f"{key} is {before.get(key)!r} there and {recipe.get(key)!r} here" for key in differing)
            raise UserError(f"{out} belongs to another evaluation ({listed}): name another --out")
    elif out.is_dir() and any(each.name != own for each in out.iterdir()):
        raise UserError(f"{out} has files of something else: name another --out")


def _claim(out: Path, recipe: Mapping[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / MANIFEST, {"recipe": dict(recipe)})
    except OSError as error:
        raise UserError(f"cannot use {out} as the output folder: {error.strerror or error}") from error


def _flag(key: str) -> str:
    return f"-{key}" if len(key) == 1 else "--" + key.replace("_", "-")
