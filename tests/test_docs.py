"""The documents keep their word: commands parse, snippets run, links lead somewhere, files and fields are as listed.

Commands are read by the real command line without being run, then checked against the pydantic models and the tables.
The README's own commands are run as well, small. The diffs of docs/architecture.md are applied to a copy and used.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

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
    Section,
    TrainConfig,
    ViewConfig,
    build,
)
from distill.divergences import DIVERGENCES
from distill.losses import LOSSES
from distill.objective import loss_options, loss_weights, needs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^(<!-- (\w+) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODELS: dict[str, type[Section]] = {
    "demo": DemoConfig,
    "generate": GenerateConfig,
    "filter": FilterConfig,
    "align": AlignConfig,
    "score": ScoreConfig,
    "export": ExportConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "compare": CompareConfig,
    "fetch-model": FetchConfig,
    "run": RunConfig,
    "view": ViewConfig,
}
ROOMS = ("distill", "teachers", "students", "align")
# README commands, made small: the last of two equal flags counts.
SMALL = {
    "generate": ["--limit", "24"],
    "train": ["--max-steps", "2"],
    "eval": ["--limit", "6", "--max-completion-length", "64"],
    "compare": [],
}


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (mark, language, text) of a page's fenced blocks; the mark is the word of a comment line before one."""
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield found[2] or "", found[3], found[4]


def shell_lines(page: Path) -> Iterator[str]:
    for _, language, text in blocks(page):
        if language in ("bash", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                yield line.strip().removeprefix("$ ")


COMMANDS = [
    pytest.param(page, line, id=f"{page.name}: {line[:60]}")
    for page in PAGES
    for line in shell_lines(page)
    if line.startswith("distill ")
]


def cli_commands() -> dict[str, Any]:
    import cli

    return dict(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def recipe(name: str, page: Path, folder: Path) -> Path:
    """Return the YAML file of a command: one of the repository, or a block of the page whose first line names it."""
    if (ROOT / name).is_file():
        return ROOT / name
    for _, language, text in blocks(page):
        if language == "yaml" and text.startswith(f"# {name}\n"):
            (folder / name).write_text(text, encoding="utf-8")
            return folder / name
    raise AssertionError(f"{page.name}: no recipe {name}")


def config_of(line: str, page: Path, folder: Path) -> Section:
    """Parse a command as the command line does, without running it.

    Raises:
        Exception: whatever the command line would answer to it.
    """
    name, *arguments = shlex.split(line)[1:]
    context = cli_commands()[name].make_context(name, arguments)
    given = {key: value for key, value in context.params.items() if value not in (None, [], ())}
    file = given.pop("config", None)
    given.pop("json", None)
    return build(MODELS[name], recipe(str(file), page, folder) if file else None, given)


def test_the_models_are_those_of_the_commands() -> None:
    assert set(cli_commands()) == set(MODELS)
    for name, command in cli_commands().items():
        assert {parameter.name for parameter in command.params} - {"help"} == {
            *MODELS[name].model_fields,
            "config",
            "json",
        }


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_parses(page: Path, line: str, tmp_path: Path) -> None:
    config = config_of(line, page, tmp_path)
    if isinstance(config, TrainConfig):
        from students import student_kind

        weights = loss_weights(config)
        loss_options(config)
        student_kind(config.student)
        assert "teacher" not in needs(weights) or config.teacher, f"{weights} needs --teacher"
    if isinstance(config, GenerateConfig | FilterConfig):
        from teachers.filters import parse_drop, parse_keep

        parse_keep(config.keep)
        parse_drop(config.drop)
    if isinstance(config, GenerateConfig):
        assert config.teacher or config.base_url or config.prompts.partition(":")[0] == "nano"
    if isinstance(config, GenerateConfig | EvalConfig):
        from teachers import BACKENDS

        assert config.backend == "auto" or config.backend in BACKENDS
        if config.prompts.startswith("recipes/"):
            assert (ROOT / config.prompts).is_file()


@pytest.mark.parametrize(
    "line",
    [
        "distill generat --prompts nano --out x",
        "distill generate --prompts nano",
        "distill generate --prompts nano --out x --limits 3",
        "distill train --mode hard-labels --student llama-nano --data x --out y --max-steps many",
        "distill filter --keep any",
    ],
)
def test_a_wrong_command_would_be_seen(line: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"generat|required|limits|max-steps|store"):
        config_of(line, ROOT / "README.md", tmp_path)


def test_flags_in_running_text_exist() -> None:
    flags = {option for command in cli_commands().values() for parameter in command.params for option in parameter.opts}
    foreign = {"--run", "--max-logprobs", "--reasoning-parser"}  # a benchmark's; vLLM's
    allowed = flags | foreign | {"--help", "--editable", "--yes"}
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            for flag in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", span):
                assert flag in allowed, f"{page.name}: {flag} in `{span}`"


def test_every_training_setting_is_explained() -> None:
    pages = ("training.md", "losses.md", "reinforcement.md")
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in pages)
    for name in TrainConfig.model_fields:
        flag = "--" + name.replace("_", "-")
        assert re.search(rf"{flag}(?![\w-])", text), f"none of {', '.join(pages)} mentions {flag}"
    for name in (*DIVERGENCES, *(mode.replace("_", "-") for mode in LOSSES)):
        assert f"| `{name}` |" in text


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    used = [line.split()[1] for page in PAGES for line in shell_lines(page) if line.startswith("make ")]
    assert used
    assert set(used) <= set(targets)


def test_extras_exist() -> None:
    import tomllib

    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    used = [
        extra
        for page in PAGES
        for line in shell_lines(page)
        for found in re.findall(r"\.\[([\w,-]+)\]", line)
        for extra in found.split(",")
    ]
    assert used
    assert set(used) <= set(known)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / target.partition("#")[0]).resolve()
        assert path.exists(), f"{page.name}: {target} leads nowhere"
        if page.parent == ROOT / "docs":  # mkdocs knows no other files
            assert path.parent == page.parent, f"{page.name}: {target} is outside docs/"


