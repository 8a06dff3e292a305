"""MinHash estimates Jaccard similarity, bands lose no near-duplicate, and what stays is decided by rank alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teachers.filters.near_duplicates import (
    PERMUTATIONS,
    RECALL,
    SHINGLE,
    near_duplicates,
    rows_per_band,
    signature,
    similarity,
)

# With 128 draws the estimate of J has a standard error of sqrt(J (1 - J) / 128).
FOUR_ERRORS = 4 * 0.5 / PERMUTATIONS**0.5


def shingles(text: str) -> set[tuple[str, ...]]:
    """Return the set that a signature stands for, of a text of plain words."""
    tokens = text.split()
    return {tuple(tokens[i : i + SHINGLE]) for i in range(max(1, len(tokens) - SHINGLE + 1))}


def jaccard(one: str, two: str) -> float:
    """Return the exact similarity of two texts."""
    return len(shingles(one) & shingles(two)) / len(shingles(one) | shingles(two))


def story(seed: int, size: int = 400) -> list[str]:
    """Return random words."""
    drawn = random.Random(seed)
    return [f"w{drawn.randrange(5000)}" for _ in range(size)]


def changed(tokens: list[str], share: float, seed: int) -> str:
    """Return the words, of which a share is replaced."""
    drawn = random.Random(seed)
    return " ".join("new" + token if drawn.random() < share else token for token in tokens)


def test_signatures_estimate_jaccard_without_bias() -> None:
    errors = []
    for seed in range(60):
        tokens = story(seed)
        one, two = " ".join(tokens), changed(tokens, 0.3 * seed / 60, seed)
        errors.append(float(similarity(signature(one), signature(two))) - jaccard(one, two))
    assert max(map(abs, errors)) < FOUR_ERRORS
    assert abs(np.mean(errors)) < 4 * 0.5 / (PERMUTATIONS * len(errors)) ** 0.5


@given(text=st.text(max_size=80), other=st.text(max_size=80))
def test_equal_texts_have_equal_signatures_whatever_their_form(text: str, other: str) -> None:
    assert (signature(text) == signature(text)).all()
    assert signature(text).shape == (PERMUTATIONS,)
    spread = "a few more words " + "  \n".join(text.split())
    assert (signature(spread) == signature(spread.replace("\n", " "))).all()
    assert similarity(signature(text), signature(other)) in np.arange(PERMUTATIONS + 1) / PERMUTATIONS


def test_texts_without_words_differ_where_they_differ() -> None:
    assert similarity(signature("((("), signature(")))")) < 0.5
    assert similarity(signature("((("), signature(" (((\n")) == 1
    assert similarity(signature(""), signature("?")) < 0.5


def test_signatures_are_the_same_on_every_machine() -> None:
    assert signature("the same words in the same order")[:3].tolist() == [131624281, 331662945, 2729450622]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_meet_at_the_threshold(threshold: float) -> None:
    width = rows_per_band(threshold)
    assert PERMUTATIONS % width == 0
    assert 1 - (1 - threshold**width) ** (PERMUTATIONS // width) >= RECALL
    assert width == PERMUTATIONS or 1 - (1 - threshold ** (2 * width)) ** (PERMUTATIONS // (2 * width)) < RECALL


SIGNATURES = st.lists(st.lists(st.integers(0, 1), min_size=8, max_size=8), max_size=12)


def by_all_pairs(signatures: np.ndarray, ranks: list, threshold: float) -> list[int]:
    """Return what the rule leaves out when every pair is compared."""
    staying: list[int] = []
    left_out = []
    for row in sorted(range(len(signatures)), key=ranks.__getitem__):
        if any((signatures[row] == signatures[other]).mean() >= threshold for other in staying):
            left_out.append(row)
        else:
            staying.append(row)
    return left_out


@given(patterns=SIGNATURES, threshold=st.sampled_from([0.5, 0.75, 0.9, 1.0]), data=st.data())
def test_what_stays_is_that_of_comparing_every_pair(patterns: list, threshold: float, data: st.DataObject) -> None:
    # Stretches of 16 equal places: rows agree in whole bands or not at all, so bands miss no pair.
    signatures = np.repeat(np.array(patterns, dtype=np.uint32).reshape(-1, 8), PERMUTATIONS // 8, axis=1)
    ranks = data.draw(st.permutations(range(len(patterns))))
    left_out = near_duplicates(signatures, ranks, threshold)
    assert left_out == by_all_pairs(signatures, ranks, threshold)
    order = data.draw(st.permutations(range(len(patterns))))
    again = near_duplicates(signatures[order], [ranks[row] for row in order], threshold)
    assert {ranks[order[row]] for row in again} == {ranks[row] for row in left_out}


def test_near_copies_are_left_out_and_others_are_not() -> None:
    texts, wanted = [], []
    for seed in range(40):
        tokens = story(seed)
        texts.append(" ".join(tokens))
        if seed % 4 == 0:
            near = [*tokens]
            near[200] = "other"
            texts.append(" ".join(near))
            assert jaccard(texts[-1], texts[-2]) > 0.95
            wanted.append(len(texts) - 1)
        if seed % 4 == 1:
            texts.append(changed(tokens, 0.1, seed))
            assert jaccard(texts[-1], texts[-2]) < 0.8
    signatures = np.stack([signature(text) for text in texts])
    assert near_duplicates(signatures, range(len(texts)), 0.9) == wanted
    assert near_duplicates(signatures[:0], [], 0.9) == []
