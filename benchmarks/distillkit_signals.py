"""DistillKit's way of storing the K most likely outcomes, written anew for `benchmarks/signals.py`.

The scheme is that of github.com/arcee-ai/DistillKit (Apache-2.0), `distillkit/compression`, at a61c2e7 (March 2026),
which is not on a package index. Log-probabilities are sorted; the first `exact` are kept in bfloat16, the others are
fitted by least squares in float32, by a sum of powers (and the square root) of the rank; ids are packed in
ceil(log2 V) bits each, in the order of likelihood. Checked against that code on the logits of SmolLM2-135M and
Qwen2.5-Coder-1.5B: as many bytes, the same log-probabilities to the last bit, the same ids up to the order of equally
likely ones. A trace is one row of a parquet file whose columns are lists of lists of bytes;
loading makes Python lists of them, then tensors, then numbers, as its trainer's data loader does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

TOLERANCE = 1e-5  # singular values below it count as none
COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")


@dataclass(frozen=True, slots=True)
class Curve:
    """One configuration: K outcomes, of which `exact` are stored as they are, the rest by these powers of the rank."""

    size: int
    exact: int
    powers: tuple[float, ...]
    scaled: bool = False  # ranks in [0, 1]: an option that neither published configuration takes

    def terms(self) -> Tensor:
        """Return the powers of the ranks (K - exact, powers), float32."""
        ranks = torch.arange(self.size - self.exact, dtype=torch.float32)
        if self.scaled:
            ranks = torch.linspace(0, 1, self.size - self.exact)
        return torch.stack([ranks.sqrt() if power == 0.5 else ranks ** int(power) for power in self.powers], -1)

    def bytes_per_token(self, vocab_size: int) -> int:
        """Return the bytes of one position, the file's own overhead left out."""
        return 2 * self.exact + 4 * len(self.powers) + math.ceil(self.size * id_bits(vocab_size) / 8)


RECOMMENDED = Curve(128, 16, (0, 1, 2, 3, 4, 0.5))
SCALED = replace(RECOMMENDED, scaled=True)
BUDGET = Curve(50, 1, (0, 1, 0.5))


def id_bits(vocab_size: int) -> int:
    return math.ceil(math.log2(vocab_size))


def compress(curve: Curve, ids: Tensor, logprobs: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and ids as bytes (N, ...), from sorted ones (N, K)."""
    terms = curve.terms()
    left, singular, right = torch.linalg.svd(terms, full_matrices=False)
    inverse = torch.where(singular > TOLERANCE, 1 / singular, torch.zeros(()))
    rest = logprobs[:, curve.exact :, None].float()
    coefficients = (right.mT @ (inverse[:, None] * (left.mT @ rest)))[..., 0]
    parts = (logprobs[:, : curve.exact].bfloat16(), coefficients)
    width = id_bits(vocab_size)
    bits = (ids[..., None] >> torch.arange(width - 1, -1, -1) & 1).flatten(1)  # the highest bit first
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    packed = (bits << torch.arange(7, -1, -1)).sum(-1).to(torch.uint8)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1), packed


def decompress(curve: Curve, numbers: Tensor, packed: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return ids and log-probabilities (N, K) from what `compress` made."""
    exact = numbers[:, : 2 * curve.exact].contiguous().view(torch.bfloat16)
    coefficients = numbers[:, 2 * curve.exact :].contiguous().view(torch.float32)
    fitted = (curve.terms() * coefficients[:, None]).sum(-1)
    width = id_bits(vocab_size)
    bits = (packed[..., None] >> torch.arange(7, -1, -1) & 1).flatten(1)[:, : curve.size * width]
    ids = (bits.long().unflatten(1, (curve.size, width)) << torch.arange(width - 1, -1, -1)).sum(-1)
    return ids, torch.cat([exact.float(), fitted], -1)


def write(path: Path, curve: Curve, traces: list[tuple[Tensor, Tensor, Tensor]], vocab_size: int) -> None:
    """Write traces, each (token ids, ids, log-probabilities), to a parquet file."""
    rows: list[list[object]] = [[] for _ in COLUMNS]
    for tokens, ids, logprobs in traces:
        numbers, packed = compress(curve, ids, logprobs, vocab_size)
        for column, value in zip(rows, (tokens, numbers, packed), strict=True):
            column.append(value.tolist())
    kinds = (pa.list_(pa.uint64()), pa.list_(pa.list_(pa.uint8())), pa.list_(pa.list_(pa.uint8())))
    arrays = [pa.array(column, type=kind) for column, kind in zip(rows, kinds, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, names=list(COLUMNS)), path)


def read(path: Path, curve: Curve, vocab_size: int) -> list[tuple[Tensor, Tensor]]:
    """Return each trace's ids and log-probabilities."""
    return [
        decompress(curve, *(torch.tensor(row[name]).to(torch.uint8) for name in COLUMNS[1:]), vocab_size)
        for row in pq.read_table(path).to_pylist()
    ]
