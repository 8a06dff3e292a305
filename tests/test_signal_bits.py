"""Numbers as bits: whatever was put in comes out, in few bits, and what is not whole is an error."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.signal_bits import BitReader, BitWriter, bit_lengths


def parts(writer: BitWriter) -> tuple[np.ndarray, np.ndarray]:
    return np.frombuffer(writer.bitmap(), np.uint8), np.frombuffer(writer.lows(), np.uint8)


def bits_of(values: np.ndarray) -> int:
    """Return the bits that a sequence takes, up to the filling of two bytes."""
    writer = BitWriter()
    writer.put(values)
    return 8 * sum(len(part) for part in parts(writer))


numbers = st.one_of(st.integers(0, 9), st.integers(0, 300), st.integers(0, 2**40 - 1))
sequences = st.one_of(
    st.tuples(st.just("law"), st.lists(numbers, max_size=40), st.just(0)),
    st.tuples(st.just("rice"), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 12)), max_size=40), st.just(0)),
    st.integers(0, 57).flatmap(
        lambda width: st.tuples(st.just("bits"), st.lists(st.integers(0, 2**width - 1), max_size=40), st.just(width))
    ),
)


@given(st.lists(sequences, max_size=6))
def test_what_is_put_is_taken(written: list[tuple[str, list, int]]) -> None:
    """Any sequences by any law, one after another; then nothing is left, and nothing more is there."""
    writer = BitWriter()
    for law, values, width in written:
        if law == "law":
            writer.put(np.array(values, np.int64))
        elif law == "bits":
            writer.put_bits(np.array(values, np.int64), width)
        else:
            writer.put_rice(*np.array(values, np.int64).reshape(-1, 2).T)
    reader = BitReader(*parts(writer))
    for law, values, width in written:
        if law == "law":
            assert reader.take(len(values)).tolist() == values
        elif law == "bits":
            assert reader.take_bits(len(values), width).tolist() == values
        else:
            plain = np.array(values, np.int64).reshape(-1, 2)
            assert reader.take_rice(plain[:, 1]).tolist() == plain[:, 0].tolist()
    reader.close()
    with pytest.raises(ValueError, match="fewer"):
        reader.take_rice(np.array([57]))


@given(st.lists(numbers, min_size=1, max_size=60))
def test_the_shortest_law_is_taken(values: list[int]) -> None:
    """No law of either kind, tried here one number at a time, takes fewer bits."""

    def length(number: int, order: int, exponential: bool) -> int:
        raised = (number >> order) + 1
        return 1 + order + (2 * (raised.bit_length() - 1) if exponential else raised - 1)

    shortest = min(sum(length(n, order, law) for n in values) for order in range(32) for law in (False, True))
    assert shortest + 6 <= bits_of(np.array(values)) <= shortest + 6 + 14


@pytest.mark.parametrize("mean", [0.6, 5.0, 700.0])
def test_gaps_of_a_random_set_take_hardly_more_than_their_entropy(mean: float) -> None:
    """Geometric numbers: at most 0.08 bits more than the entropy of one."""
    values = np.random.default_rng(0).geometric(1 / (1 + mean), 20_000) - 1
    p = 1 / (1 + mean)
    entropy = -math.log2(p) - (1 - p) / p * math.log2(1 - p)
    assert bits_of(values) / len(values) < entropy + 0.08


def test_frequencies_of_words_take_hardly_more_than_their_entropy() -> None:
    """Numbers with a tail of n^-2: within a tenth."""
    values = np.minimum(1 / np.random.default_rng(0).random(20_000), 1e6).astype(np.int64) - 1
    counts = np.array(list(Counter(values.tolist()).values())) / len(values)
    assert bits_of(values) / len(values) < 1.1 * -(counts * np.log2(counts)).sum()


@given(st.lists(st.integers(0, 500), min_size=1, max_size=40), st.data())
def test_what_is_cut_off_is_an_error(values: list[int], data: st.DataObject) -> None:
    """A byte less, or more, of either part is found by the time all is read."""
    writer = BitWriter()
    writer.put(np.array(values))
    cut = list(parts(writer))
    which = data.draw(st.sampled_from([0, 1]))
    more = data.draw(st.booleans())
    cut[which] = np.append(cut[which], np.uint8(255)) if more else cut[which][:-1]

    def read() -> None:
        reader = BitReader(*cut)
        reader.take(len(values))
        reader.close()

    with pytest.raises(ValueError, match=r"fewer|more|too large"):
        read()


@given(st.lists(st.integers(0, 2**53 - 1), max_size=30))
def test_bit_lengths(values: list[int]) -> None:
    assert bit_lengths(np.array(values, np.int64)).tolist() == [value.bit_length() for value in values]
