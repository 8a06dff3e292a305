"""Layer maps: what each spec means at any two depths, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.layer_maps import layer_map

depths = st.integers(1, 60)


@given(depths, depths)
def test_uniform_rises_to_the_last_layer_of_both(student, teacher):
    pairs = layer_map("uniform", student, teacher)
    assert len(pairs) == min(student, teacher)
    assert pairs[-1] == (student, teacher)
    for side, depth in enumerate((student, teacher)):
        numbers = [pair[side] for pair in pairs]
        assert sorted(set(numbers)) == numbers
        assert numbers[0] >= 1
        # Equal shares: no number is a whole layer away from its share of the depth.
        assert all(0 <= (i + 1) * depth / len(pairs) - number < 1 for i, number in enumerate(numbers))


@given(depths, depths, st.data())
def test_last_takes_the_end_of_both(student, teacher, data):
    count = data.draw(st.integers(1, min(student, teacher)))
    pairs = layer_map(f"last-{count}", student, teacher)
    assert pairs == layer_map(f"last:{count}", student, teacher)
    assert pairs == [(student - count + i, teacher - count + i) for i in range(1, count + 1)]


@pytest.mark.parametrize(
    ("spec", "student", "teacher", "pairs"),
    [
        ("uniform", 3, 7, [(1, 2), (2, 4), (3, 7)]),
        ("uniform", 4, 2, [(2, 1), (4, 2)]),
        ("uniform-2", 6, 28, [(3, 14), (6, 28)]),
        ("uniform:1", 6, 28, [(6, 28)]),
        ("all", 3, 3, [(1, 1), (2, 2), (3, 3)]),
        ("1:2,4:8", 4, 8, [(1, 2), (4, 8)]),
        (" 4:8, 0:0 ", 4, 8, [(4, 8), (0, 0)]),
    ],
)
def test_specs(spec, student, teacher, pairs):
    assert layer_map(spec, student, teacher) == pairs


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("all", "equal depth"),
        ("last", "last-2"),
        ("last-0", "1 to 4"),
        ("last-5", "1 to 4"),
        ("uniform-5", "1 to 4"),
        ("first", "allowed are uniform"),
        ("1:2,", "allowed are uniform"),
        ("1:2:3", "allowed are uniform"),
        ("", "allowed are uniform"),
        ("5:8", "student has 4 blocks"),
        ("4:9", "teacher 8"),
        ("1:2,1:2", "twice"),
        (62, "quotes"),  # how YAML 1.1 reads an unquoted 1:2
    ],
)
def test_refused(spec, says):
    with pytest.raises(UserError, match=says):
        layer_map(spec, 4, 8)


def test_embeddings_have_no_attention():
    assert layer_map("0:0", 2, 2) == [(0, 0)]
    with pytest.raises(UserError, match="from 1 on"):
        layer_map("0:0", 2, 2, lowest=1)
