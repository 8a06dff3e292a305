"""What a model said about every token of a trace, in memory: `SignalSpec` asks for it, `TokenSignal` holds it.

The numbers are those of the raw model: temperature 1, before top-p or any penalty. On disk they are in
`distill.signals`. No torch here.
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

    "sampled" is the teacher's own distribution drawn from at temperature 1. The shares counts / size are an unbiased
    estimate of it (random sampling knowledge distillation, arXiv 2503.16870), where the truncated top-K is a biased
    one. With the log-probabilities t of what was drawn, so is t / (1 - (1 - t) ** size) for every different outcome
    (Horvitz and Thompson, JASA 1952), which is exact where t is large and of two to five times less variance.

    Attributes:
        logprobs: on disk, keep the log-probabilities; without them draws take about 60 % of the bytes.
        resolution: on disk, steps in one nat of a log-probability, 1 to 1024. 16 is finer than the logits of a model
            that runs in bfloat16, which are 1/8 apart from 16 on.
    """

    kind: Literal["top", "sampled"]
    size: int
    logprobs: bool = True
    resolution: int = 16

    def __post_init__(self) -> None:
        if self.kind not in ("top", "sampled"):
            raise UserError(f"a signal is 'top' or 'sampled', not {self.kind!r}")
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise UserError(f"a signal keeps at least 1 outcome per token, not {self.size!r}")
        if self.kind == "top" and not self.logprobs:
            raise UserError("the most likely outcomes are kept with their log-probabilities; only draws go without")
        if isinstance(self.resolution, bool) or self.resolution not in range(1, 1025):
            raise UserError(f"a log-probability is stored in 1 to 1024 steps per nat, not {self.resolution!r}")

    @property
    def error(self) -> float:
        """The largest difference in nats that storing makes to a log-probability above -1024; the mean is a quarter."""
        return 1.125 / self.resolution