def test_the_site_lists_every_page() -> None:
    listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


SNIPPETS = [
    pytest.param(mark, text, id=f"{page.name}-{number}")
    for page in PAGES
    for number, (mark, language, text) in enumerate(blocks(page))
    if language == "python"
]


@pytest.mark.parametrize(("mark", "text"), SNIPPETS)
def test_python_snippets_compile_and_the_runnable_run(mark: str, text: str) -> None:
    code = compile(text, "snippet", "exec")
    if mark == "runnable":
        exec(code, {"__name__": "snippet"})


def tree_of(text: str) -> set[str]:
    """Return the files of an annotated tree, two spaces of indent a level."""
    found, folders = set(), list[str]()
    for line in text.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            assert len(line.split()) > 1, f"{name} has no job"
            found.add("".join(folders) + name)
    return found


def test_the_tree_lists_exactly_the_modules() -> None:
    (text,) = (text for mark, _, text in blocks(ROOT / "docs/architecture.md") if mark == "tree")
    modules = {file.relative_to(ROOT).as_posix() for room in ROOMS for file in (ROOT / room).rglob("*.py")} | {"cli.py"}
    assert tree_of(text) == modules


def test_the_readme_tree_exists() -> None:
    (text,) = (text for _, language, text in blocks(ROOT / "README.md") if language == "text")
    names = [line.split()[0] for line in text.splitlines()]
    assert {f"{room}/" for room in ROOMS} <= set(names)
    assert all((ROOT / name).exists() for name in names)


