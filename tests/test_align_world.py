"""The world in which methods across vocabularies are compared: its text, its two vocabularies, and its statistics."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.spans import common_spans
from distill.render import render
from teachers.nano.problems import Problem, Step

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import align_study
import align_world
from align_world import KINDS, Row, Sizes, World, Writer, build_tokenizer, rows


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: build_tokenizer(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def some():
    return list(itertools.islice(rows(Writer(0), split="train", seed=3), 60))


def test_every_solution_costs_what_its_probability_says():
    """All solutions of one problem are drawn often: each comes as often as exp(-nats) says, and is no other's text."""
    problem, writer, rng = Problem("Ana", "nuts", 5, (Step("doubles"),)), Writer(0), random.Random(0)
    drawn = [writer.write(problem, rng) for _ in range(20_000)]
    costs = dict(drawn)
    assert len({(text, round(nats, 9)) for text, nats in drawn}) == len(costs)
    counts = {text: sum(each == text for each, _ in drawn) for text in sorted(costs, key=costs.__getitem__)[:5]}
    for text, count in counts.items():
        expected = 20_000 * math.exp(-costs[text])
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_the_probabilities_of_all_solutions_sum_to_one():
    problem, writer = Problem("Ben", "cups", 3, (Step("buys", 2),)), Writer(0)

    class Listed:
        """Takes every branch in its turn, in place of a random number generator."""

        def __init__(self, path):
            self.path = iter(path)

        def choices(self, outcomes, chances):
            return [next(self.path)]

    # The row's table is that of the shelf, the others do not depend on what was drawn: the sum factors.
    choices = [len(align_world.OPENINGS), len(align_world.LEADS), len(align_world.CODES), len(align_world.CODES)]
    total = sum(
        math.exp(-writer.write(problem, Listed((0, 0, shelf, row, 0)))[1])
        for shelf, row in itertools.product(range(choices[2]), range(choices[3]))
    )
    first = math.prod(
        table[index, 0]
        for table, index in (
            (writer.openings, align_world.NAMES.index("Ben")),
            (writer.leads, align_world.VERBS.index("buys")),
            (writer.closings, align_world.ITEMS.index("cups")),
        )
    )
    assert total == pytest.approx(first)
    for table in (writer.openings, writer.leads, writer.shelves, writer.rows, writer.closings):
        assert np.allclose(table.sum(-1), 1)


def test_the_text_is_a_function_of_its_seeds(some):
    assert some == list(itertools.islice(rows(Writer(0), split="train", seed=3), 60))
    held = {row.question for row in itertools.islice(rows(Writer(0), split="heldout", seed=0), 200)}
    assert not held & {row.question for row in itertools.islice(rows(Writer(0), split="train", seed=0), 2000)}
    assert all(row.solution.endswith(f"\\boxed{{{row.gold}}}") for row in some)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_keeps_every_text_and_loads_as_it_was_built(kind, tokenizers, some, tmp_path):
    from distill.models import load_tokenizer

    tokenizers[kind].save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    again = build_tokenizer(kind)
    for row in some:
        ids = loaded.encode(row.solution, add_special_tokens=False)
        assert loaded.decode(ids, clean_up_tokenization_spaces=False) == row.solution
        assert ids == again.encode(row.solution, add_special_tokens=False)
        example = render(loaded, row.messages)
        assert example.input_ids[-1] == loaded.eos_token_id
        assert len(example) < align_world.CONTEXT


def test_the_vocabularies_really_differ(tokenizers, some):
    """Digits, words and tags fall apart differently, in spans that are many to one in both directions and crossing."""
    shapes = set()
    for row in some:
        for (begin, end), (other_begin, other_end) in common_spans(*(tokenizers[k] for k in KINDS), row.solution):
            shapes.add((end - begin, other_end - other_begin))
    assert (3, 1) in shapes  # three digits
    assert any(a == 1 and b > 1 for a, b in shapes)
    assert any(a > 1 and b > 1 for a, b in shapes)
    pieces = {kind: tokenizers[kind].tokenize("417") for kind in KINDS}
    assert pieces == {"digits": ["4", "1", "7"], "merged": ["417"]}
    assert not set(tokenizers["digits"].all_special_tokens) & set(tokenizers["merged"].all_special_tokens)


