"""From a model's logits to the few outcomes that are kept of each position: the most likely, or random draws.

Both are exact functions of the raw distribution (temperature 1) and of the random numbers handed in, computed in
float32 or wider on the device the logits are on; only what is kept leaves it. Equal log-probabilities are told apart
by the lower id, which `torch.topk` does not promise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.signals import SignalSpec, TokenSignal


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What is kept of N positions, in numpy: `logprobs` of the own tokens (N,), and ids, log-probs, counts (N, K)."""

    tokens: np.ndarray
    token_logprobs: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    counts: np.ndarray | None

    def signal(self) -> TokenSignal:
        """Return them as the signal of one trace."""
        return TokenSignal(self.tokens, self.token_logprobs, self.ids, self.logprobs, self.counts)

    def rows(self, chosen: slice) -> Outcomes:
        """Return some of the positions, without copying."""
        counts = None if self.counts is None else self.counts[chosen]
        return Outcomes(
            self.tokens[chosen], self.token_logprobs[chosen], self.ids[chosen], self.logprobs[chosen], counts
        )


def keep(logits: Tensor, tokens: Tensor, spec: SignalSpec, uniforms: np.ndarray | None) -> Outcomes:
    """Return what a signal keeps of logits (N, V) where `tokens` (N,) came next.

    Args:
        uniforms: (N, spec.size) float64 in [0, 1), for random draws; None where the most likely are kept.
    """
    logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    own = logprobs.gather(1, tokens[:, None])[:, 0]
    counts = None
    if spec.kind == "top":
        ids, kept = most_likely(logprobs, spec.size)
    else:
        assert uniforms is not None
        ids, kept, counts = draw(logprobs, torch.from_numpy(uniforms).to(logprobs.device))
    empty = kept.isneginf()
    return Outcomes(
        tokens.cpu().numpy(),
        own.float().cpu().numpy(),
        ids.masked_fill(empty, -1).int().cpu().numpy(),
        kept.float().cpu().numpy(),
        None if counts is None else counts.int().cpu().numpy(),
    )


def most_likely(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return ids and log-probabilities (N, K) of the `count` most likely outcomes; equal ones by id, cut off by id."""
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    least = values[:, -1:]
    cut = ((logprobs >= least).sum(-1) > values.shape[-1]).nonzero()[:, 0]  # rows where equal ones are in and out
    if len(cut):
        rows = logprobs[cut]
        above, equal = rows > least[cut], rows == least[cut]
        room = values.shape[-1] - above.sum(-1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(-1) <= room))
        ids[cut] = chosen.nonzero()[:, 1].view(len(cut), -1)
    ids = ids.sort(-1).values
    values, order = logprobs.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order), values


def draw(logprobs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, log-probabilities and counts (N, K) of independent draws, one for each of `uniforms` (N, draws).

    By inverting the cumulative distribution, summed in float64: in float32 the sum of 150k terms would bias the tail.
    K is the most different outcomes of any row; empty places have the log-probability -inf and the count 0.
    """
    cumulative = logprobs.double().exp_().cumsum_(-1)
    # `right`: the first outcome whose sum is above the number, so that one of probability 0 is never drawn.
    drawn = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    drawn = drawn.clamp_(max=logprobs.shape[-1] - 1).sort(-1).values
    new = torch.ones_like(drawn)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    places = new.cumsum(-1) - 1
    shape = (len(drawn), int(places.max()) + 1)
    counts = drawn.new_zeros(shape).scatter_add_(1, places, torch.ones_like(drawn))
    ids = drawn.new_zeros(shape).scatter_(1, places, drawn)
    kept = logprobs.gather(1, ids).masked_fill(counts == 0, -torch.inf)
    kept, order = kept.sort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order), kept, counts.gather(1, order)


def stack(parts: Sequence[Outcomes]) -> Outcomes:
    """Return several N positions as one, (S * N), as wide as the widest."""
    width = max(part.ids.shape[1] for part in parts)

    def wide(name: str, empty: float) -> np.ndarray:
        arrays = [getattr(part, name) for part in parts]
        return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=empty) for a in arrays])

    return Outcomes(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.token_logprobs for part in parts]),
        wide("ids", -1),
        wide("logprobs", -np.inf),
        None if parts[0].counts is None else wide("counts", 0),
    )
