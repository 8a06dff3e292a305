"""`distill run`: what a file means, what a hash covers, what is refused, and what is left after a kill.

The graph and the hashes are properties over drawn pipelines. Scheduling is watched with a stand-in for the command
line; that real commands resume is seen on the built-in problems.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import app, resolve
from distill.config import build
from distill.config.pipeline import RunConfig
from distill.errors import RunError, UserError
from distill.pipeline.commands import COMMANDS, KINDS
from distill.pipeline.comparison import comparison_stages
from distill.pipeline.document import parse_document
from distill.pipeline.expansion import Stage, expand
from distill.pipeline.plan import Planned, plan_stages
from distill.pipeline.reading import read_document
from distill.pipeline.references import fill, pieces
from distill.pipeline.run import carry_out, run_arms

ROOT = Path(__file__).parent.parent
TYPED: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

ARMS = """
vars: {seeds: [0, 1, 2], steps: 20}
stages:
  traces: {command: generate, prompts: nano, limit: 40}
  base:
    command: train
    for: {seed: "${vars.seeds}"}
    mode: hard-labels
    student: llama-nano
    data: ${traces}
    max_steps: ${vars.steps}
    seed: ${seed}
  students:
    command: train
    for:
      arm: {answers: {mode: hard-labels, target: answer}, soft: {mode: soft-logits, teacher: nano, max_steps: 7}}
    student: ${base}
    data: ${traces}
    max_steps: ${vars.steps}
    packing: false
    set: [trainer.adam_beta2=0.95, "trainer.adam_epsilon=1e-8"]
    seed: ${seed}
  scores:
    command: eval
    model: ${students}
    prompts: nano
    arm: ${arm}
    train_seed: ${seed}
  first: {command: eval, model: "${students[arm=soft, seed=0]}", prompts: nano}
  per-seed: {command: compare, evaluations: ["${scores[arm=*]}", "${first}"]}
  verdict: {command: compare, evaluations: ["${scores[*]}", "${first}"], store: ["${traces}"]}
"""


def stages_of(content: str | dict[str, Any], variables: list[str] | None = None) -> list[Stage]:
    return expand(parse_document(yaml.safe_load(content) if isinstance(content, str) else content, variables))


def plan_of(
    content: str | dict[str, Any], *, out: Path = Path("x"), var: list[str] | None = None
) -> dict[str, Planned]:
    return {each.stage.id: each for each in plan_stages(stages_of(content, var), out, resolve)}


def edited(text: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """Return a pipeline with options of its stages changed."""
    content: dict[str, Any] = yaml.safe_load(text)
    for name, options in changes.items():
        content["stages"][name] |= options
    return content


def typed(this: Planned) -> Any:
    """Return the checked config that the real command line makes of a stage's line."""
    name, *arguments = this.arguments
    fields = COMMANDS[name].config.model_fields
    flags = TYPED[name].make_context(name, list(arguments)).params
    return build(COMMANDS[name].config, None, {k: v for k, v in flags.items() if k in fields and v not in (None, [])})


# What a file means


def test_a_stage_follows_the_axes_of_what_it_reads() -> None:
    plan = plan_of(ARMS)
    both = [f"[{arm},{seed}]" for arm in ("answers", "soft") for seed in range(3)]
    assert [name for name in plan if name.startswith("base")] == ["base[0]", "base[1]", "base[2]"]
    assert [name for name in plan if name.startswith("students")] == [f"students{labels}" for labels in both]
    assert [name for name in plan if name.startswith("scores")] == [f"scores{labels}" for labels in both]
    student = typed(plan["students[soft,1]"])
    assert student.student == str(plan["base[1]"].folder)
    assert (student.seed, student.mode, student.teacher) == (1, "soft-logits", "nano")
    assert student.max_steps == 7  # what a label brings beats what the stage says
    assert student.resume
    assert typed(plan["students[answers,1]"]).max_steps == 20
    score = typed(plan["scores[answers,2]"])
    assert (score.arm, score.train_seed, score.model) == ("answers", 2, str(plan["students[answers,2]"].folder))
    assert typed(plan["per-seed[1]"]).evaluations == [
        plan[name].folder for name in ("scores[answers,1]", "scores[soft,1]", "first")
    ]
    assert typed(plan["verdict"]).evaluations == [
        *(plan[f"scores{labels}"].folder for labels in both),
        plan["first"].folder,
    ]