def start(arguments: list[str], folder: Path, house: Path = ROOT) -> str:
    """Run `distill` as a process in `folder`, from the code in `house`; return its stdout."""
    path = os.pathsep.join(filter(None, (str(house), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(house / "cli.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"distill {' '.join(arguments)}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's own commands have been run, small."""
    import cli

    folder = tmp_path_factory.mktemp("readme")
    stop = signal.getsignal(signal.SIGTERM)
    ran = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        for line in shell_lines(ROOT / "README.md"):
            if line.startswith("distill "):
                name, *arguments = shlex.split(line)[1:]
                with pytest.raises(SystemExit) as ended:
                    cli.app([name, *arguments, *SMALL[name]])
                assert ended.value.code == 0, line
                ran.add(name)
    signal.signal(signal.SIGTERM, stop)
    assert ran == set(SMALL)
    return folder


def named(section: str) -> set[str]:
    """Return the code spans of a section of docs/trace_format.md."""
    text = (ROOT / "docs/trace_format.md").read_text(encoding="utf-8")
    parts = {part.splitlines()[0].replace("`", ""): part for part in re.split(r"^##+ ", text, flags=re.MULTILINE)[1:]}
    return set(re.findall(r"`([^`]+)`", parts[section]))


def test_every_field_written_is_documented(road: Path) -> None:
    def line(path: str) -> dict[str, Any]:
        return json.loads((road / path).read_text(encoding="utf-8").splitlines()[-1])

    def whole(path: str) -> dict[str, Any]:
        return json.loads((road / path).read_text(encoding="utf-8"))

    trace, manifest = line("runs/traces/traces.jsonl"), whole("runs/traces/manifest.json")
    assert {*trace, *trace["verdicts"][-1]} <= named("A line of traces.jsonl")
    kept = line("runs/traces/kept.jsonl")
    assert set(trace) - set(kept) == {"completion", "error"}
    assert set(kept) <= set(trace)
    assert kept["messages"][-1]["role"] == "assistant"
    assert named("funnel.json") >= set(whole("runs/traces/funnel.json")) > {"samples", "kept", "rejected", "reasons"}
    inner = {*manifest["recipe"], *manifest["recipe"]["sampling"], *manifest["ledger"], *manifest["runs"][0]}
    assert {*manifest, *inner} <= named("manifest.json")
    for arm in ("hard", "soft"):
        assert set(line(f"runs/{arm}/metrics.jsonl")) <= named("A line of metrics.jsonl")
        record = whole(f"runs/{arm}/run.json")
        assert {*record, *record["ledger"], *record["versions"]} <= named("run.json") | {"cpu"}
        assert {*whole(f"runs/{arm}/recipe.json"), *line(f"runs/{arm}/timings.jsonl")} <= named(
            "A training run: distill train"
        )
        found = whole(f"runs/eval-{arm}/eval.json")
        assert {*found, *found["sampling"], *found["ledger"]} <= named("eval.json")
    compared = whole("runs/compare/compare.json")
    fields = {*compared, *compared["arms"][0], *compared["pairs"][0]}
    assert fields <= named("A comparison: distill compare")


def test_every_file_written_is_documented(road: Path) -> None:
    sections = {
        "traces": named("A trace store: distill generate"),
        "hard": named("A training run: distill train"),
        "eval-hard": named("An evaluation: distill eval"),
        "compare": named("A comparison: distill compare"),
    }
    for folder, names in sections.items():
        written = {path.name + "/" * path.is_dir() for path in (road / "runs" / folder).iterdir()} - {".lock"}
        assert written <= names, f"{folder}: {sorted(written - names)}"


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the house with every diff of docs/architecture.md applied."""
    house = tmp_path_factory.mktemp("house")
    for room in ROOMS:
        shutil.copytree(ROOT / room, house / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", house / "tests", ignore=shutil.ignore_patterns("__pycache__", "test_docs.py"))
    for name in ("cli.py", "pyproject.toml"):
        shutil.copy(ROOT / name, house / name)
    diffs = [text for _, language, text in blocks(ROOT / "docs/architecture.md") if language == "diff"]
    assert len(diffs) == 5
    for diff in diffs:
        changed = [line for line in diff.splitlines() if re.match(r"[+-](?![+-]{2} )", line) and line[1:].strip()]
        assert len(changed) < 30
        text = re.sub(r"^$", " ", diff.removesuffix("\n"), flags=re.MULTILINE) + "\n"  # an empty line of context
        done = subprocess.run(
            ["git", "apply", "-"],
            cwd=house,
            input=text,
            capture_output=True,
            text=True,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(house.parent)},
        )
        assert done.returncode == 0, f"{done.stderr}\n{diff}"
    return house


def test_the_doors_open(extended: Path, tmp_path: Path) -> None:
    doors = ["--backend", "oracle", "--verifier", "exact", "--keep", "any"]
    start(["generate", "--prompts", "nano", "--limit", "4", *doors, "--out", "g"], tmp_path, extended)
    journal = (tmp_path / "g/traces.jsonl").read_text(encoding="utf-8").splitlines()
    traces = [json.loads(line) for line in journal]
    assert [trace["backend"] for trace in traces] == ["oracle"] * 4
    assert {trace["verdicts"][-1]["verifier"] for trace in traces} == {"exact"}
    train = ["train", "--student", "llama-nano", "--data", "g", "--max-steps", "1", "--tokenizer", "nano"]
    start([*train, "--mode", "smoothed-labels", "--out", "a"], tmp_path, extended)
    soft = ["--mode", "soft-logits", "--teacher", "nano", "--divergence", "le_cam", "--align", "first_byte"]
    start([*train, *soft, "--out", "b"], tmp_path, extended)
    assert json.loads((tmp_path / "b/run.json").read_text(encoding="utf-8"))["metrics"]["divergence"] > 0


def test_what_is_registered_is_tested(extended: Path) -> None:
    wanted = [f"tests/test_{name}.py" for name in ("divergences", "slopes", "losses", "floors")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", *wanted]
    environment = {**os.environ, "PYTHONPATH": str(extended)}
    command += ["-k", "le_cam or smoothed_labels or this_house or has_a_slope"]
    done = subprocess.run(command, cwd=extended, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("le_cam") >= 4
    assert done.stdout.count("smoothed_labels") >= 4


def test_no_page_speaks_of_history_or_shouts() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"[\U0001F300-\U0001FAFF]", text), page.name
        assert "!" not in re.sub(r"```.*?```|`[^`]*`|<!--|!\[", "", text, flags=re.DOTALL), page.name
