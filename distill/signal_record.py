"""How one trace's signal becomes bytes: an inverted index of its outcomes, counts, log-probabilities, own tokens.

The ids that a teacher thinks of along a trace are few, and come back. So each is written once, and behind it the
positions where it occurs: an id met at n of T positions takes about log2(T / n) + 1.5 bits each time, instead of the
log2(V / K) + 1.5 that a code of arbitrary sets must spend, whatever V is. Nothing about the order of a row is stored:
it follows from the likelihoods.

Log-probabilities are whole steps of 1 / resolution nats, written as differences: of the most likely outcomes to the
least likely one of their row, of random draws to the logarithm of how often each was drawn. Beside them stands, four
times finer, the log-odds of what the row leaves over. Reading scales a row so that it and the rest add up to one
again. So a small rest survives, however coarse the steps, and so does a small part that is kept. `SignalSpec.error` is
the largest difference: half a step of rounding, at most as much again by scaling, an eighth of one by the rest.

No Python loop runs over positions or entries. Files, headers and checksums are in `distill.signal_folder`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill.signal_bits import BitReader, BitWriter, bit_lengths
from distill.token_signal import SignalSpec, TokenSignal

FLOOR = 1024  # nats; below it, a probability that no float64 holds, a log-probability is stored as -1024
ROUNDING = 1e-3  # as far from 1 as the probabilities of a `TokenSignal` may add up
OFFSET = 24  # bits of the least of a record's differences: enough for 1024 nats, 1024 steps each, 4 times finer
FINER = 4  # steps of the log-odds of the rest in one step of the log-probabilities


@dataclass(frozen=True, slots=True)
class Entries:
    """One trace's signal, flat: T positions and M kept outcomes, sorted by position, then likelihood, then id.

    Attributes:
        widths: (T,) outcomes kept at each position.
        ids: (M,); `logprobs` (M,) and `counts` (M,), or None where they are not stored.
        token_ids: (T,) the trace's own tokens; `token_logprobs` (T,), or None.
        tail: (T,) the log-probability of what is left over, or None.
    """

    widths: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray | None
    counts: np.ndarray | None
    token_ids: np.ndarray
    token_logprobs: np.ndarray | None
    tail: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a record's head must say so that its payload can be read."""

    tokens: int  # T
    distinct: int  # ids that occur at all
    bitmap: int  # bytes of the payload's first part


def encode(signal: TokenSignal, spec: SignalSpec, vocab_size: int) -> tuple[Sizes, bytes]:
    """Return a record's payload and what its head must say."""
    num_tokens = len(signal)
    rows, columns = np.nonzero(signal.ids >= 0)
    order = np.argsort(_narrow(signal.ids[rows, columns]), kind="stable")  # by id, then position
    rows, columns = rows[order], columns[order]
    ids = signal.ids[rows, columns].astype(np.int64)
    widths = np.bincount(rows, minlength=num_tokens)
    first = np.flatnonzero(np.diff(ids, prepend=-1))
    uses = np.diff(first, append=len(ids))
    bits = BitWriter()
    bits.put(np.diff(ids[first], prepend=-1) - 1)
    bits.put(uses - 1)
    before = np.append(np.int64(-1), rows[:-1])
    before[first] = -1
    bits.put_rice(rows - before - 1, np.repeat(_gap_widths(uses, num_tokens), uses))
    counts = None if spec.kind == "top" else _counts(signal)[rows, columns].astype(np.int64)
    if counts is not None:
        bits.put(np.delete(counts, _first_of_rows(rows, widths)) - 1)
    if spec.logprobs:
        codes = _quantise(_logprobs(signal)[rows, columns], spec)
        _put_codes(bits, codes, rows, counts, widths, spec)
        _put_rest(bits, signal, widths, spec, vocab_size)
        unlikely = codes
    else:
        assert counts is not None
        unlikely = spec.size - counts
    order = _order(rows, unlikely)
    own = np.flatnonzero((ids == signal.token_ids[rows])[order])
    begins = np.cumsum(widths) - widths
    places = widths.copy()  # one beyond the last: not among them
    places[rows[order[own]]] = own - begins[rows[order[own]]]
    outside = places == widths
    bits.put(places)
    bits.put_bits(signal.token_ids[outside].astype(np.int64), _id_width(vocab_size))
    if spec.logprobs:
        assert signal.token_logprobs is not None
        bits.put(_quantise(signal.token_logprobs[outside], spec))
    bitmap = bits.bitmap()
    return Sizes(num_tokens, len(first), len(bitmap)), bitmap + bits.lows()


