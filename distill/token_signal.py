"""What a model said about every token of a trace, in memory: `SignalSpec` asks for it, `TokenSignal` holds it.

The numbers are those of the raw model: temperature 1, before top-p or any penalty. What "the K most likely" leave over
is not held; it is ``log(1 - sum(exp(logprobs)))``. On disk they are in `distill.signals`. No torch here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from distill.errors import UserError


@dataclass(frozen=True, slots=True)
class SignalSpec:
    """Which numbers: the `size` most likely outcomes ("top"), or `size` random draws with replacement ("sampled").

    "sampled" is the teacher's own distribution drawn from at temperature 1: counts / size is an unbiased estimate of
    it (random sampling knowledge distillation, arXiv 2503.16870), where the truncated top-K is a biased one.
    """

    kind: Literal["top", "sampled"]
    size: int

    def __post_init__(self) -> None:
        if self.kind not in ("top", "sampled"):
            raise UserError(f"a signal is 'top' or 'sampled', not {self.kind!r}")
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise UserError(f"a signal keeps at least 1 outcome per token, not {self.size!r}")


@dataclass(frozen=True, slots=True, eq=False)
class TokenSignal:
    """What a model said about each of a completion's T tokens: its end token included, what the template wrote not.

    Rows hold K places at most, filled from the left, most likely first (equal ones by id); empty places have the id
    -1, the log-probability -inf and the count 0.

    Attributes:
        token_ids: (T,) the completion's own tokens.
        token_logprobs: (T,) float32, nats.
        ids: (T, K) the outcomes kept at each position, the first of which is drawn after the prompt.
        logprobs: (T, K) float32, nats.
        counts: (T, K) how often each outcome was drawn; None where the outcomes are the most likely ones.

    Raises:
        ValueError: shapes that do not fit, NaN, positive log-probabilities, probabilities that add up to more than 1, a
            row that is not sorted or names an outcome twice, or an own token with two log-probabilities.
    """

    token_ids: np.ndarray
    token_logprobs: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    counts: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, kind in (("token_ids", np.int32), ("token_logprobs", np.float32), ("ids", np.int32)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), kind))
        object.__setattr__(self, "logprobs", np.asarray(self.logprobs, np.float32))
        if self.counts is not None:
            object.__setattr__(self, "counts", np.asarray(self.counts, np.int32))
        if (fault := self._fault()) is not None:
            raise ValueError(f"not a signal: {fault}")

    def __len__(self) -> int:
        return len(self.token_ids)

    def _fault(self) -> str | None:
        shapes = [getattr(self, name).shape for name in ("token_ids", "token_logprobs", "ids", "logprobs")]
        if len(shapes[2]) != 2 or shapes != [shapes[2][:1], shapes[2][:1], shapes[2], shapes[2]]:
            return f"the shapes {shapes} are not (T,), (T,), (T, K), (T, K)"
        if self.counts is not None and self.counts.shape != shapes[2]:
            return f"counts have the shape {self.counts.shape}, not {shapes[2]}"
        kept = self.ids >= 0
        if (self.token_ids < 0).any() or (self.ids < -1).any():
            return "negative token ids"
        if not (self.token_logprobs <= 1e-4).all() or not (self.logprobs[kept] <= 1e-4).all():  # NaN fails as well
            return "log-probabilities that are positive or NaN"
        if np.isneginf(self.logprobs[kept]).any() or not np.isneginf(self.logprobs[~kept]).all():
            return "a log-probability of -inf marks an empty place, and empty places have no other"
        if (kept[:, 1:] & ~kept[:, :-1]).any():
            return "an empty place before a filled one"
        if not (np.exp(self.logprobs.astype(np.float64)).sum(-1) <= 1.001).all():
            return "the probabilities of a position add up to more than 1"
        before, after = self.logprobs[:, :-1], self.logprobs[:, 1:]
        tied = (before == after) & kept[:, 1:]
        if (before < after).any() or (self.ids[:, :-1] >= self.ids[:, 1:])[tied].any():
            return "outcomes are not sorted: most likely first, equal ones by id"
        listed = np.sort(self.ids, axis=-1)
        if ((listed[:, 1:] == listed[:, :-1]) & (listed[:, 1:] >= 0)).any():
            return "an outcome is there twice"
        if self.counts is not None and ((self.counts > 0) != kept).any():
            return "a count of 0 marks an empty place, and empty places have no other"
        own, columns = np.nonzero(self.ids == self.token_ids[:, None])
        if (np.abs(self.logprobs[own, columns] - self.token_logprobs[own]) > 1e-3).any():
            return "a token has another log-probability than the same outcome beside it"
        return None


@dataclass(frozen=True, slots=True, eq=False)
class SignalBatch:
    """The signals of B traces, padded to the longest and widest (as empty places are): see `TokenSignal`.

    Attributes:
        lengths: (B,) tokens of each trace; token_ids, token_logprobs: (B, T); ids, logprobs, counts: (B, T, K).
    """

    lengths: np.ndarray
    token_ids: np.ndarray
    token_logprobs: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    counts: np.ndarray | None


def signal_stream(uid: str) -> np.random.Generator:
    """Return the random stream that draws a trace's outcomes, `size` uniform numbers per token in order.

    It depends on the trace's uid alone and is not the stream that drew the trace, so that scoring a trace later draws
    what would have been captured while it was written.
    """
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"signal:{uid}".encode()).digest()[:16], "big"))
