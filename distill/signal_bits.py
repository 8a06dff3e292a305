"""Sequences of small integers as bits: what the records of `distill.signal_record` are made of; any number at once.

A number is written as a prefix in unary (so many zeros, then a one) and some low bits as they are. Two laws say how it
is split. Rice's (1979; Golomb's, IEEE Trans. Inf. Theory 1966, with a power of two) keeps a fixed number of low bits
and suits numbers that thin out geometrically, as the gaps of a random set do: it takes 0.03 to 0.08 bits more than the
entropy of these. The exponential law (Teuhola, Inf. Process. Lett. 1978) adds as many low bits as its prefix says and
suits what thins out slower, as the frequencies of words do. `BitWriter.put` tries both and keeps the shorter.

All prefixes of a record stand in one bitmap and all low bits behind it, so that reading it is a handful of operations
on whole arrays: no Python loop runs over numbers.
"""

from __future__ import annotations

import numpy as np

WIDEST = 57  # low bits of one number: what eight bytes hold from any bit of the first one on
_LAW_BITS = 6  # of which the highest one says which law
_EXPONENTIAL = 1 << (_LAW_BITS - 1)


class BitWriter:
    """Collects sequences of non-negative integers; `bitmap` and `lows` are what `BitReader` takes."""

    def __init__(self) -> None:
        self._prefixes: list[np.ndarray] = []
        self._lows: list[np.ndarray] = []
        self._widths: list[np.ndarray] = []

    def put_bits(self, values: np.ndarray, width: int) -> None:
        """Add numbers below 2 ** width, without a prefix."""
        self._low(values, np.full(len(values), width))

    def put_rice(self, values: np.ndarray, widths: np.ndarray) -> None:
        """Add numbers by Rice's law, each with its own number of low bits, which the reader must know."""
        self._prefixes.append(values >> widths)
        self._low(values, widths)

    def put(self, values: np.ndarray) -> None:
        """Add numbers below 2 ** 40, by whichever law is shortest; which one it was is written in front."""
        if not len(values):
            return
        law = _best_law(values)
        self.put_bits(np.array([law]), _LAW_BITS)
        order = law % _EXPONENTIAL
        if law < _EXPONENTIAL:
            return self.put_rice(values, np.full(len(values), order))
        raised = values + (1 << order)
        prefixes = bit_lengths(raised) - 1 - order
        self._prefixes.append(prefixes)
        self._low(raised, prefixes + order)

    def _low(self, values: np.ndarray, widths: np.ndarray) -> None:
        self._lows.append(values)
        self._widths.append(widths)

    def bitmap(self) -> bytes:
        """Return all prefixes."""
        prefixes = _joined(self._prefixes)
        bits = np.zeros(len(prefixes) + int(prefixes.sum()), np.uint8)
        bits[np.cumsum(prefixes + 1) - 1] = 1
        return np.packbits(bits, bitorder="little").tobytes()

    def lows(self) -> bytes:
        """Return all low bits."""
        values, widths = _joined(self._lows), _joined(self._widths)
        ends = np.cumsum(widths)
        places = np.arange(int(widths.sum())) - np.repeat(ends - widths, widths)
        return np.packbits((np.repeat(values, widths) >> places & 1).astype(np.uint8), bitorder="little").tobytes()


class BitReader:
    """Takes apart what `BitWriter` put together, in the same order; too little or too much is a ValueError."""

    def __init__(self, bitmap: np.ndarray, lows: np.ndarray) -> None:
        """Take the two parts, as uint8."""
        ends = np.unpackbits(bitmap, bitorder="little").view(bool).nonzero()[0]
        self._prefixes = ends.copy()
        self._prefixes[1:] -= ends[:-1] + 1
        self._taken = self._bit = 0
        self._bits = 8 * len(lows)
        padded = np.zeros(len(lows) + 8, np.uint8)
        padded[:-8] = lows
        self._words = np.ndarray((len(lows) + 1,), "<u8", padded, strides=(1,))  # eight bytes from every byte on

    def take_bits(self, count: int, width: int) -> np.ndarray:
        """Return the next `count` numbers that `put_bits` wrote."""
        starts = np.arange(self._bit, self._bit + count * width, width) if width else np.zeros(count, np.int64)
        return self._low(starts, count * width, (1 << width) - 1)

    def take_number(self, width: int) -> int:
        """Return the next number, written by `put_bits`, by itself."""
        begin, self._bit = self._bit, self._bit + width
        if self._bit > self._bits:
            raise ValueError("fewer bits than there should be")
        return int(self._words[begin >> 3]) >> (begin & 7) & ((1 << width) - 1)

    def take_rice(self, widths: np.ndarray) -> np.ndarray:
        """Return the next numbers that `put_rice` wrote."""
        return self._prefix(len(widths)) << widths | self._lows(widths)

    def take(self, count: int) -> np.ndarray:
        """Return the next `count` numbers that `put` wrote."""
        if not count:
            return np.zeros(0, np.int64)
        law = self.take_number(_LAW_BITS)
        order = law % _EXPONENTIAL
        if law < _EXPONENTIAL:
            return self._prefix(count) << order | self.take_bits(count, order)
        widths = self._prefix(count) + order
        if widths.max() > WIDEST:
            raise ValueError("a number that is too large")
        return (1 << widths) + self._lows(widths) - (1 << order)

    def close(self) -> None:
        """Check that nothing is left."""
        if self._taken != len(self._prefixes) or -(-self._bit // 8) * 8 != self._bits:
            raise ValueError("more numbers than there should be")

    def _prefix(self, count: int) -> np.ndarray:
        begin, self._taken = self._taken, self._taken + count
        if self._taken > len(self._prefixes):
            raise ValueError("fewer numbers than there should be")
        return self._prefixes[begin : self._taken]

    def _lows(self, widths: np.ndarray) -> np.ndarray:
        ends = widths.cumsum()
        return self._low(ends - widths + self._bit, int(ends[-1]) if len(ends) else 0, (1 << widths) - 1)

    def _low(self, starts: np.ndarray, taken: int, mask: np.ndarray | int) -> np.ndarray:
        self._bit += taken
        if self._bit > self._bits:
            raise ValueError("fewer bits than there should be")
        # No more than 57 bits are wanted, so the sign that a shift would bring in is masked away.
        return self._words.take(starts >> 3).view("<i8") >> (starts & 7) & mask


def _best_law(values: np.ndarray) -> int:
    """Return the law by which the numbers take the fewest bits."""
    distinct, times = np.unique(values, return_counts=True)
    highest = min(int(distinct[-1]).bit_length() + 1, _EXPONENTIAL)
    rice, exponential = [], []
    for order in range(highest):
        prefixes = bit_lengths(distinct + (1 << order)) - 1 - order
        rice.append(order * len(values) + int(times @ (distinct >> order)))
        exponential.append(order * len(values) + 2 * int(times @ prefixes))
    if min(rice) <= min(exponential):
        return int(np.argmin(rice))
    return _EXPONENTIAL + int(np.argmin(exponential))


def bit_lengths(values: np.ndarray) -> np.ndarray:
    """Return the bits that non-negative integers below 2 ** 53 need."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])