def test_every_line_means_the_settings_that_were_checked() -> None:
    for this in plan_of(ARMS).values():
        reads = COMMANDS[this.stage.command].reads
        free = {*reads, "out", "resume"}
        assert typed(this).model_dump(exclude=free) == this.config.model_dump(exclude=free)
        assert typed(this).out == this.folder


def test_a_variable_can_be_given_on_the_command_line() -> None:
    plan = plan_of(edited(ARMS, first={"model": "nano"}), var=["seeds=[5]", "steps=3"])
    assert typed(plan["base[5]"]).max_steps == 3
    assert "base[0]" not in plan
    with pytest.raises(UserError, match=r"--var 'step' is unknown.*did you mean 'steps'"):
        stages_of(ARMS, ["step=3"])


def test_rewards_are_named_sets() -> None:
    stage = {"command": "train", "mode": "grpo", "student": "nano", "data": "nano", "reward": "${rewards.maths}"}
    rewards = {"maths": ["accuracy=1.0", "format=0.2"]}
    (this,) = plan_of({"rewards": rewards, "stages": {"rl": stage}}).values()
    assert typed(this).reward == rewards["maths"]
    with pytest.raises(UserError, match="list of name=weight"):
        stages_of({"rewards": {"maths": {"accuracy": 1}}, "stages": {"rl": stage}})


@given(st.text(alphabet="ab ${}[].*=$", max_size=12))
def test_any_text_is_a_text_or_refused(text: str) -> None:
    try:
        found = pieces(text)
    except UserError:
        assert "${" in text
        return
    if "${" not in text:
        assert found == [text]
    assert fill(text.replace("${", "$${"), lambda reference: 1 / 0) == text if "$${" not in text else True


AXES = {"a": [1, 2], "b": ["x", "y", "z"], "c": [0.5]}


@st.composite
def pipelines(draw: st.DrawFn) -> dict[str, Any]:
    """Draw trainings that start from each other, with axes of their own, each label used in a free text."""
    stages: dict[str, Any] = {}
    for number in range(draw(st.integers(1, 5))):
        before = draw(st.sampled_from(["llama-nano", *(f"${{s{i}}}" for i in range(number))]))
        own = draw(st.lists(st.sampled_from(sorted(AXES)), unique=True, max_size=2))
        stage = {"command": "train", "mode": "hard-labels", "data": "nano", "student": before}
        if own:
            stage |= {
                "for": {axis: AXES[axis] for axis in own},
                "lr_scheduler_type": "+".join(f"${{{a}}}" for a in own),
            }
        stages[f"s{number}"] = stage | {"seed": number}
    return {"stages": stages}


def axes_of(content: dict[str, Any], name: str) -> set[str]:
    stage = content["stages"][name]
    before = stage["student"].strip("${}")
    return set(stage.get("for", {})) | (axes_of(content, before) if before in content["stages"] else set())


@given(pipelines())
def test_a_drawn_pipeline_has_every_combination_once_and_in_order(content: dict[str, Any]) -> None:
    seen: dict[str, Stage] = {}
    for stage in stages_of(content):
        assert set(stage.needs) <= seen.keys()
        for need in stage.needs:
            assert seen[need].labels.items() <= stage.labels.items()
        assert stage.id not in seen
        seen[stage.id] = stage
    for name in content["stages"]:
        expected = 1
        for axis in axes_of(content, name):
            expected *= len(AXES[axis])
        assert sum(stage.name == name for stage in seen.values()) == expected


# What a hash covers


