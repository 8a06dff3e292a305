"""Rows of tensors: where each token lies, what is trained, and the way to a device and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.batch import Batch, TeacherRows, collate
from distill.render import Example

PAD = 77


def example_of(length: int, seed: int = 0) -> Example:
    """A sequence whose ids are never the padding's, trained at random places but the first."""
    rng = np.random.default_rng([length, seed])
    weights = rng.choice([0.0, 0.5, 1.0], length).astype(np.float32)
    weights[0] = 0
    return Example(rng.integers(0, PAD, length).astype(np.int32), weights)


GROUPS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4)


@given(GROUPS)
def test_packed_rows_hold_every_sequence_from_its_own_position_0(sizes):
    groups = [[example_of(size, index) for index, size in enumerate(row)] for row in sizes]
    batch = collate(groups, pad_id=PAD)
    assert batch.input_ids.shape == (len(sizes), max(map(sum, sizes)))
    assert batch.lengths().tolist() == [size for row in sizes for size in row]
    for row, group in enumerate(groups):
        for name, values in (("input_ids", "input_ids"), ("weights", "weights")):
            flat = np.concatenate([getattr(example, values) for example in group])
            assert getattr(batch, name)[row, : len(flat)].tolist() == flat.tolist()
        used = len(flat)
        assert (batch.input_ids[row, used:] == PAD).all()
        assert not batch.weights[row, used:].any()
        assert batch.attention_mask[row].tolist() == [1] * used + [0] * (batch.input_ids.shape[1] - used)
        padding = batch.input_ids.shape[1] - used
        expected = [place for size in [*map(len, group), padding] for place in range(size)]
        assert batch.position_ids[row].tolist() == expected


@given(GROUPS)
def test_packing_trains_the_same_predictions_in_the_same_order(sizes):
    groups = [[example_of(size, index) for index, size in enumerate(row)] for row in sizes]
    packed, padded = collate(groups, pad_id=PAD), collate([e for group in groups for e in group], pad_id=PAD)
    assert padded.position_ids is None
    assert packed.trained().labels.tolist() == padded.trained().labels.tolist()
    assert packed.trained().weights.tolist() == padded.trained().weights.tolist()
    assert packed.lengths().tolist() == padded.lengths().tolist()


@given(GROUPS)
def test_the_borders_of_packed_rows_are_those_of_their_sequences_and_padding(sizes):
    inputs = collate([[example_of(size) for size in row] for row in sizes], pad_id=PAD).model_inputs()
    width = max(map(sum, sizes))
    parts = [part for row in sizes for part in [*row, width - sum(row)] if part]
    assert inputs["cu_seq_lens_q"].tolist() == [0, *np.cumsum(parts)]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert "attention_mask" not in inputs  # transformers would not look at the positions
    assert max(parts) <= inputs["max_length_q"] == inputs["max_length_k"]


def test_a_batch_survives_the_way_through_a_dictionary_of_tensors():
    ids = torch.zeros(3, 2, dtype=torch.int64)
    for examples in ([example_of(3), example_of(5)], [[example_of(3), example_of(5)]]):
        for signal in (None, TeacherRows(ids), TeacherRows(ids, tail=torch.zeros(3))):
            plain = collate(examples, pad_id=PAD)
            batch = Batch(plain.input_ids, plain.attention_mask, plain.weights, plain.position_ids, signal)
            again = Batch.from_tensors(batch.tensors())
            assert again.tensors().keys() == batch.tensors().keys()
            assert all(torch.equal(again.tensors()[name], value) for name, value in batch.tensors().items())
            assert (again.signal is None) == (signal is None)


@pytest.mark.parametrize(
    ("ids", "weights", "said"),
    [([], [], "0 tokens"), ([5, 6], [0], "2 tokens and 1 weights"), ([5, 6], [1, 1], "first token")],
)
@pytest.mark.parametrize("packed", [False, True])
def test_malformed_examples_are_refused(packed, ids, weights, said):
    bad = Example(np.array(ids, np.int32), np.array(weights, np.float32))
    with pytest.raises(ValueError, match=said):
        collate([[example_of(3), bad]] if packed else [example_of(3), bad], pad_id=0)