def decode(payload: memoryview, sizes: Sizes, spec: SignalSpec, vocab_size: int) -> Entries:
    """Return what `encode` was given, sorted.

    Raises:
        ValueError: the payload's length does not fit its head.
    """
    content = np.frombuffer(payload, dtype=np.uint8)
    bits = BitReader(content[: sizes.bitmap], content[sizes.bitmap :])
    words = np.cumsum(bits.take(sizes.distinct) + 1) - 1
    uses = bits.take(sizes.distinct) + 1
    steps = bits.take_rice(np.repeat(_gap_widths(uses, sizes.tokens), uses)) + 1
    walked = np.cumsum(steps)
    first = np.cumsum(uses) - uses
    rows = walked - np.repeat(walked[first] - steps[first] + 1, uses)
    widths = np.bincount(rows, minlength=sizes.tokens)
    if len(widths) > sizes.tokens:
        raise ValueError("a position beyond the last")
    counts = _take_counts(bits, rows, widths, spec) if spec.kind == "sampled" else None
    codes = rest = None
    if spec.logprobs:
        codes = _take_codes(bits, rows, counts, widths, spec)
        rest = _take_rest(bits, widths > 0, spec)
        unlikely = codes
    else:
        assert counts is not None
        unlikely = spec.size - counts
    places = bits.take(sizes.tokens)
    inside = places < widths
    outside_ids = bits.take_bits(int((~inside).sum()), _id_width(vocab_size))
    outside_codes = bits.take(len(outside_ids)) if spec.logprobs else None
    bits.close()

    order = _order(rows, unlikely)
    ids = np.repeat(words.astype(np.int32), uses)[order]
    begins = np.cumsum(widths) - widths
    own = (begins + places)[inside]
    token_ids = np.empty(sizes.tokens, np.int32)
    token_ids[inside], token_ids[~inside] = ids[own], outside_ids
    logprobs = token_logprobs = tail = None
    if codes is not None and rest is not None and outside_codes is not None:
        logprobs, tail = _scaled(codes[order].astype(np.float32), widths, begins, rest, spec)
        token_logprobs = np.empty(sizes.tokens, np.float32)
        never = outside_codes > FLOOR * spec.resolution
        token_logprobs[inside] = logprobs[own]
        token_logprobs[~inside] = np.where(never, -np.inf, outside_codes / -spec.resolution)
    if counts is not None:
        counts = counts[order].astype(np.int32)
    return Entries(widths, ids, logprobs, counts, token_ids, token_logprobs, tail)


