"""The demo is commands: its plan is sound and every line of it parses; the runner orders, resumes, and stops.

The demo itself takes minutes, so it is `make demo`'s business; each kind of step runs in test_end_to_end.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import app
from distill import demo
from distill.config import CompareConfig, DemoConfig, EvalConfig, GenerateConfig, Section, TrainConfig, build
from distill.demo import ARMS, Step, plan_demo, run_demo
from distill.errors import RunError

ROOT = Path(__file__).parent.parent
MODELS: dict[str, type[Section]] = {
    "generate": GenerateConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "compare": CompareConfig,
}


COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def parsed(step: Step) -> Any:
    """Return the checked config that the command line of a step means."""
    name, *arguments = step.arguments
    given_flags = COMMANDS[name].make_context(name, list(arguments)).params
    return build(MODELS[name], None, {k: v for k, v in given_flags.items() if k in MODELS[name].model_fields and v})


@settings(max_examples=20, deadline=None)
@given(seeds=st.integers(1, 4), budget=st.floats(30, 10_000))
def test_the_plan_is_sound(seeds: int, budget: float) -> None:
    """Every line parses, stands after what it needs, writes its own folder, and reads what an earlier one wrote."""
    out = Path("demo")
    done: set[str] = set()
    written: set[Path] = set()
    trained, evaluated = {}, {}
    for step in plan_demo(DemoConfig(out=out, seeds=seeds, budget=budget)):
        assert set(step.needs) <= done
        config = parsed(step)
        read = [Path(getattr(config, key)) for key in ("data", "student", "model") if hasattr(config, key)]
        read += [*getattr(config, "evaluations", []), *getattr(config, "store", [])]
        assert {path for path in read if path.is_relative_to(out)} <= written
        assert config.out not in written
        done.add(step.name)
        written.add(config.out)
        if isinstance(config, TrainConfig):
            trained[config.out] = config
        if isinstance(config, EvalConfig):
            evaluated[config.out] = config
    assert isinstance(config, CompareConfig)
    assert set(config.evaluations) == set(evaluated)
    # A fair comparison: the arms differ in what is learnt, and in nothing else.
    assert {(c.arm, c.train_seed) for c in evaluated.values()} == {
        (a, s) for a in ("base", *ARMS) for s in range(seeds)
    }
    free = {"arm", "train_seed", "model", "out"}
    assert len({c.model_dump_json(exclude=free) for c in evaluated.values()}) == 1
    for seed in range(seeds):
        arms = [c for c in trained.values() if c.seed == seed and "base" not in c.out.name]
        assert len(arms) == len(ARMS)
        assert {c.student for c in arms} == {str(out / "students" / f"base-{seed}")}
        rewarded = arms.pop(list(ARMS).index("grpo"))
        assert (rewarded.mode, rewarded.data) == ("grpo", arms[0].data)
        assert rewarded.max_flops == pytest.approx(demo.ARM_FLOPS * budget / demo.REFERENCE_SECONDS, rel=1e-5)
        free = {"out", "mode", "target", "teacher"}
        assert len({c.model_dump_json(exclude=free) for c in arms}) == 1
    steps = [c.max_steps for c in trained.values() if c.mode != "grpo"]
    scale = budget / demo.REFERENCE_SECONDS
    assert set(steps) == {round(demo.BASE_STEPS * scale), round(demo.ARM_STEPS * scale)}


# A stand-in for the command line, so that ordering, resuming and failing can be watched in a second.
STAND_IN = textwrap.dedent(
    """
    import json, pathlib, sys, time
    name, arguments = sys.argv[1], sys.argv[2:]
    out = pathlib.Path(arguments[arguments.index("--out") + 1])
    with open("order.txt", "a") as stream:
        stream.write(f"{out.name}\\n")
    if pathlib.Path("break").exists() and out.name == pathlib.Path("break").read_text():
        sys.exit("error: it broke")
    time.sleep(float(pathlib.Path("sleep").read_text()) if pathlib.Path("sleep").exists() else 0)
    out.mkdir(parents=True, exist_ok=True)
    if name == "compare":
        (out / "compare.json").write_text(json.dumps({"verdict": "done"}))
    """
)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    return [sys.executable, "-S", str(tmp_path / "stand_in.py")]


def order() -> list[str]:
    return Path("order.txt").read_text().split()


def test_the_runner_keeps_the_order_and_does_nothing_twice(command: list[str]) -> None:
    config = DemoConfig(out=Path("d"))
    assert run_demo(config, command) == {"verdict": "done"}
    names = [Path(step.arguments[-1]).name for step in plan_demo(config)]
    assert sorted(order()) == sorted(names)
    assert order()[-1] == "d"
    assert order().index("traces") < order().index("hard-labels-0")
    before = order()
    assert run_demo(config, command) == {"verdict": "done"}
    assert order() == before
    run_demo(config.model_copy(update={"budget": 600.0}), command)  # what depends on the budget is another command line
    assert {"traces", "base-traces"} & set(order()[len(before) :]) == set()


def test_a_step_that_fails_stops_the_demo_and_the_next_run_goes_on(command: list[str]) -> None:
    Path("break").write_text("hard-labels-0")
    with pytest.raises(RunError, match=r"--mode hard-labels.*d/logs/train-hard-labels-0\.log.*it broke"):
        run_demo(DemoConfig(out=Path("d")), command)
    assert "d" not in order()
    Path("break").unlink()
    done = order()
    run_demo(DemoConfig(out=Path("d")), command)
    assert order().count("traces") == 1
    assert set(order()[len(done) :]) >= {"hard-labels-0", "d"}


def test_ctrl_c_starts_nothing_more(command: list[str]) -> None:
    """A terminal sends it to the whole group: what runs ends, what waits is not begun, the exit code is 130."""
    Path("sleep").write_text("1.5")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from distill import demo
from distill.config import DemoConfig
from distill.demo import Step
demo.plan_demo = lambda config: [Step(str(i), ("generate", "--out", str(i))) for i in range(40)]
try:
    demo.run_demo(DemoConfig(out=Path("d")), {command!r})
except KeyboardInterrupt:
    sys.exit(130)
"""
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
    while not Path("order.txt").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    assert process.wait(60) == 130
    assert time.monotonic() - began < 10
    assert len(order()) <= 4
