"""Ways to store what a teacher said, for `benchmarks/signals.py`: our folders, DistillKit's, and the plain top K.

Each writes, loads (`batches`: as a loss may use it) and says what distribution is learnt from what was loaded: a
function of the tokens and of the student's probabilities (n, V) there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import distillkit_signals as distillkit
import numpy as np
import torch

from distill.signals import SignalBatch, SignalReader, SignalSpec, SignalWriter, TokenSignal, signal_stream
from teachers.engines.outcomes import keep

BATCH = 8  # traces loaded at once


@dataclass
class Teacher:
    """A model's numbers for some traces, one behind another: N tokens in all."""

    name: str
    lengths: list[int]
    tokens: torch.Tensor  # (N,)
    logits: torch.Tensor  # (N, V)

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[1]

    def traces(self, values: torch.Tensor) -> list[torch.Tensor]:
        return list(values.split(self.lengths))


@dataclass
class Rows:
    """What a scheme says of N tokens: ids (N, K), -1 where there is none, and log-probabilities or counts."""

    ids: np.ndarray
    logprobs: np.ndarray | None = None
    counts: np.ndarray | None = None
    tail: np.ndarray | None = None

    @staticmethod
    def of(batches: list[SignalBatch]) -> Rows:
        """Join what was loaded, without the padding."""
        width = max(batch.ids.shape[2] for batch in batches)

        def joined(name: str, empty: float) -> np.ndarray | None:
            parts = [getattr(batch, name) for batch in batches]
            if parts[0] is None:
                return None
            rows = [part[np.arange(part.shape[1]) < b.lengths[:, None]] for part, b in zip(parts, batches, strict=True)]
            if rows[0].ndim == 2:
                rows = [np.pad(r, ((0, 0), (0, width - r.shape[1])), constant_values=empty) for r in rows]
            return np.concatenate(rows)

        ids = joined("ids", -1)
        assert ids is not None
        return Rows(ids, joined("logprobs", -np.inf), joined("counts", 0), joined("tail", 0))


class Ours:
    """A folder of `distill.signals`."""

    def __init__(self, teacher: Teacher, spec: SignalSpec) -> None:
        self.teacher, self.spec, self.size = teacher, spec, spec.size
        self.name = f"top-{spec.size}" if spec.kind == "top" else f"{spec.size} draws"
        self.name += ", log-probs" if spec.kind == "sampled" and spec.logprobs else ""
        self.signals = []
        pairs = zip(teacher.traces(teacher.logits), teacher.traces(teacher.tokens), strict=True)
        for number, (logits, tokens) in enumerate(pairs):
            uniforms = signal_stream(str(number)).random((len(tokens), spec.size)) if spec.kind == "sampled" else None
            self.signals.append(keep(logits, tokens, spec, uniforms).signal())

    def write(self, path: Path) -> None:
        whose = {"vocab_size": self.teacher.vocab_size, "teacher": "benchmark", "tokenizer": "benchmark"}
        with SignalWriter(path, self.spec, **whose, sync_every=len(self.signals) + 1) as writer:
            for number, signal in enumerate(self.signals):
                writer.append(str(number), signal)

    def load(self, path: Path) -> Rows:
        return Rows.of(self.batches(path))

    def batches(self, path: Path) -> list[SignalBatch]:
        reader = SignalReader(path)
        return [reader.gather(reader.uids[at : at + BATCH]) for at in range(0, len(reader), BATCH)]

    def bytes(self, path: Path) -> int:
        return (path / "records.bin").stat().st_size

    @property
    def bound(self) -> float:
        """Bytes per token of arbitrary sets of that many ids, and of counts that add up to N."""
        return sum(bound(signal, self.spec, self.teacher.vocab_size) for signal in self.signals) / len(
            self.teacher.tokens
        )

    def target(self, rows: Rows) -> Callable[[slice, np.ndarray], np.ndarray]:
        if self.spec.kind == "top":
            return lambda at, student: with_tail(rows, at, student)
        return lambda at, student: draws(rows, at, student.shape[1], self.spec.size)


