"""The states in which two models of different tokenizers have read the same text: the ends of the spans before.

A span of `Batch.other` is predicted from one state of each model, and both have then read the same bytes. Those states,
one per span, are laid out as if spans were tokens, so that a loss on hidden states needs to know nothing of tokenizers.
With equal tokenizers every span is one token, and what comes out says the same as what went in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.batch import Batch
from distill.forward import Forward


def span_states(student: Forward, teacher: Forward, batch: Batch) -> tuple[Forward, Forward, Batch]:
    """Return both passes and the batch with spans for tokens; unchanged where both sides read the same ids.

    The new batch has a row for each of the B, as long as the most spans of one and a place before: the state at k
    predicts span k, whose weight, that of its student tokens together, is at k + 1. Token ids there mean nothing. What
    is in no span, the prompts above all, is not there: a response has no context.
    """
    if batch.other is None:
        return student, teacher, batch
    rows, begins, ends, teacher_begins, _ = batch.other.spans.T
    count = torch.bincount(rows, minlength=len(batch.weights))
    first = count.cumsum(0) - count
    places = torch.arange(len(rows), device=rows.device) - first[rows]
    shape = (len(batch.weights), int(count.max()) + 1)
    weights = batch.weights.new_zeros(shape)
    until = torch.nn.functional.pad(batch.weights.cumsum(1), (1, 0))
    weights[rows, places + 1] = until[rows, ends] - until[rows, begins]
    inside = (torch.arange(shape[1], device=rows.device) <= count[:, None]).long()

    def pooled(side: Forward, positions: Tensor) -> Forward:
        def take(states: Tensor) -> Tensor:
            laid = states.new_zeros(*shape, states.shape[-1])
            return laid.index_put((rows, places), states[rows, positions])

        layers = {number: take(states) for number, states in side.layers.items()}
        attention = {number: tuple(map(take, parts)) for number, parts in side.attention.items()}
        return Forward(take(side.hidden), side.head, layers, attention)  # type: ignore[arg-type]

    spans = Batch(torch.zeros(shape, dtype=torch.int64, device=rows.device), inside, weights)
    return pooled(student, begins - 1), pooled(teacher, teacher_begins - 1), spans
