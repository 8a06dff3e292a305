"""The log-probability of the token that came, row by row: what methods of whole spans read.

Either model's logits exist for some rows at a time: the student's are made again in the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.fused import CHUNK
from distill.fused_heads import vocabulary_width
from distill.head import Head
from distill.supports import check_width


class Realised(NamedTuple):
    """Of N rows, (N,) float32 or wider each.

    Attributes:
        logp: the log-probability of the token that came, among the tokens of the vocabulary.
        of_all: among all logits, padding included: what the model's own cross-entropy is made of.
    """

    logp: Tensor
    of_all: Tensor


def realised(
    hidden: Tensor, head: Head, labels: Tensor, *, who: str, num_outcomes: int, chunk_tokens: int | None = None
) -> Realised:
    """Return the log-probabilities of `labels` (N,), with their graph where `hidden` (N, D) has one.

    Args:
        who: "student" or "teacher", for the message.
        chunk_tokens: rows projected at once; None chooses by bytes.

    Raises:
        UserError: the head is narrower than the vocabulary.
    """
    width = vocabulary_width(head)
    check_width(who, width, num_outcomes)

    def one_chunk(piece: slice) -> Realised:
        logits = head(hidden[piece])
        own = logits.gather(-1, labels[piece, None])[:, 0]
        known = logits[:, :num_outcomes].logsumexp(-1)
        return Realised(own - known, own - (known if width == num_outcomes else logits.logsumexp(-1)))

    rows = chunk_tokens or max(1, CHUNK // (4 * width))
    # At least one, if empty, so that a batch without trained tokens keeps its graph.
    pieces = [slice(start, start + rows) for start in range(0, max(1, len(labels)), rows)]
    if not torch.is_grad_enabled():
        return _joined([one_chunk(piece) for piece in pieces])
    return _joined([checkpoint(one_chunk, piece, use_reentrant=False) for piece in pieces])


def _joined(chunks: list[Realised]) -> Realised:
    return Realised(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