@dataclass(frozen=True, slots=True, eq=False)
class TokenSignal:
    """What a model said about each of a completion's T tokens: its end token included, what the template wrote not.

    Rows hold K places at most, filled from the left, most likely first (equal ones by id); empty places have the id
    -1, the log-probability -inf and the count 0. Draws that were stored without log-probabilities are sorted by count.

    Attributes:
        token_ids: (T,) the completion's own tokens.
        token_logprobs: (T,) float32, nats; None like `logprobs`.
        ids: (T, K) the outcomes kept at each position, the first of which is drawn after the prompt.
        logprobs: (T, K) float32, nats; None for draws that were stored without them.
        counts: (T, K) how often each outcome was drawn; None where the outcomes are the most likely ones.
        tail: (T,) float32, the log of the probability that a row's outcomes leave over, -inf for none: calculated
            from `logprobs` unless it is given; None like these.

    Raises:
        ValueError: shapes that do not fit, NaN, positive log-probabilities, probabilities that add up to more than 1, a
            row that is not sorted or names an outcome twice, or an own token with two log-probabilities.
    """

    token_ids: np.ndarray
    token_logprobs: np.ndarray | None
    ids: np.ndarray
    logprobs: np.ndarray | None
    counts: np.ndarray | None = None
    tail: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, np.asarray(value, kind))
        if (fault := self._fault()) is not None:
            raise ValueError(f"not a signal: {fault}")
        if self.tail is None and self.logprobs is not None:
            with np.errstate(divide="ignore"):
                left = np.log(np.maximum(1 - np.exp(self.logprobs.astype(np.float64)).sum(-1), 0.0))
            object.__setattr__(self, "tail", left.astype(np.float32))

    def __len__(self) -> int:
        return len(self.token_ids)

    def _fault(self) -> str | None:
        shape = self.ids.shape
        shapes = [each.shape for each in (self.token_ids, self.token_logprobs, self.tail) if each is not None]
        wide = [each.shape for each in (self.logprobs, self.counts) if each is not None]
        if len(shape) != 2 or {*shapes} != {shape[:1]} or {*wide} != {shape}:
            return (
                f"the shapes {[*shapes, shape, *wide]} are not (T,) and (T, K), one of the latter a number of each id"
            )
        kept = self.ids >= 0
        if (self.token_ids < 0).any() or (self.ids < -1).any():
            return "negative token ids"
        if (kept[:, 1:] & ~kept[:, :-1]).any():
            return "an empty place before a filled one"
        listed = np.sort(self.ids, axis=-1)
        if ((listed[:, 1:] == listed[:, :-1]) & (listed[:, 1:] >= 0)).any():
            return "an outcome is there twice"
        if self.counts is not None and ((self.counts > 0) != kept).any():
            return "a count of 0 marks an empty place, and empty places have no other"
        likely = self.logprobs if self.logprobs is not None else self.counts
        assert likely is not None
        tied = (likely[:, :-1] == likely[:, 1:]) & kept[:, 1:]
        if (likely[:, :-1] < likely[:, 1:]).any() or (self.ids[:, :-1] >= self.ids[:, 1:])[tied].any():
            return "outcomes are not sorted: most likely first, equal ones by id"
        return self._fault_of_logprobs(kept)

    def _fault_of_logprobs(self, kept: np.ndarray) -> str | None:
        if self.logprobs is None or self.token_logprobs is None:
            given = self.logprobs is not None or self.token_logprobs is not None or self.tail is not None
            return (
                "log-probabilities of the outcomes without those of the own tokens, or without these" if given else None
            )
        if not (self.token_logprobs <= 1e-4).all() or not (self.logprobs[kept] <= 1e-4).all():  # NaN fails as well
            return "log-probabilities that are positive or NaN"
        if np.isneginf(self.logprobs[kept]).any() or not np.isneginf(self.logprobs[~kept]).all():
            return "a log-probability of -inf marks an empty place, and empty places have no other"
        total = np.exp(self.logprobs.astype(np.float64)).sum(-1)
        if not (total <= 1.001).all():
            return "the probabilities of a position add up to more than 1"
        if self.tail is not None and not (np.abs(np.exp(self.tail.astype(np.float64)) + total - 1) <= 1e-3).all():
            return "the probabilities of a position and what they leave over do not add up to 1"
        own, columns = np.nonzero(self.ids == self.token_ids[:, None])
        if (np.abs(self.logprobs[own, columns] - self.token_logprobs[own]) > 1e-3).any():
            return "a token has another log-probability than the same outcome beside it"
        return None


_KINDS = {
    "token_ids": np.int32,
    "token_logprobs": np.float32,
    "ids": np.int32,
    "logprobs": np.float32,
    "counts": np.int32,
    "tail": np.float32,
}


@dataclass(frozen=True, slots=True, eq=False)
class SignalBatch:
    """The signals of B traces, padded to the longest and widest (as empty places are): see `TokenSignal`.

    Attributes:
        lengths: (B,) tokens of each trace.
        token_ids: (B, T) int32, -1 beyond a trace's end; token_logprobs: (B, T) float32, or None.
        ids: (B, T, K) int32; logprobs: (B, T, K) float32, or None; counts: (B, T, K) int32, or None.
        tail: (B, T) float32, the log of what each row leaves over, 0 beyond a trace's end; None like `logprobs`. Where
            it is there, exp(logprobs) and exp(tail) of a position add up to 1.
    """

    lengths: np.ndarray
    token_ids: np.ndarray
    token_logprobs: np.ndarray | None
    ids: np.ndarray
    logprobs: np.ndarray | None
    counts: np.ndarray | None
    tail: np.ndarray | None


def signal_stream(uid: str) -> np.random.Generator:
    """Return the random stream that draws a trace's outcomes, `size` uniform numbers per token in order.

    It depends on the trace's uid alone and is not the stream that drew the trace, so that scoring a trace later draws
    what would have been captured while it was written.
    """
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"signal:{uid}".encode()).digest()[:16], "big"))