def _first_of_rows(rows: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return which entry is the first one of each filled row: its count is what the others leave of the draws."""
    first = np.zeros(len(widths), np.int64)
    first[rows[::-1]] = np.arange(len(rows))[::-1]  # the last one assigned stays
    return first[widths > 0]


def _take_counts(bits: BitReader, rows: np.ndarray, widths: np.ndarray, spec: SignalSpec) -> np.ndarray:
    first = _first_of_rows(rows, widths)
    counts = np.zeros(len(rows), np.int64)
    others = np.ones(len(rows), bool)
    others[first] = False
    counts[others] = bits.take(len(rows) - len(first)) + 1
    counts[first] = spec.size - np.bincount(rows, counts, len(widths))[widths > 0].astype(np.int64)
    return counts


def _put_codes(
    bits: BitWriter,
    codes: np.ndarray,
    rows: np.ndarray,
    counts: np.ndarray | None,
    widths: np.ndarray,
    spec: SignalSpec,
) -> None:
    if counts is None:
        highest = np.zeros(len(widths), np.int64)
        np.maximum.at(highest, rows, codes)
        bits.put(highest[widths > 0])
        bits.put(highest[rows] - codes)
    else:
        beyond = codes - _expected(counts, spec)
        least = beyond.min(initial=0)
        bits.put_bits(np.array([-least]), OFFSET)
        bits.put(beyond - least)


def _take_codes(
    bits: BitReader, rows: np.ndarray, counts: np.ndarray | None, widths: np.ndarray, spec: SignalSpec
) -> np.ndarray:
    if counts is None:
        highest = np.zeros(len(widths), np.int64)
        highest[widths > 0] = bits.take(int((widths > 0).sum()))
        return highest[rows] - bits.take(len(rows))
    least = -bits.take_number(OFFSET)
    return bits.take(len(rows)) + (_expected(counts, spec) + least)


def _put_rest(bits: BitWriter, signal: TokenSignal, widths: np.ndarray, spec: SignalSpec, vocab_size: int) -> None:
    """Write the log-odds of what each filled row leaves over; 0 says that it leaves nothing."""
    filled = widths > 0
    logprobs = _logprobs(signal)[filled].astype(np.float64)
    logprobs = np.where(np.isneginf(logprobs), logprobs, np.maximum(logprobs, -FLOOR))
    highest = logprobs.max(-1, initial=-FLOOR)
    kept = highest + np.log(np.exp(logprobs - highest[:, None]).sum(-1))
    assert signal.tail is not None
    tail = signal.tail[filled].astype(np.float64)
    odds = np.clip(tail - kept, -FLOOR, FLOOR)
    steps = np.rint(odds * (FINER * spec.resolution)).astype(np.int64)
    # Nothing is left over by a whole vocabulary, whatever float32 makes of its sum: a student has no such outcome.
    some = (tail > -np.inf) & ((widths[filled] < vocab_size) | (tail > np.log(ROUNDING)))
    least = min(steps[some].min(initial=0), 0)
    bits.put_bits(np.array([-least]), OFFSET)
    bits.put(np.where(some, steps - least + 1, 0))


def _take_rest(bits: BitReader, filled: np.ndarray, spec: SignalSpec) -> np.ndarray:
    """Return the log-odds of what each row leaves over: inf for an empty one."""
    least = -bits.take_number(OFFSET)
    steps = bits.take(int(filled.sum()))
    odds = np.full(len(filled), np.inf)
    odds[filled] = np.where(steps > 0, (steps + (least - 1)) / (FINER * spec.resolution), -np.inf)
    return odds


def _scaled(
    codes: np.ndarray, widths: np.ndarray, begins: np.ndarray, odds: np.ndarray, spec: SignalSpec
) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities (M,) whose rows add up to what the odds leave them, and the rest (T,), both float32."""
    tail = -np.logaddexp(0.0, -odds)
    filled = widths > 0
    logprobs = codes * np.float32(-1 / spec.resolution)
    highest, sizes = logprobs[begins[filled]], widths[filled]
    sums = np.add.reduceat(np.exp(logprobs - np.repeat(highest, sizes)), begins[filled]) if len(codes) else highest
    shift = -np.logaddexp(0.0, odds[filled]) - np.log(sums, dtype=np.float64)
    logprobs += np.repeat((shift - highest).astype(np.float32), sizes)
    return np.minimum(logprobs, 0.0, out=logprobs), tail.astype(np.float32)


def _quantise(logprobs: np.ndarray, spec: SignalSpec) -> np.ndarray:
    """Return codes of log-probabilities; one beyond the last stands for -inf."""
    codes = np.rint(np.clip(-logprobs.astype(np.float64), 0.0, FLOOR) * spec.resolution).astype(np.int64)
    return codes + np.isneginf(logprobs)


def _expected(counts: np.ndarray, spec: SignalSpec) -> np.ndarray:
    """Return the code of the share of the draws that fell on each outcome."""
    return np.rint(-np.log(counts / spec.size) * spec.resolution).astype(np.int64)


def _gap_widths(uses: np.ndarray, num_tokens: int) -> np.ndarray:
    """Return the low bits of the gaps between the positions of ids that occur `uses` times each among T.

    Gaps of mean T / uses are about geometric, for which Rice's law is shortest with log2(mean) low bits, rounded down.
    """
    return bit_lengths(num_tokens // uses) - 1


def _order(rows: np.ndarray, unlikely: np.ndarray) -> np.ndarray:
    """Return the order by row, then code, of entries that are sorted by id."""
    order = np.argsort(_narrow(unlikely), kind="stable")
    return order[np.argsort(_narrow(rows)[order], kind="stable")]


def _narrow(values: np.ndarray) -> np.ndarray:
    """Return non-negative integers in as few bits as they fit: numpy sorts up to 16 by radix, many times as fast."""
    return values.astype(np.min_scalar_type(values.max(initial=0)))


def _id_width(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def _logprobs(signal: TokenSignal) -> np.ndarray:
    assert signal.logprobs is not None
    return signal.logprobs


def _counts(signal: TokenSignal) -> np.ndarray:
    assert signal.counts is not None
    return signal.counts
