"""Near-duplicates by MinHash: which traces have nearly the same word 5-shingles (Broder 1997).

A signature of `PERMUTATIONS` numbers stands for the set of a text's shingles: the share of places where two signatures
agree estimates the Jaccard similarity of the sets, with a standard error of at most 4.5 %. Pairs worth comparing are
found by equal bands of signatures (locality-sensitive hashing), so no two texts are ever held at once: 512 bytes for
each trace are. Signs of formulas are folded, numbers are not: two chains that differ in their numbers are not the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from teachers.filters.shingles import grams, mixed, words

SHINGLE = 5  # words
PERMUTATIONS = 128
RECALL = 0.999  # chance that a pair at the threshold shares at least one band
# x -> factor x + offset modulo 2^32 with odd factors: permutations of the 32-bit numbers that shingles are hashed to.
_FACTORS = mixed(np.arange(PERMUTATIONS, dtype=np.uint64)).astype(np.uint32) | np.uint32(1)
_OFFSETS = mixed(np.arange(PERMUTATIONS, 2 * PERMUTATIONS, dtype=np.uint64)).astype(np.uint32)


def signature(text: str) -> np.ndarray:
    """Return the MinHash signature of a text, (PERMUTATIONS,) uint32; the same on every machine."""
    tokens = words(text) or [" ".join(text.split())]
    shingles = grams(tokens, min(SHINGLE, len(tokens))).astype(np.uint32)
    smallest = np.empty(PERMUTATIONS, dtype=np.uint32)
    permuted = np.empty_like(shingles)
    for row in range(PERMUTATIONS):  # one row at a time stays in the cache
        np.multiply(shingles, _FACTORS[row], out=permuted)
        np.add(permuted, _OFFSETS[row], out=permuted)
        smallest[row] = permuted.min()
    return smallest


def similarity(one: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Return the estimated Jaccard similarity of one signature with each of many, (many,) in [0, 1]."""
    return (many == one).mean(axis=-1)


def near_duplicates(signatures: np.ndarray, ranks: Sequence[Any], threshold: float) -> list[int]:
    """Return the rows to leave out so that no two of the rest are known to be near-duplicates.

    Rows are gone through by rank: one that is similar to an earlier row that stays is left out. So the lowest rank
    always stays, each row left out has a near-duplicate that stays, and the order of the rows does not matter.

    Args:
        signatures: (traces, PERMUTATIONS) uint32.
        ranks: one for each row, no two equal.
        threshold: estimated Jaccard similarity from which two traces are the same, in (0, 1].
    """
    groups = _groups(signatures, rows_per_band(threshold))
    staying: dict[tuple[int, int], list[int]] = {}  # (band, group) -> rows that stay
    left_out = []
    for row in sorted(range(len(signatures)), key=lambda row: ranks[row]):
        bands = [(band, group) for band, group in enumerate(groups[row].tolist()) if group >= 0]
        others = sorted({other for band in bands for other in staying.get(band, ())})
        if others and similarity(signatures[row], signatures[others]).max() >= threshold:
            left_out.append(row)
            continue
        for band in bands:
            staying.setdefault(band, []).append(row)
    return left_out


def rows_per_band(threshold: float) -> int:
    """Return the widest band with which a pair at the threshold still shares one with probability `RECALL`."""
    widths = [1 << power for power in range(PERMUTATIONS.bit_length())]
    return max(
        (width for width in widths if 1 - (1 - threshold**width) ** (PERMUTATIONS // width) >= RECALL), default=1
    )


def _groups(signatures: np.ndarray, width: int) -> np.ndarray:
    """Return for each row and band the number of its group of rows with that very band, or -1 for a group of one."""
    count = len(signatures)
    groups = np.full((count, PERMUTATIONS // width), -1, dtype=np.int32)
    for band in range(groups.shape[1]):
        named = np.zeros(count, dtype=np.uint64)
        for column in range(band * width, (band + 1) * width):
            named = mixed(named ^ signatures[:, column])
        _, which, sizes = np.unique(named, return_inverse=True, return_counts=True)
        groups[:, band] = np.where(sizes[which] > 1, which, -1)
    return groups
