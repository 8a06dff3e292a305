"""A method over the last rows of spans: each span of several tokens is one row, times the chance of what came before.

The chance of a span's earlier tokens depends on other rows than its last, so spans are taken whole, as many at a time
as fit, and made again in the backward pass: neither side's logits exist for all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from align.engine.places import Places
from align.engine.rows import Source
from align.kernels.chain import last_rows, priors
from align.kernels.teacher_rows import Teacher
from distill.forward import Forward

# (student_logits (S, V_S), teacher of S rows, (S,) log-priors of either side) -> (S,) nats
Merge = Callable[[Tensor, Teacher, Tensor, Tensor], Tensor]


def merged_loss(
    student: Forward,
    rows: Tensor,
    labels: Tensor,
    weights: Tensor,
    source: Source,
    teacher_labels: Tensor,
    teacher_realised: Tensor | None,
    places: Places,
    merge: Merge,
    *,
    num_outcomes: int,
    temperature: float,
    tokens: int,
) -> Tensor:
    """Return ``sum over spans of w merge(span)`` with its graph, w the weight of a span's last token.

    Args:
        rows: (N, D) the student's hidden states at the trained rows; `labels` and `weights` (N,) of them.
        source: what the teacher says at its M rows, whose tokens are `teacher_labels` (M,).
        teacher_realised: (M,) log-probabilities of these tokens, where `source` does not know all logits.
        num_outcomes: tokens of the student's vocabulary: logits beyond are padding.
        temperature: divides the student's logits.
        tokens: of either side, at once; a longer span is taken alone.
    """
    device = rows.device
    own = (places.student_span >= 0).nonzero()[:, 0]
    span = places.student_span[own]

    def one_chunk(first: int, last: int) -> Tensor:
        mine, theirs = _within(span, first, last), _within(places.span, first, last)
        here = own[mine].to(device)
        logits = student.head(rows[here])[:, :num_outcomes] / temperature
        count, number = last - first, (span[mine] - first).to(device)
        token_logp = logits.log_softmax(-1).gather(-1, labels[here, None])[:, 0]
        ends = last_rows(number, count)
        with torch.no_grad():
            source.load(theirs)
            teacher, their_number = source.rows(theirs), (places.span[theirs] - first).to(device)
            if teacher.logp is not None:
                said = teacher.logp.gather(-1, teacher_labels[theirs, None])[:, 0]
            else:
                assert teacher_realised is not None, "stored numbers name the token that came"
                said = teacher_realised[theirs]
            their_prior = priors(said, their_number, count)
            their_rows = teacher.rows(last_rows(their_number, count))
        values = merge(logits[ends], their_rows, priors(token_logp, number, count), their_prior)
        return (weights[here[ends]] * values).sum()

    # Starting from a zero that hangs on the student keeps the graph whole for a batch without spans.
    total = student.hidden.flatten()[:1].sum().float() * 0.0
    for first, last in _chunks(span, places.span, len(places.student), tokens):
        if torch.is_grad_enabled():
            total = total + checkpoint(one_chunk, first, last, use_reentrant=False)
        else:
            total = total + one_chunk(first, last)
    return total


def _within(ascending: Tensor, first: int, last: int) -> slice:
    start, stop = torch.searchsorted(ascending, torch.tensor([first, last])).tolist()
    return slice(start, stop)


def _chunks(student: Tensor, teacher: Tensor, spans: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of spans with at most so many tokens on either side, or one span."""
    ends = [torch.searchsorted(side, torch.arange(spans), right=True).tolist() for side in (student, teacher)]
    first = 0
    while first < spans:
        begun = [side[first - 1] if first else 0 for side in ends]
        last = first + 1
        while last < spans and all(side[last] - begin <= tokens for side, begin in zip(ends, begun, strict=True)):
            last += 1
        yield first, last
        first = last
