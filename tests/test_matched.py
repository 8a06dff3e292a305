"""Curves over checkpoints, and arms at equal compute: interpolation by hand, costs with and without their traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_compare import bits, write_evaluation

from distill.compare import compare
from distill.compare.costs import TraceCosts, amortisation, charged
from distill.compare.curves import Curve, crossing, curve, on_one_grid, read_at
from distill.compare.matched import to_target
from distill.dataset import sha256
from distill.errors import UserError
from distill.evaluate import load_evaluation
from distill.statistics import paired_bootstrap

Points = dict[float, np.ndarray]  # cost -> (n, samples) of 0 and 1


def write_run(folder: Path, arm: str, points: Points, seed: int | None = 0, **summary: Any) -> list[Path]:
    """Write an evaluation for every checkpoint of a training run; step and seconds follow the FLOPs."""
    return [
        write_evaluation(
            folder / f"{arm}-{seed}-{number}",
            right,
            arm=arm,
            train_seed=seed,
            train_step=100 * number,
            training={"flops": cost, "seconds": cost / 1e9, "tokens": int(cost / 1e6)},
            **summary,
        )
        for number, (cost, right) in enumerate(points.items(), 1)
    ]


def test_checkpoints_are_a_curve_and_the_last_is_the_score(tmp_path: Path) -> None:
    shares = {1e10: 0.2, 2e10: 0.5, 4e10: 0.8}
    runs = [
        write_run(tmp_path, "hard", {c: bits(p, seed=10 * s + i) for i, (c, p) in enumerate(shares.items())}, seed=s)
        for s in (1, 0)
    ]
    base = write_evaluation(tmp_path / "base", bits(0.1))
    shuffled = [runs[0][2], base, runs[1][0], runs[0][0], runs[1][2], runs[1][1], runs[0][1]]
    result = compare(shuffled, tmp_path / "out")
    arm = result["arms"][0]
    assert arm["seeds"] == [0, 1]
    assert arm["evals"] == [str(runs[1][2]), str(runs[0][2])]
    assert [point["steps"] for point in arm["curve"]] == [[100, 100], [200, 200], [300, 300]]
    assert [point["cost"]["flops"] for point in arm["curve"]] == list(shares)
    for i, point in enumerate(arm["curve"]):
        assert point["scores"] == [
            pytest.approx(bits(list(shares.values())[i], seed=10 * s + i).mean()) for s in (0, 1)
        ]
        assert point["ci95"][0] < point["accuracy"] < point["ci95"][1]
    assert arm["accuracy"] == arm["curve"][-1]["accuracy"]
    assert [len(each["curve"]) for each in result["arms"]] == [3, 1]


def test_folders_that_make_no_curve_are_refused(tmp_path: Path) -> None:
    two = write_run(tmp_path / "a", "x", {1e10: bits(0.2), 2e10: bits(0.3)}, seed=0)
    one = write_run(tmp_path / "b", "x", {1e10: bits(0.2)}, seed=1)
    base = write_evaluation(tmp_path / "base", bits(0.1))
    with pytest.raises(UserError, match="seed 0 has 2, seed 1 has 1: evaluate the same milestones"):
        compare([*two, *one, base], tmp_path / "out")
    again = write_run(tmp_path / "c", "x", {3e10: bits(0.2)}, seed=0)
    with pytest.raises(UserError, match="not different training seeds or steps"):
        compare([*two, *again, base], tmp_path / "out")


def test_arms_are_matched_between_checkpoints_by_hand(tmp_path: Path) -> None:
    """At 1e11 the slow arm is half-way (in the logarithm) between two checkpoints, the quick one at its last."""
    slow = [{1e10: bits(0.1, seed=s), 1e12: bits(0.5, seed=10 + s)} for s in range(3)]
    quick = [{1e9: bits(0.3, seed=20 + s), 1e11: bits(0.9, seed=30 + s)} for s in range(3)]
    folders = [f for s in range(3) for f in write_run(tmp_path, "slow", slow[s], seed=s)]
    folders += [f for s in range(3) for f in write_run(tmp_path, "quick", quick[s], seed=s)]
    level = compare(folders, tmp_path / "out")["matched"]
    a = np.array([run[1e11].mean(1) for run in quick])
    b = np.array([(run[1e10].mean(1) + run[1e12].mean(1)) / 2 for run in slow])
    expected = paired_bootstrap(a, b)
    assert level["budget"] == 1e11
    assert [(row["name"], row["interpolated"]) for row in level["arms"]] == [("slow", True), ("quick", False)]
    assert [row["accuracy"] for row in level["arms"]] == pytest.approx([b.mean(), a.mean()])
    (pair,) = level["pairs"]
    assert pair["difference"] == pytest.approx(float(expected.difference))
    assert pair["ci95"] == pytest.approx([float(expected.low), float(expected.high)])
    assert level["findings"] == [f"at 1e+11 FLOPs each, {pair['verdict']}"]


def test_what_is_not_bracketed_is_left_out_and_said(tmp_path: Path) -> None:
    folders = write_run(tmp_path, "long", {1e10: bits(0.1), 1e11: bits(0.3), 1e12: bits(0.5)})
    folders += write_run(tmp_path, "short", {1e10: bits(0.1), 1e11: bits(0.3)})
    folders += write_run(tmp_path, "near", {0.99e11: bits(0.4)})
    folders += write_run(tmp_path, "once", {5e11: bits(0.6)})
    folders += write_run(tmp_path, "late", {2e11: bits(0.3), 4e11: bits(0.6)})
    folders.append(write_evaluation(tmp_path / "bought", bits(0.7), arm="bought"))
    level = compare(folders, tmp_path / "out")["matched"]
    assert level["budget"] == 1e11
    assert [row["name"] for row in level["arms"]] == ["long", "short", "near"]
    why = {row["name"]: row["why"] for row in level["unmatched"]}
    assert why["once"] == "its one checkpoint cost 5e+11: evaluate its milestones"
    assert why["late"] == "its first checkpoint cost 2e+11 already"
    assert why["bought"] == "flops of its training and traces are not recorded"


def test_ends_alone_are_matched_where_they_cost_the_same(tmp_path: Path) -> None:
    same = [f for arm, p in (("a", 0.2), ("b", 0.8)) for f in write_run(tmp_path / "same", arm, {1e11: bits(p)})]
    assert len(compare(same, tmp_path / "out")["matched"]["arms"]) == 2
    other = write_run(tmp_path / "other", "c", {3e11: bits(0.9)})
    level = compare([same[0], *other], tmp_path / "out")["matched"]
    assert level["pairs"] == level["findings"] == level["to_target"] == []


@pytest.mark.parametrize("quantity", ["flops", "seconds", "tokens"])
def test_a_unit_is_only_a_unit(tmp_path: Path, quantity: str) -> None:
    """FLOPs, seconds and tokens are in proportion in these folders: what is matched is the same."""
    folders = write_run(tmp_path, "a", {1e10: bits(0.1), 1e12: bits(0.6, seed=1)})
    folders += write_run(tmp_path, "b", {1e9: bits(0.2, seed=2), 1e11: bits(0.7, seed=3)})
    level = compare(folders, tmp_path / "out", match=quantity)["matched"]
    reference = compare(folders, tmp_path / "out")["matched"]
    assert level["by"] == quantity
    assert level["pairs"][0]["ci95"] == pytest.approx(reference["pairs"][0]["ci95"])
    assert level["to_target"][0]["ratio"] == pytest.approx(reference["to_target"][0]["ratio"])


def test_the_ratio_of_two_curves_of_one_shape_is_their_shift(tmp_path: Path) -> None:
    """The same scores at eight times the cost: eight times as dear, whichever questions are drawn."""
    scores = [bits(p, seed=i) for i, p in enumerate((0.1, 0.3, 0.5, 0.7))]
    folders = write_run(tmp_path, "cheap", {1e9 * 4**i: right for i, right in enumerate(scores)})
    folders += write_run(tmp_path, "dear", {8e9 * 4**i: right for i, right in enumerate(scores)})
    (row,) = compare(folders, tmp_path / "out")["matched"]["to_target"]
    assert (row["cheaper"], row["dearer"], row["at_least"]) == ("cheap", "dear", False)
    assert row["ratio"] == pytest.approx(8)
    assert row["ci95"] == pytest.approx([8, 8])
    assert row["target"] == pytest.approx(scores[-1].mean())
    assert "dear needs 8 times the FLOPs of cheap [8, 8]" in row["verdict"]


def test_a_target_reached_at_the_first_checkpoint_gives_a_bound(tmp_path: Path) -> None:
    folders = write_run(tmp_path, "quick", {1e9: bits(0.9), 1e10: bits(0.95, seed=1)})
    folders += write_run(tmp_path, "slow", {1e9: bits(0.1, seed=2), 1e10: bits(0.4, seed=3)})
    (row,) = compare(folders, tmp_path / "out")["matched"]["to_target"]
    assert row["at_least"]
    assert row["ratio"] == pytest.approx(10)
    assert "slow needs at least 10 times the FLOPs of quick" in row["verdict"]


def test_the_interval_of_the_ratio_holds_the_true_one() -> None:
    """Forty worlds of two arms with three seeds each, one four times as dear."""
    costs = 1e9 * 2.0 ** np.arange(7)
    held = 0
    for world in range(40):
        rng = np.random.default_rng(world)
        difficulty = rng.normal(0, 1.5, 80)
        lines = {}
        for name, factor in (("a", 1.0), ("b", 4.0)):
            runs = []
            for luck in rng.normal(0, 0.2, 3):
                skill = -3 + 0.8 * np.log2(costs / 1e9 / factor)[:, None] + luck
                chance = 1 / (1 + np.exp(difficulty - skill))
                runs.append(Curve(costs, rng.binomial(4, chance) / 4))
            lines[name] = runs
        (row,) = to_target(lines, "flops", world)
        held += row["ci95"][0] <= 4 <= row["ci95"][1]
    assert held >= 36


POSITIVE = st.lists(st.floats(1.0, 1e12), min_size=2, max_size=6, unique_by=lambda v: round(v, 3)).map(sorted)


@given(POSITIVE, st.data())
def test_reading_a_curve_stays_between_its_neighbours(costs: list[float], data: st.DataObject) -> None:
    scores = np.array([data.draw(st.lists(st.floats(0, 1), min_size=3, max_size=3)) for _ in costs])
    line = curve(costs, scores)
    assert line is not None
    budget = data.draw(st.floats(costs[0] / 2, costs[-1] * 2))
    got = read_at(line, budget)
    if got is None:
        assert not costs[0] < budget < costs[-1]
        return
    read, between = got
    if not between:
        assert any(
            (read == row).all() and abs(cost / budget - 1) <= 0.02 for cost, row in zip(costs, scores, strict=True)
        )
        return
    after = int(np.searchsorted(costs, budget))
    low, high = np.minimum(*scores[after - 1 : after + 1]), np.maximum(*scores[after - 1 : after + 1])
    assert ((low - 1e-9 <= read) & (read <= high + 1e-9)).all()


@given(POSITIVE)
def test_one_run_on_its_own_grid_is_itself_and_is_crossed_where_it_is_read(costs: list[float]) -> None:
    scores = np.linspace(0.1, 0.9, len(costs))[:, None] * np.ones((1, 4))
    grid = on_one_grid([Curve(np.array(costs), scores)] * 2)
    assert grid is not None
    assert grid.scores[:, 0] == pytest.approx(scores)
    target = np.array([0.1, 0.37, 0.9])
    at, first = crossing(np.tile(scores.mean(1), (3, 1)), np.log(costs), target)
    assert first.tolist() == [True, False, False]
    assert np.interp(at, np.log(costs), scores.mean(1)) == pytest.approx(target)


def test_runs_that_never_overlap_have_no_common_grid() -> None:
    lines = [Curve(np.array([1.0, 2.0]), np.zeros((2, 3))), Curve(np.array([3.0, 4.0]), np.zeros((2, 3)))]
    assert on_one_grid(lines) is None
    assert curve([1.0, None], np.zeros((2, 3))) is None
    assert curve([2.0, 1.0], np.zeros((2, 3))) is None


def test_amortisation_is_read_or_refused() -> None:
    assert [amortisation(text) for text in ("full", "none", "1/4", "1/1")] == [1.0, 0.0, 0.25, 1.0]
    for text in ("half", "1/0", "0.5", "2/3", ""):
        with pytest.raises(UserError, match="full, none or 1/M"):
            amortisation(text)


def test_traces_are_charged_in_part_and_prompts_are_the_runs_own() -> None:
    training = {"flops": 100.0, "seconds": 10.0, "tokens": 50, "prompts": 7}
    traces = {"flops": 40.0, "seconds": None, "tokens": 20.0, "prompts": 9.0}
    assert charged(training, traces, 0.25) == {"flops": 110.0, "seconds": None, "tokens": 55.0, "prompts": 7.0}
    assert charged(training, traces, 0.0)["seconds"] == 10.0
    assert charged(None, traces, 1.0) == dict.fromkeys(("flops", "seconds", "tokens", "prompts"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "traces"
    folder.mkdir()
    (folder / "kept.jsonl").write_text('{"messages": []}\n')
    (folder / "manifest.json").write_text(json.dumps({"ledger": {"flops": 5e10, "seconds": 5.0, "tokens": 400}}))
    return folder


def student(folder: Path, store: Path, **recipe: Any) -> str:
    folder.mkdir(parents=True)
    recorded = {
        "recipe": {"mode": "hard-labels", "data": str(store), **recipe},
        "data_sha256": sha256(store / "kept.jsonl"),
    }
    (folder / "run.json").write_text(json.dumps(recorded))
    return str(folder)


def test_what_traces_cost_is_found_at_the_store_a_run_read(tmp_path: Path, store: Path) -> None:
    model = student(tmp_path / "hard", store)
    folders = write_run(tmp_path, "hard", {1e10: bits(0.3), 1e11: bits(0.6)}, model=model)
    model = student(tmp_path / "rl", store, mode="grpo")
    folders += write_run(tmp_path, "rl", {1e10: bits(0.2), 1e11: bits(0.4)}, model=model)
    hard, rl = compare(folders, tmp_path / "out")["arms"]
    assert [p["cost"]["flops"] for p in hard["curve"]] == [6e10, 1.5e11]
    assert hard["generation"] == {"flops": 5e10, "seconds": 5.0, "tokens": 400.0}
    assert [p["cost"]["flops"] for p in rl["curve"]] == [1e10, 1e11]
    assert (rl["generation"], rl["generation_share"]) == (None, 0.0)
    hard, _ = compare(folders, tmp_path / "out", amortize_teacher="1/5")["arms"]
    assert [p["cost"]["flops"] for p in hard["curve"]] == [2e10, 1.1e11]
    hard, _ = compare(folders, tmp_path / "out", amortize_teacher="none")["arms"]
    assert [p["cost"]["flops"] for p in hard["curve"]] == [1e10, 1e11]


def test_a_store_that_moved_is_given_by_hand_and_one_that_changed_is_unknown(tmp_path: Path, store: Path) -> None:
    model = student(tmp_path / "hard", store)
    folders = write_run(tmp_path, "hard", {1e10: bits(0.3), 1e11: bits(0.6)}, model=model)
    moved = store.rename(tmp_path / "elsewhere")
    evaluation = load_evaluation(folders[0])
    assert TraceCosts().generation(evaluation) == (True, None)
    assert TraceCosts([moved]).generation(evaluation) == (True, {"flops": 5e10, "seconds": 5.0, "tokens": 400.0})
    base = write_evaluation(tmp_path / "base", bits(0.1), arm="base")
    notes = compare([*folders, base], tmp_path / "out")["notes"]
    assert any("traces of hard cost is not known" in note for note in notes)
    (moved / "kept.jsonl").write_text("{}\n")
    assert TraceCosts([moved]).generation(evaluation) == (True, None)


def test_what_an_evaluation_recorded_comes_first(tmp_path: Path, store: Path) -> None:
    recorded = {"path": "gone", "sha256": "0", "ledger": {"flops": 1.0}, "use": "traces"}
    (folder,) = write_run(tmp_path, "a", {1e10: bits(0.3)}, training_data=recorded)
    assert TraceCosts([store]).generation(load_evaluation(folder)) == (True, {"flops": 1.0})
    (folder,) = write_run(tmp_path, "b", {1e10: bits(0.3)}, training_data={**recorded, "use": "prompts"})
    assert TraceCosts([store]).generation(load_evaluation(folder)) == (False, None)


def test_an_unknown_quantity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="flops, seconds, tokens, prompts"):
        compare([tmp_path], tmp_path / "out", match="hours")
