"""How one trace's signal becomes bytes: sets of token ids, log-probabilities in 16 bits, counts; all decoded at once.

Ids are a set per position, so their order need not be stored: position and id together make one increasing sequence
``position * V + id`` over the whole trace, which an Elias-Fano code holds in 2 + log2(T V / M) bits per entry, any V:
less than one bit more than any code of arbitrary sets needs (Elias, J. ACM 1974). The number of entries of each
position comes with it. Counts, and the place of the trace's own token in its row, are such sequences too, summed up.

Log-probabilities are rounded to one of 65535 levels, evenly spaced in the fourth root: ``-1024 * (code / 65534) ** 4``.
The error is at most 1.8e-4 nats at probability e^-1, 1.0e-3 at e^-10, and vanishes towards 1, so that the small rest
that a confident teacher leaves survives (`quantisation_error` is the exact bound; float16 is 2 to 8 times coarser).
Below -1024 nats, a probability no float64 holds, a value is stored as -1024; -inf has a code of its own.

No Python loop runs over positions or entries. Files, headers and checksums are in `distill.signals`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FLOOR, LEVELS, EMPTY = 1024.0, 65534, 65535
_VALUES = np.append(-FLOOR * (np.arange(LEVELS + 1) / LEVELS) ** 4 + 0.0, -np.inf).astype(np.float32)
_WINDOW = 57  # bits that eight bytes hold from any bit of the first one on


@dataclass(frozen=True, slots=True)
class Entries:
    """One trace's signal, flat: T positions and M kept outcomes, sorted by position, then likelihood, then id.

    Attributes:
        rows: (M,) the position of each outcome; `places` (M,): its rank there.
        ids: (M,); `codes` (M,): log-probabilities by `quantise`; `counts` (M,): draws, or None.
        token_ids: (T,); `token_codes` (T,): the trace's own tokens.
        widths: (T,) outcomes kept at each position.
    """

    rows: np.ndarray
    places: np.ndarray
    ids: np.ndarray
    codes: np.ndarray
    counts: np.ndarray | None
    token_ids: np.ndarray
    token_codes: np.ndarray
    widths: np.ndarray


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a record's header must say so that its payload can be read."""

    tokens: int  # T
    entries: int  # M
    outside: int  # own tokens that are not among the kept outcomes
    places: int  # sum of the own tokens' places


def quantise(logprobs: np.ndarray) -> np.ndarray:
    """Return the uint16 codes of log-probabilities (nats, at most 0)."""
    root = np.sqrt(np.sqrt(np.clip(-logprobs.astype(np.float64), 0.0, FLOOR) / FLOOR))
    codes = np.rint(LEVELS * root).astype(np.uint16)
    return np.where(np.isneginf(logprobs), np.uint16(EMPTY), codes)


def dequantise(codes: np.ndarray) -> np.ndarray:
    """Return the float32 log-probabilities of codes."""
    return _VALUES[codes]


def quantisation_error(logprobs: np.ndarray) -> np.ndarray:
    """Return the largest difference, in nats, that storing makes to log-probabilities in [-1024, 0]."""
    root, half = (-logprobs.astype(np.float64) / FLOOR) ** 0.25, 0.5 / LEVELS
    return FLOOR * ((root + half) ** 4 - root**4) + 2.0**-24 * -logprobs  # the last term: float32 itself


def encode(
    token_ids: np.ndarray,
    token_logprobs: np.ndarray,
    ids: np.ndarray,
    logprobs: np.ndarray,
    counts: np.ndarray | None,
    *,
    vocab_size: int,
    size: int,
) -> tuple[Sizes, bytes]:
    """Return a record's payload and what its header must say; the arguments are those of a `TokenSignal`.

    Args:
        vocab_size: V; ids are below it.
        size: draws per position, where there are counts.
    """
    num_tokens = len(token_ids)
    rows, columns = np.nonzero(ids >= 0)
    joined = rows * np.int64(vocab_size) + ids[rows, columns]
    order = np.argsort(joined, kind="stable")
    joined, columns = joined[order], columns[order]  # rows stay: they were sorted already
    codes = quantise(logprobs[rows, columns])
    widths = np.bincount(rows, minlength=num_tokens)
    own = ids[rows, columns] == token_ids[rows]
    places = widths.copy()  # one beyond the last: not among them
    places[rows[own]] = _ranks(rows, codes, widths)[1][own]
    outside = places == widths
    parts = [elias_fano(joined, num_tokens * vocab_size), codes.astype("<u2").tobytes()]
    if counts is not None:
        parts.append(elias_fano(np.cumsum(counts[rows, columns], dtype=np.int64), num_tokens * size + 1))
    sizes = Sizes(num_tokens, len(joined), int(outside.sum()), int(places.sum()))
    parts.append(elias_fano(np.cumsum(places, dtype=np.int64), sizes.places + 1))
    parts.append(pack(token_ids[outside], _width(vocab_size)))
    parts.append(quantise(token_logprobs[outside]).astype("<u2").tobytes())
    return sizes, b"".join(parts)