@settings(max_examples=40)
@given(pipelines(), st.randoms(use_true_random=False))
def test_the_order_in_which_things_are_written_changes_no_hash(content: dict[str, Any], random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        items = list(value.items())
        random.shuffle(items)
        # The order of a `for` is the order of the labels in a name, and so means something.
        return {key: each if key == "for" else shuffled(each) for key, each in items}

    before, after = plan_of(content), plan_of(shuffled(content), out=Path("elsewhere"))
    assert {name: each.key for name, each in before.items()} == {name: each.key for name, each in after.items()}
    assert {name: each.name for name, each in before.items()} == {name: each.name for name, each in after.items()}
    assert len({each.folder for each in before.values()}) == len(before)


@settings(max_examples=40)
@given(pipelines(), st.data())
def test_a_changed_option_changes_its_stage_and_what_follows_from_it(content: dict[str, Any], data: Any) -> None:
    name = data.draw(st.sampled_from(sorted(content["stages"])))
    other = {"stages": {**content["stages"], name: content["stages"][name] | {"weight_decay": 0.125}}}

    def reads(stage: str) -> bool:
        before = content["stages"][stage]["student"].strip("${}")
        return stage == name or (before in content["stages"] and reads(before))

    before, after = plan_of(content), plan_of(other)
    changed = {each.stage.name for key, each in before.items() if after[key].key != each.key}
    assert changed == {stage for stage in content["stages"] if reads(stage)}


def one(**options: Any) -> str:
    """Return the hash of a pipeline's only stage."""
    (this,) = plan_of({"stages": {"s": options}}).values()
    return this.key


def test_what_cannot_change_a_result_is_in_no_hash_and_defaults_are() -> None:
    stage = {"command": "generate", "prompts": "nano"}
    same = [{}, {"concurrency": 3}, {"verifier_workers": 2}, {"log_seconds": 1}, {"n": 1}, {"temperature": 0.6}]
    assert len({one(**stage, **more) for more in same}) == 1
    other = [{"n": 2}, {"temperature": 0.5}, {"keep": "any"}, {"retries": 3}, {"teacher": "nano"}, {"seed": 1}]
    assert len({one(**stage, **more) for more in [{}, *other]}) == len(other) + 1
    assert one(**stage) != one(command="eval", model="nano", prompts="nano")


def test_files_count_by_what_is_in_them(tmp_path: Path) -> None:
    first, moved, changed = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    first.write_text('{"question": "1+1?", "answer": "2"}\n')
    shutil.copy(first, moved)
    changed.write_text('{"question": "1+1?", "answer": "3"}\n')
    keys = [one(command="generate", prompts=str(path), teacher="nano") for path in (first, moved, changed)]
    assert keys[0] == keys[1] != keys[2]
    store = tmp_path / "store"
    store.mkdir()
    (store / "kept.jsonl").write_text("{}\n")
    train = {"command": "train", "mode": "hard-labels", "student": "nano", "data": str(store)}
    before = one(**train)
    (store / "rejected.jsonl").write_text("{}\n")
    assert one(**train) == before  # a training does not read it
    (store / "kept.jsonl").write_text("{ }\n")
    assert one(**train) != before
    templates = (tmp_path / "t.jinja", tmp_path / "u.jinja")
    for path in templates:
        path.write_text(path.name)
    assert len({one(**train, chat_template=str(path)) for path in templates}) == 2


def test_models_count_by_what_is_in_them(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()

    def key(model: str = str(folder)) -> str:
        return one(command="eval", model=model, prompts="nano")

    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(bytes(100))  # small weights are hashed wholly, and not read otherwise
    first, pruned = key(), key(f"prune:{folder}?layers=1")
    assert key() == first != pruned
    (folder / "model.safetensors").write_bytes(bytes(99) + b"1")
    assert key() != first
    assert key(f"prune:{folder}?layers=1") != pruned
    assert key(f"prune:{folder}?layers=1") != key(f"prune:{folder}?layers=2")
    before = key()
    (folder / "run.json").write_text("{}")  # its ledger goes into the evaluation
    assert key() != before
    assert key("org/some-model") != key("org/other-model")  # hub ids, which nobody asks the hub about


def test_a_function_counts_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "my_rewards_of_this_test.py"
    source.write_text("def brief(completions, **_):\n    return [1.0 for _ in completions]\n")
    rl = {"command": "train", "mode": "grpo", "student": "nano", "data": "nano"}
    reward = ["accuracy=1", "my_rewards_of_this_test:brief=0.5"]
    before = one(**rl, reward=reward)
    assert one(**rl, reward=reward) == before
    source.write_text("def brief(completions, **_):\n    return [0.0 for _ in completions]\n")
    assert one(**rl, reward=reward) != before


def test_every_path_of_every_command_is_read_or_refused() -> None:
    """A new setting that names a file must be hashed by what is in the file."""
    for name, command in COMMANDS.items():
        paths = {key for key, field in command.config.model_fields.items() if "Path" in str(field.annotation)}
        assert paths - {"out"} <= command.reads.keys(), name
        assert set(command.reads.values()) <= KINDS.keys()
        assert command.free <= {*command.config.model_fields, "out"}, name


# A comparison is stages

COMPARISON = """
match: flops
budget: 4e9
seeds: [0, 1]
milestones: 3
stages:
  traces: {command: generate, prompts: nano, limit: 40}
  base:
    command: train
    for: {seed: "${vars.seeds}"}
    mode: hard-labels
    student: llama-nano
    data: ${traces}
    seed: ${seed}
train: {student: "${base}", data: "${traces}", learning_rate: 2e-3}
evaluation: {prompts: nano, limit: 10}
compare: {show_questions: 2}
arms:
  base: {model: "${base}"}
  teacher: {model: nano}
  first-base: {model: "${base[0]}"}
  hard: {mode: hard-labels}
  soft: {mode: soft-logits, teacher: nano}
"""
BOTH = [{"mode": "hard-labels", "share": 0.25}, {"mode": "grpo", "share": 0.75}]


def compared(variables: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    return comparison_stages(yaml.safe_load(COMPARISON) | changes, variables or [])


def test_the_arms_of_a_comparison_differ_in_what_is_learnt_and_in_nothing_else() -> None:
    plan = plan_of(compared())
    trained = {name: typed(this) for name, this in plan.items() if this.stage.name == "students"}
    assert set(trained) == {f"students[{arm},{seed}]" for arm in ("hard", "soft") for seed in (0, 1)}
    for seed in (0, 1):
        pair = [trained[f"students[{arm},{seed}]"] for arm in ("hard", "soft")]
        assert len({each.model_dump_json(exclude={"out", "mode", "teacher"}) for each in pair}) == 1
        assert (pair[0].seed, pair[0].max_flops, pair[0].milestones) == (seed, 4e9, 3)
        assert pair[0].student == str(plan[f"base[{seed}]"].folder)
    scores = [typed(this) for this in plan.values() if this.stage.command == "eval"]
    assert len({each.model_dump_json(exclude={"out", "arm", "train_seed", "model"}) for each in scores}) == 1
    curve = [str(each.model) for each in scores if (each.arm, each.train_seed) == ("soft", 1)]
    student = str(plan["students[soft,1]"].folder)
    assert curve == [f"{student}/milestones/1", f"{student}/milestones/2", student]
    given = {(each.arm, each.train_seed): each.model for each in scores if each.arm not in ("hard", "soft")}
    bases = [str(plan[f"base[{seed}]"].folder) for seed in (0, 1)]
    assert given == {
        ("base", 0): bases[0],
        ("base", 1): bases[1],
        ("teacher", None): "nano",
        ("first-base", None): bases[0],
    }
    verdict = typed(plan["verdict"])
    assert set(verdict.evaluations) == {each.out for each in scores}
    assert (verdict.match, verdict.show_questions, verdict.store) == ("flops", 2, [plan["traces"].folder])


@pytest.mark.parametrize(
    ("match", "limit"),
    [("flops", "max_flops"), ("seconds", "max_seconds"), ("tokens", "max_tokens"), ("prompts", "limit")],
)
def test_a_budget_is_the_same_for_all_and_shared_by_the_trainings_of_an_arm(match: str, limit: str) -> None:
    stages = compared(match=match, budget=1000, arms={"hard": {"mode": "hard-labels"}, "both": BOTH})["stages"]
    first, last = (stages[name]["for"]["arm"]["both"] for name in ("phase-1", "students"))
    assert stages["students"]["for"]["arm"]["hard"][limit] == 1000
    assert (first[limit], last[limit]) == ((1000, 1000) if match == "prompts" else (250, 750))
    assert last["student"] == "${phase-1[arm=both]}"
    assert stages["phase-1"]["for"]["seed"] == stages["students"]["for"]["seed"]
    assert stages["scores"]["for"]["arm"] == {"hard": {}, "both": {"trained_before": ["${phase-1[arm=both]}"]}}
    assert "milestones" not in stages["phase-1"]


def test_seeds_and_budget_can_be_given_on_the_command_line() -> None:
    plan = plan_of(compared(["seeds=[7]", "budget=5e8"], arms={"hard": {"mode": "hard-labels"}}))
    assert typed(plan["students[hard,7]"]).max_flops == 5e8
    assert {each.stage.labels["seed"] for each in plan.values() if "seed" in each.stage.labels} == {"7"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match": "flop"}, r"match 'flop' is unknown.*did you mean 'flops'"),
        ({"budget": None}, r"budget must be a number of flops above 0"),
        ({"budget": "much"}, r"budget must be a number of flops"),
        ({"milestones": 0}, r"milestones must be a number from 1"),
        ({"arms": {}}, r"needs arms"),
        ({"arms": {"a": "hard-labels"}}, r"arms: a must be options of a training"),
        ({"arms": {"a": [BOTH[0], BOTH[0]]}}, r"arms: a: the shares of its trainings add up to 0.5"),
        ({"arms": {"a": [{"mode": "grpo", "share": 2}]}}, r"arms: a: share must be above 0"),
        ({"budgets": 3}, r"no 'budgets'.*did you mean 'budget'"),
        ({"stages": {"students": {"command": "train"}}}, r"students is a stage that the comparison makes itself"),
        ({"arms": {"a": {"mod": "grpo"}}}, r"stage students: unknown option 'mod' of train; did you mean 'mode'"),
    ],
)
def test_a_recipe_of_a_comparison_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(compared(**changes))


# What is refused

TRAIN = {"command": "train", "mode": "hard-labels", "student": "nano", "data": "${traces}"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"s": {"command": "trian"}}, r"stage s: command 'trian' is unknown.*did you mean 'train'"),
    (
        {"s": {**TRAIN, "learning_rat": 1}},
        r"stage s: unknown option 'learning_rat' of train; did you mean 'learning_rate'",
    ),
    ({"s": {**TRAIN, "max_steps": "many"}}, r"stage s: --max-steps: input should be a valid integer.*'many'"),
    ({"s": {**TRAIN, "out": "x"}}, r"stage s: out is no option of a stage"),
    ({"s": {**TRAIN, "resume": True}}, r"stage s: resume is no option"),
    (
        {"s": {"command": "filter", "store": "${traces}", "verifier": "math"}},
        r"stage s: verifier is no option.*generates",
    ),
    ({"s": {"command": "train", "mode": "hard-labels", "data": "${traces}"}}, r"stage s: --student is required"),
    ({"s": {**TRAIN, "data": "${trace}"}}, r"stage s: \$\{trace\} is no stage.*did you mean 'traces'"),
    ({"s": {**TRAIN, "data": "${traces"}}, r"stage s: .*not closed"),
    ({"s": {**TRAIN, "data": "${traces[0]}"}}, r"stage s: \$\{traces\[0\]\}.*no `for`"),
    ({"s": {**TRAIN, "data": "${vars.x}"}}, r"stage s: \$\{vars.x\}: vars has rate"),
    ({"s": {**TRAIN, "seed": "${traces.seed}"}}, r"stage s: \$\{traces.seed\} is no value"),
    ({"s": {**TRAIN, "student": "${traces}"}}, r"stage s: student reads traces, which generate makes; .* train makes"),
    ({"s": {**TRAIN, "student": "${s}"}}, r"circle: s -> s"),
    ({"s": {**TRAIN, "student": "${t}"}, "t": {**TRAIN, "student": "${s}"}}, r"circle: s -> t -> s"),
    ({"s": {**TRAIN, "data": "no/such/store"}}, r"stage s: no/such/store does not exist"),
    ({"s": {**TRAIN, "student": "./none"}}, r"stage s: no model at \./none"),
    ({"s": {"command": "generate", "prompts": "none.jsonl", "teacher": "nano"}}, r"stage s: none.jsonl does not exist"),
    ({"s": {**TRAIN, "chat_template": "none.jinja"}}, r"stage s: none.jinja does not exist"),
    ({"s": {**TRAIN, "for": {"seed": [0, 1]}}}, r"stage s\[1\] would do the same as s\[0\]: use \$\{seed\}"),
    ({"s": {**TRAIN, "for": {"seed": [0, 0]}, "seed": "${seed}"}}, r"seed: 0 stands there twice"),
    ({"s": {**TRAIN, "for": {"seed": []}, "seed": "${seed}"}}, r"seed is empty"),
    ({"s": {**TRAIN, "for": {"traces": [1]}}}, r"'traces' is no name of an axis"),
    ({"s": {**TRAIN, "for": {"seed": [1]}, "seed": "${sed}"}}, r"\$\{sed\} is no stage.*did you mean 'seed'"),
    ({"s": {**TRAIN, "for": {"a": {"x": {"mod": 1}}}}}, r"stage s: unknown option 'mod' of train; did you mean 'mode'"),
    ({"a b": TRAIN}, r"'a b' is no name"),
    (
        {"s": {"command": "eval", "model": "${m}/milestones/4", "prompts": "nano"}, "m": TRAIN},
        r"m is not told to write",
    ),
    (
        {"s": {"command": "eval", "model": "${m}/milestones/4", "prompts": "nano"}, "m": {**TRAIN, "milestones": 4}},
        r"m has the milestones 1 to 3: there is no milestones/4",
    ),
    (
        {
            "m": {**TRAIN, "for": {"seed": [0, 1]}, "seed": "${seed}"},
            "s": {"command": "eval", "for": {"seed": [1, 2]}, "model": "${m}", "prompts": "nano"},
        },
        r"stage s: \$\{m\}: m has no seed 2, but 0, 1",
    ),
]


