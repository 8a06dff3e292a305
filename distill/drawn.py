"""The log-probability of tokens that were drawn, by chunks of rows: what policy gradients and their references read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.batch import Batch
from distill.divergences import entropy
from distill.forward import Forward

CHUNK_BYTES = 2**28  # the logits of a chunk


def drawn_logps(
    model: Forward, batch: Batch, *, num_outcomes: int, temperature: float = 1.0, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every trained token, (N,) with its graph, and the entropy of its row, detached.

    The vocabulary is projected to by chunks, and again in the backward pass, so (N, V) never exists.

    Args:
        model: one model's pass over `batch`.
        num_outcomes: tokens of the vocabulary; logits beyond are padding.
        temperature: divides the logits: the distribution that was drawn from.
        chunk_tokens: rows projected at once; None chooses by bytes.
    """
    trained = batch.trained()
    hidden = model.hidden[:, :-1][trained.rows]

    def one_chunk(piece: slice) -> tuple[Tensor, Tensor]:
        logits = model.head(hidden[piece])[:, :num_outcomes].float()
        logp = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
        with torch.no_grad():
            spread = entropy(logp)
        return logp.gather(-1, trained.labels[piece, None]).squeeze(-1), spread

    rows = chunk_tokens or max(1, CHUNK_BYTES // (4 * num_outcomes))
    # At least one, if empty, so that a batch without trained tokens keeps its graph.
    pieces = [slice(start, start + rows) for start in range(0, max(1, len(trained.labels)), rows)]
    chunks = [checkpoint(one_chunk, piece, use_reentrant=False) for piece in pieces]
    logps, spreads = zip(*chunks, strict=True)
    return torch.cat(logps), torch.cat(spreads)