def decode(payload: memoryview, sizes: Sizes, *, vocab_size: int, size: int | None) -> Entries:
    """Return what `encode` was given, sorted; `size` is None where there are no counts.

    Raises:
        ValueError: the payload's length does not fit its header.
    """
    bits = np.frombuffer(payload, dtype=np.uint8)
    joined, bits = _read_elias_fano(bits, sizes.entries, sizes.tokens * vocab_size)
    codes, bits = _read_codes(bits, sizes.entries)
    rows, ids = np.divmod(joined, vocab_size)
    counts = None
    if size is not None:
        ends, bits = _read_elias_fano(bits, sizes.entries, sizes.tokens * size + 1)
        counts = np.diff(ends, prepend=0).astype(np.int32)
    ends, bits = _read_elias_fano(bits, sizes.tokens, sizes.places + 1)
    own_places = np.diff(ends, prepend=0)
    outside_ids, bits = _read_packed(bits, sizes.outside, _width(vocab_size))
    outside_codes, bits = _read_codes(bits, sizes.outside)
    if len(bits):
        raise ValueError(f"{len(bits)} bytes too many")
    widths = np.bincount(rows, minlength=sizes.tokens)
    order, ranks = _ranks(rows, codes, widths)
    places = ranks[order]
    ids, codes = ids[order].astype(np.int32), codes[order]
    token_ids, token_codes = np.empty(sizes.tokens, np.int32), np.empty(sizes.tokens, np.uint16)
    inside = own_places < widths
    at = (np.cumsum(widths) - widths + own_places)[inside]
    token_ids[inside], token_codes[inside] = ids[at], codes[at]
    token_ids[~inside], token_codes[~inside] = outside_ids, outside_codes
    return Entries(rows, places, ids, codes, None if counts is None else counts[order], token_ids, token_codes, widths)


def _ranks(rows: np.ndarray, codes: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order by row and likelihood of entries sorted by row and id, and each entry's rank in its row."""
    order = np.argsort((rows << 16) | codes, kind="stable")
    ranks = np.empty(len(rows), np.int64)
    ranks[order] = np.arange(len(rows)) - np.repeat(np.cumsum(widths) - widths, widths)
    return order, ranks


def _width(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def pack(values: np.ndarray, width: int) -> bytes:
    """Return non-negative integers below 2 ** width, `width` bits each, lowest bit first."""
    bits = (values.astype(np.uint64)[:, None] >> np.arange(width, dtype=np.uint64)) & np.uint64(1)
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def unpack(packed: np.ndarray, count: int, width: int) -> np.ndarray:
    """Return the int64 values that `pack` wrote into these bytes (uint8)."""
    assert width <= _WINDOW
    if not count or not width:
        return np.zeros(count, np.int64)
    starts = np.arange(count, dtype=np.int64) * width
    padded = np.append(packed, np.zeros(8, np.uint8))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 8)[starts >> 3].view("<u8")[:, 0]
    return ((windows >> (starts & 7).astype(np.uint64)) & np.uint64((1 << width) - 1)).astype(np.int64)


def elias_fano(values: np.ndarray, universe: int) -> bytes:
    """Return a sorted sequence of integers in [0, universe): low bits as they are, high bits as gaps in unary."""
    low, high_bits = _split(len(values), universe)
    bitmap = np.zeros(high_bits, np.uint8)
    bitmap[(values >> low) + np.arange(len(values))] = 1
    lows = values & ((1 << low) - 1)
    return np.packbits(bitmap, bitorder="little").tobytes() + pack(lows, low)


def _split(count: int, universe: int) -> tuple[int, int]:
    """Return how many low bits each of `count` values has, and the length of the bitmap of the rest."""
    if not count:
        return 0, 0
    low = max(0, (universe // count).bit_length() - 1)
    return low, count + ((universe - 1) >> low)


def _read_elias_fano(bits: np.ndarray, count: int, universe: int) -> tuple[np.ndarray, np.ndarray]:
    low, high_bits = _split(count, universe)
    bitmap, rest = _cut(bits, -(-high_bits // 8))
    highs = np.flatnonzero(np.unpackbits(bitmap, bitorder="little"))
    if len(highs) != count:
        raise ValueError(f"{len(highs)} entries where there should be {count}")
    lows, rest = _read_packed(rest, count, low)
    return ((highs - np.arange(count)) << low) | lows, rest


def _read_packed(bits: np.ndarray, count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    packed, rest = _cut(bits, -(-count * width // 8))
    return unpack(packed, count, width), rest


def _read_codes(bits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    codes, rest = _cut(bits, 2 * count)
    return codes.view("<u2"), rest


def _cut(bits: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    if len(bits) < length:
        raise ValueError(f"{length - len(bits)} bytes too few")
    return bits[:length], bits[length:]