@pytest.mark.parametrize(("stages", "message"), REFUSED)
def test_a_mistake_is_one_line_before_anything_runs(stages: dict[str, Any], message: str) -> None:
    traces = {"traces": {"command": "generate", "prompts": "nano"}}
    with pytest.raises(UserError, match=message):
        plan_of({"vars": {"rate": 1}, "stages": {**traces, **stages}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {a: {command: train, data: ${b}}}", r"is not YAML.*a reference needs quotes"),
        ("stage: {}", r"has no 'stage': allowed are out, vars, rewards, stages; did you mean 'stages'"),
        ("out: x", r"needs stages"),
        ("vars: {a: '${b}'}\nstages: {a: {command: train}}", r"vars holds the reference \$\{b\}"),
    ],
)
def test_a_file_that_is_no_pipeline_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_document(path, [])
    assert str(path) in str(error.value)


# What runs

STAND_IN = textwrap.dedent(
    """
    import os, pathlib, sys, time
    out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    with open("order.txt", "a") as stream:
        stream.write(f"{out.name.rpartition('-')[0]}\\n")
    slow = pathlib.Path("slow")
    if slow.exists():
        pathlib.Path("pid").write_text(str(os.getpid()))
        time.sleep(float(slow.read_text()))
    out.mkdir(parents=True, exist_ok=True)
    broken = pathlib.Path("broken")
    if broken.exists() and out.name.startswith(broken.read_text()):
        sys.exit("error: it broke")
    """
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a pipeline with the stand-in for the command line."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)

    def carried_out(content: dict[str, Any], **given_settings: Any) -> dict[str, Any]:
        config = RunConfig(pipeline=Path("p.yaml"), out=Path("out"), **given_settings)
        return carry_out(parse_document(content), config, [sys.executable, "-S", "stand_in.py"], resolve)

    return carried_out


def begun() -> list[str]:
    return Path("order.txt").read_text().split()


def test_nothing_is_done_twice_and_another_option_is_another_folder(run: Callable[..., dict[str, Any]]) -> None:
    content = edited(ARMS)
    first = run(content)
    assert {stage["state"] for stage in first["stages"].values()} == {"finished"}
    order = begun()
    assert len(order) == len(first["stages"]) == len(plan_of(content))
    assert order.index("traces") < order.index("base-1") < order.index("students-soft-1") < order.index("scores-soft-1")
    run(content)
    assert begun() == order
    changed = run(edited(ARMS, scores={"n": 4}))
    again = begun()[len(order) :]
    assert sorted(again) == sorted(
        [
            *(f"scores-{a}-{s}" for a in ("answers", "soft") for s in range(3)),
            *(f"per-seed-{s}" for s in range(3)),
            "verdict",
        ]
    )
    assert Path(first["stages"]["verdict"]["folder"]).is_dir()
    assert first["stages"]["verdict"]["folder"] != changed["stages"]["verdict"]["folder"]
    assert run(content) == first  # back again, and nothing to do
    assert len(begun()) == len(order) + len(again)
    shutil.rmtree(first["stages"]["first"]["folder"])  # thrown away by hand: made again, and no more than that
    run(content)
    assert begun()[len(order) + len(again) :] == ["first"]


def test_a_dry_run_writes_nothing(run: Callable[..., dict[str, Any]]) -> None:
    result = run(edited(ARMS), dry_run=True)
    assert {stage["state"] for stage in result["stages"].values()} == {"to do"}
    assert not Path("out").exists()
    assert not Path("order.txt").exists()


def test_the_manifest_runs_the_same_again_elsewhere(run: Callable[..., dict[str, Any]]) -> None:
    first = run(edited(ARMS))
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["stages"] == first["stages"]
    assert manifest["versions"]["distill"]
    document = read_document(Path("out/manifest.json"), [])
    again = plan_stages(expand(document), Path("new"), resolve)
    assert {each.stage.id: each.key for each in again} == {name: each["key"] for name, each in first["stages"].items()}
    assert document.out == Path("out")


def test_a_stage_that_fails_stops_what_follows_and_is_gone_on_with(run: Callable[..., dict[str, Any]]) -> None:
    Path("broken").write_text("base-1")
    with pytest.raises(RunError, match=r"--seed 1 .*out/logs/base-1-\w{8}\.log.*it broke"):
        run(edited(ARMS), jobs=1)
    assert not {"students-soft-1", "verdict"} & set(begun())
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["stages"]["base[0]"]["state"] == "finished"
    assert manifest["stages"]["base[1]"]["state"] == "to do"
    Path("broken").unlink()
    run(edited(ARMS))
    assert begun().count("base-1") == 2
    assert begun().count("traces") == begun().count("base-0") == 1


def test_only_what_cannot_be_resumed_is_begun_anew(run: Callable[..., dict[str, Any]]) -> None:
    stages = {"traces": {"command": "generate", "prompts": "nano"}, "all": {"command": "filter", "store": "${traces}"}}
    planned = run({"stages": stages}, dry_run=True)["stages"]
    for name in stages:
        folder = Path(planned[name]["folder"])
        folder.mkdir(parents=True)
        (folder / "half.jsonl").write_text("{}")
    assert {stage["state"] for stage in run({"stages": stages}, dry_run=True)["stages"].values()} == {"begun"}
    run({"stages": stages})
    left = {name: (Path(planned[name]["folder"]) / "half.jsonl").exists() for name in stages}
    assert left == {"traces": True, "all": False}


def test_a_launcher_takes_pythons_place(run: Callable[..., dict[str, Any]]) -> None:
    Path("launcher").write_text(f'#!/bin/sh\necho "$@" > launched.txt\nshift\nexec {sys.executable} "$@"\n')
    Path("launcher").chmod(0o755)
    stage = {
        "command": "train",
        "mode": "hard-labels",
        "student": "nano",
        "data": "nano",
        "launch": "./launcher --many",
    }
    planned = run({"stages": {"s": stage}})["stages"]["s"]
    words = Path("launched.txt").read_text().split()
    assert words[:2] == ["--many", "-S"]
    assert words[-2:] == ["--out", planned["folder"]]
    assert planned["command"].startswith("./launcher --many distill train --mode")


def test_two_stages_that_lock_one_folder_take_turns(run: Callable[..., dict[str, Any]]) -> None:
    stages = {"traces": {"command": "generate", "prompts": "nano"}}
    for keep in ("any", "correct", "best-of:2"):
        stages[f"keep{len(stages)}"] = {"command": "filter", "store": "${traces}", "keep": keep}
    Path("slow").write_text("0.3")
    Path("stand_in.py").write_text(
        STAND_IN
        + textwrap.dedent(
            """
            import fcntl
            if "filter" in sys.argv:
                fcntl.flock(open("lock", "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
                time.sleep(0.3)
            """
        )
    )
    run({"stages": stages}, jobs=4)
    assert len(begun()) == 4


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_schedulers_stop_end_what_runs(run: Callable[..., dict[str, Any]], kind: signal.Signals) -> None:
    """The signal goes to the run alone; a stage that would take longer than the test ends, and nothing is begun."""
    Path("slow").write_text("600")
    Path("p.yaml").write_text(ARMS)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from distill.command_line import App, command
from distill.config.pipeline import RunConfig
from distill.pipeline.run import run_pipeline
app = App()
@app.callback()
def several(): ...
@command(app, RunConfig, "run")
def run(config, as_json): run_pipeline(config, [sys.executable, "-S", "stand_in.py"], str)
app()
"""
    process = subprocess.Popen([sys.executable, "-c", code, "run", "p.yaml", "--out", "out"], stderr=subprocess.DEVNULL)
    while not Path("pid").exists() or not Path("pid").read_text():
        time.sleep(0.01)
    process.send_signal(kind)
    assert process.wait(300) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)
    assert begun() == ["traces"]


def test_one_run_at_a_time_has_the_folder(run: Callable[..., dict[str, Any]]) -> None:
    Path("out").mkdir()
    with Path("out/.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run works in out"):
            run(edited(ARMS))
    run(edited(ARMS))


def test_a_comparison_is_run_up_to_what_is_compared(run: Callable[..., dict[str, Any]]) -> None:
    Path("c.yaml").write_text(COMPARISON)
    command = [sys.executable, "-S", "stand_in.py"]
    config = RunConfig(pipeline=Path("c.yaml"), out=Path("out"))
    found = run_arms(config, command, resolve)
    assert all(path.is_dir() for path in map(Path, [*found["evaluations"], *found["store"]]))
    assert len(found["evaluations"]) == 2 * 2 * 3 + 2 + 2
    assert "verdict" not in begun()
    order = begun()
    assert run_arms(config, command, resolve) == found
    assert begun() == order
    Path("p.yaml").write_text(ARMS.replace("verdict:", "last:"))
    with pytest.raises(UserError, match="no arms to compare"):
        run_arms(RunConfig(pipeline=Path("p.yaml"), out=Path("out")), command, resolve)


# Replayed, since starting a model costs seconds and answers nothing here.
PIPELINE = """
stages:
  traces: {command: generate, backend: replay, teacher: store, prompts: nano, limit: 12, max_completion_length: 64}
  all: {command: filter, store: "${traces}", keep: any}
  student:
    command: train
    mode: hard-labels
    student: llama-nano:hidden_size=32,num_hidden_layers=1
    tokenizer: nano
    data: ${all}
    max_steps: 150
    save_steps: 10
    logging_steps: 1
    per_device_train_batch_size: 2
"""


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, str(ROOT / "cli.py"), "run", "p.yaml", "--out", name, "--jobs", "1"]
    return subprocess.Popen(line, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_numbers(tmp_path: Path) -> None:
    """Real commands, killed by SIGKILL while the student trains; beside it, the same without a kill."""
    (tmp_path / "p.yaml").write_text(PIPELINE)
    with pytest.raises(SystemExit) as stop:
        app(f"generate --prompts nano --limit 12 --max-completion-length 64 --out {tmp_path / 'store'}".split())
    assert not stop.value.code
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(tmp_path, "killed")
    while not (saved := list(killed.glob("student-*/checkpoints/*/distill_state.json"))) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert saved
    student = saved[0].parents[2]
    deadline = time.monotonic() + 60
    while marked(tmp_path) and time.monotonic() < deadline:  # the watchdog ends what was left behind
        time.sleep(0.05)
    assert not (student / "run.json").exists()
    shutil.copytree(killed, whole)
    shutil.rmtree(whole / student.name)
    marks = {path: path.stat().st_mtime_ns for path in killed.glob("logs/*.done")}
    assert {path.name.rpartition("-")[0] for path in marks} == {"traces", "all"}
    both = [start(tmp_path, "killed"), start(tmp_path, "whole")]
    assert [process.wait() for process in both] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in marks} == marks
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (killed / student.name / name).read_bytes() == (whole / student.name / name).read_bytes()
    assert json.loads((killed / "manifest.json").read_text())["stages"]["student"]["state"] == "finished"


def marked(folder: Path) -> list[int]:
    """Return the processes that work in a folder (Linux: read from /proc)."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                if (each / "cwd").readlink() == folder and b"cli.py" in (each / "cmdline").read_bytes():
                    found.append(int(each.name))
            except OSError:
                continue
    return found


# The recipes and the document that come with it


def test_the_documents_pipelines_are_pipelines() -> None:
    """Each YAML block of docs/pipelines.md, where it is no whole file with what it takes for granted."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "pipelines.md").read_text(), re.DOTALL)
    first, arms, comparison = map(yaml.safe_load, blocks)
    assert len(plan_of(first)) == 5
    traces = {"traces": first["stages"]["traces"]}
    assert sum(each.stage.name == "scores" for each in plan_of({"stages": traces | arms}).values()) == 6
    assert comparison_stages(comparison, [])["stages"].keys() >= {"students", "scores", "verdict"}
    del comparison["arms"]["distil+rl"]
    assert plan_of(comparison_stages(comparison, []))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_parses_and_its_plan_needs_no_network(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        app(["run", str(path), "--out", "never-written", "--dry-run", "--json"])
    assert stop.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert not Path("never-written").exists()
    for this in plan_stages(expand(read_document(path, [])), Path("never-written"), resolve):
        assert typed(this).out == Path(result["stages"][this.stage.id]["folder"])