def test_the_world_is_made_once(tmp_path):
    small = "llama-nano:hidden_size=32,num_attention_heads=1,num_key_value_heads=1,intermediate_size=32"
    world = World(tmp_path, sizes=Sizes(student=small, base_steps=1, batch=2))
    base = world.base("digits", 1)
    before = (base / "model.safetensors").stat().st_mtime_ns
    assert world.base("digits", 1) == base
    assert (base / "model.safetensors").stat().st_mtime_ns == before
    held, nats = world.heldout(4)
    texts = [json.loads(line)["messages"][-1]["content"] for line in held.read_text().splitlines()]
    assert len(texts) == 4
    assert nats > 0
    assert world.heldout(4) == (held, nats)
    assert world.traces(0, 3).read_text() != world.traces(1, 3).read_text()


@given(st.integers(0, 10_000), st.integers(3, 8))
def test_what_the_floor_and_the_ceiling_close_is_none_and_all_of_the_gap(seed, count):
    rng = np.random.default_rng(seed)
    floor = rng.normal(1.0, 0.01, count)
    ceiling = floor - rng.normal(0.5, 0.01, count)
    assert align_study.closed(floor, floor, ceiling) == pytest.approx((0, 0, 0), abs=1e-9)
    assert align_study.closed(ceiling, floor, ceiling) == pytest.approx((1, 1, 1))
    share, low, high = align_study.closed((floor + ceiling) / 2, floor, ceiling)
    assert (share, low, high) == pytest.approx((0.5, 0.5, 0.5))


def test_fieller_s_interval_holds_the_true_share_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for _ in range(2000):
        floor, ceiling = rng.normal(1.0, 0.1, 5), rng.normal(0.5, 0.1, 5)
        _, low, high = align_study.closed(rng.normal(0.6, 0.1, 5), floor, ceiling)
        held += low <= 0.8 <= high
    assert 0.93 < held / 2000 < 0.97


def test_an_uncertain_gap_leaves_the_share_open():
    assert align_study.closed([1.0, 1.1, 0.9], [1.0, 1.2, 1.0], [1.1, 1.0, 1.1])[1:] == (-math.inf, math.inf)


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Parts do all jobs once, whatever is there already."""
    asked = []
    monkeypatch.setattr(align_study, "run_one", lambda world, *job: asked.append(job) or {"excess": 0.1})
    results, world = tmp_path / "found.jsonl", World(tmp_path)
    align_study.run_missing(results, world, 1, 2, ["cspc"])
    first = list(asked)
    align_study.run_missing(results, world, 1, 2, [])
    align_study.run_missing(results, world, 2, 2, [])
    assert set(first) <= set(asked)
    assert sorted(asked) == sorted(align_study.jobs())


def test_a_row_is_a_conversation():
    row = Row("Q?", "A", "1", 0.5)
    assert [each["content"] for each in row.messages] == ["Q?", "A"]


def test_both_directions_together_are_means_over_the_seeds_that_all_have():
    floors, ceilings, ours = (
        ([4.0, 5.0, 6.0], [8.0, 7.0, 9.0]),
        ([2.0, 3.0, 2.0], [4.0, 4.0, 3.0]),
        ([3.0, 3.0], [5.0, 5.0]),
    )
    values = {}
    for direction, *each in zip(align_study.DIRECTIONS, ours, floors, ceilings, strict=True):
        for name, found in zip(("cspc", align_study.FLOOR, align_study.CEILING), each, strict=True):
            values[direction, name] = dict(enumerate(found))
    assert align_study.pooled(values, "cspc") == ([4.0, 4.0], [6.0, 6.0], [3.0, 3.5])
    assert align_study.pooled(values, "gold") is None
    assert align_study.closed(*align_study.pooled(values, "cspc"))[0] == pytest.approx(2 / 2.75)