class Likeliest:
    """The K most likely outcomes, renormalised when they are learnt from: raw, or by a curve of DistillKit's."""

    def __init__(self, teacher: Teacher, name: str, size: int, curve: distillkit.Curve | None = None) -> None:
        self.teacher, self.name, self.size, self.curve = teacher, name, size, curve
        self.logprobs, self.ids = torch.log_softmax(teacher.logits, -1).topk(size)
        self.bound = math.log2(math.comb(teacher.vocab_size, size)) / 8

    def write(self, path: Path) -> None:
        if self.curve is None:
            path.write_bytes(self.ids.int().numpy().tobytes() + self._raw().view(torch.int16).numpy().tobytes())
            return
        traces = zip(*map(self.teacher.traces, (self.teacher.tokens, self.ids, self.logprobs)), strict=True)
        distillkit.write(path, self.curve, list(traces), self.teacher.vocab_size)

    def _raw(self) -> torch.Tensor:
        return self.logprobs.bfloat16()

    def batches(self, path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if self.curve is not None:
            return distillkit.read(path, self.curve, self.teacher.vocab_size)
        content, count = path.read_bytes(), self.ids.numel()
        ids = torch.frombuffer(bytearray(content[: 4 * count]), dtype=torch.int32).view(-1, self.size)
        return [(ids, torch.frombuffer(bytearray(content[4 * count :]), dtype=torch.bfloat16).view(-1, self.size))]

    def load(self, path: Path) -> Rows:
        ids, logprobs = (torch.cat(parts) for parts in zip(*self.batches(path), strict=True))
        return Rows(ids.numpy(), logprobs.float().numpy())

    def bytes(self, path: Path) -> int:
        each = 6 * self.size if self.curve is None else self.curve.bytes_per_token(self.teacher.vocab_size)
        return each * len(self.ids)

    def target(self, rows: Rows) -> Callable[[slice, np.ndarray], np.ndarray]:
        return lambda at, student: renormalised(rows, at, student.shape[1])


def bound(signal: TokenSignal, spec: SignalSpec, vocab_size: int) -> float:
    """Return the bytes that arbitrary sets of ids and their counts need: log2 C(V, U) and log2 C(N - 1, U - 1) bits."""

    def bits(width: int) -> float:
        counts = math.comb(spec.size - 1, width - 1) if signal.counts is not None else 1
        return math.log2(math.comb(vocab_size, width)) + math.log2(counts)

    widths, times = np.unique((signal.ids >= 0).sum(-1), return_counts=True)
    return sum(bits(int(width)) * int(many) for width, many in zip(widths, times, strict=True)) / 8


def spread(ids: np.ndarray, values: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return values (n, K) as rows over the whole vocabulary (n, V), 0 elsewhere."""
    dense = np.zeros((len(ids), vocab_size))
    row, place = np.nonzero(ids >= 0)
    dense[row, ids[row, place]] = values[row, place]
    return dense


def renormalised(rows: Rows, at: slice, vocab_size: int) -> np.ndarray:
    """Return exp(logprobs) of some tokens, scaled to one."""
    assert rows.logprobs is not None
    kept = np.exp(rows.logprobs[at].astype(np.float64))
    return spread(rows.ids[at], kept / kept.sum(-1, keepdims=True), vocab_size)


def with_tail(rows: Rows, at: slice, student: np.ndarray) -> np.ndarray:
    """Return the distribution whose gradient is that of K + 1 outcomes: the rest is shared out as the student does."""
    assert rows.logprobs is not None
    assert rows.tail is not None
    inside = spread(rows.ids[at], np.ones(rows.ids[at].shape), student.shape[1])
    others = student * (1 - inside)
    share = np.exp(rows.tail[at].astype(np.float64)) / np.maximum(others.sum(-1), 1e-300)
    return (
        spread(rows.ids[at], np.exp(rows.logprobs[at].astype(np.float64)), student.shape[1]) + others * share[:, None]
    )


def draws(rows: Rows, at: slice, vocab_size: int, size: int) -> np.ndarray:
    """Return shares of the draws, or t / (1 - (1 - t) ** N) where the log-probabilities are known."""
    assert rows.counts is not None
    if rows.logprobs is None:
        return spread(rows.ids[at], rows.counts[at] / size, vocab_size)
    kept = np.exp(rows.logprobs[at].astype(np.float64))
    with np.errstate(invalid="ignore", divide="ignore"):
        return spread(rows.ids[at], kept / -np.expm1(size * np.log1p(-kept)), vocab_size)
