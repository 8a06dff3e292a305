"""What one vocabulary's tokens are in another: by equal bytes, by being tokenised again, by edit distance.

Everything is made once per pair of vocabularies, in numbers of tokens, and is a sparse array: nothing of size V_S x V_T
exists. Special tokens stand for no text (`align.byte_view`), so they never match by their spelling; who knows which of
them mean the same (`align.specials.special_pairs`) gives them. No method's weights are here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.byte_view import ByteView, encode
from align.kernels.pooling import pool

QUERIES = 512  # tokens whose edit distances to the other vocabulary are held at once


@dataclass(frozen=True, slots=True)
class TokenMap:
    """A sparse matrix of E entries that moves a vocabulary's probability onto C ids of another.

    Attributes:
        sources: (E,) int64, the id that mass comes from.
        targets: (E,) int64, the place in `reached` that it goes to.
        log_weights: (E,) float32, the logarithm of the share that goes there.
        reached: (C,) int64, rising: the other vocabulary's ids that anything goes to.
    """

    sources: Tensor
    targets: Tensor
    log_weights: Tensor
    reached: Tensor

    def push(self, log_mass: Tensor) -> Tensor:
        """Return the logarithms of ``mass @ matrix``: (n, V) -> (n, C), with their gradient."""
        shares = log_mass.index_select(-1, self.sources) + self.log_weights.to(log_mass.dtype)
        return pool(shares, self.targets, len(self.reached))

    def to(self, device: torch.device | str) -> TokenMap:
        """Return the map on another device."""
        return TokenMap(*(part.to(device) for part in (self.sources, self.targets, self.log_weights, self.reached)))


@dataclass(frozen=True, slots=True)
class Matching:
    """Tokens of two vocabularies in pairs, and those left over.

    Attributes:
        student, teacher: (M,) int64 ids, the two of a pair at the same place; no id twice.
        student_alone, teacher_alone: (V_S - M,) and (V_T - M,) int64, rising.
    """

    student: Tensor
    teacher: Tensor
    student_alone: Tensor
    teacher_alone: Tensor

    @property
    def student_size(self) -> int:
        """V_S."""
        return len(self.student) + len(self.student_alone)

    @property
    def teacher_size(self) -> int:
        """V_T."""
        return len(self.teacher) + len(self.teacher_alone)

    def to(self, device: torch.device | str) -> Matching:
        """Return the ids on another device."""
        return Matching(*(p.to(device) for p in (self.student, self.teacher, self.student_alone, self.teacher_alone)))


def exact_matching(student: ByteView, teacher: ByteView, *, specials: Mapping[int, int] | None = None) -> Matching:
    """Return the tokens that stand for the same bytes on both sides, one to one.

    Where several ids of one side stand for the same bytes (sentencepiece's `<0x41>` and `A`), the highest are paired
    first: sentencepiece numbers its byte pieces before the ones that it prefers.

    Args:
        specials: student id -> teacher id of tokens that mean the same, whatever text they stand for.
    """
    named = dict(specials or {})
    taken = set(named.values())
    theirs = by_bytes(teacher)
    pairs = list(named.items())
    for text, ids in by_bytes(student).items():
        own = [token for token in reversed(ids) if token not in named]
        pairs.extend(zip(own, (token for token in reversed(theirs.get(text, [])) if token not in taken), strict=False))
    return matching(pairs, len(student), len(teacher))


def matching(pairs: Sequence[tuple[int, int]], student_size: int, teacher_size: int) -> Matching:
    """Return (student id, teacher id) pairs, in which no id is twice, with the ids left over."""
    both = torch.tensor(sorted(pairs), dtype=torch.int64).reshape(-1, 2)
    alone = []
    for ids, size in zip(both.unbind(-1), (student_size, teacher_size), strict=True):
        free = torch.ones(size, dtype=torch.bool).index_fill_(0, ids, False)
        assert int(free.sum()) == size - len(ids), "an id is in two pairs"
        alone.append(free.nonzero()[:, 0])
    return Matching(both[:, 0].contiguous(), both[:, 1].contiguous(), *alone)


def by_bytes(view: ByteView) -> dict[bytes, list[int]]:
    """Return the ids that stand for each text, rising; tokens without bytes are left out."""
    ids = defaultdict(list)
    for token, text in enumerate(view.tokens):
        if text:
            ids[text].append(token)
    return dict(ids)


def tokenised_again(pieces: Sequence[bytes], view: ByteView, *, tokenizer: Any = None) -> list[list[int]]:
    """Return each piece of text as tokens of another vocabulary; an empty list where it has none for some byte.

    Args:
        view: the other vocabulary.
        tokenizer: its tokenizer. Without one, for half characters and for what it changes, the longest token comes
            first, again and again: for about one token in twelve the tokenizer itself would begin otherwise.
    """
    known = {text: ids[-1] for text, ids in by_bytes(view).items()}
    longest = max(map(len, known), default=0)
    found = []
    for piece in pieces:
        ids = None
        if tokenizer is not None and (text := _text(piece)) is not None:
            ids = encode(tokenizer, view, text, continued=True)
        found.append(_longest_first(piece, known, longest) if ids is None else ids)
    return found


def nearest_by_edits(pieces: Sequence[bytes], view: ByteView) -> np.ndarray:
    """Return the token of `view` with the fewest edits to each piece, (len(pieces),) int64.

    Edits are insertions, deletions and substitutions of characters, a byte outside a character counting as one. Of
    equally near tokens the one of the nearest length, of these the lowest id. Tokens are compared by rising difference
    in length, which bounds the distance from below, so that most pairs are never looked at.

    Raises:
        ValueError: `view` has no token that stands for text.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    choices, queries = defaultdict(list), defaultdict(list)
    for text, ids in by_bytes(view).items():
        spelling = text.decode(errors="surrogateescape")
        choices[len(spelling)].append((ids[-1], spelling))
    if not choices:
        raise ValueError("the vocabulary has no token that stands for text")
    for place, piece in enumerate(pieces):
        spelling = piece.decode(errors="surrogateescape")
        queries[len(spelling)].append((place, spelling))
    nearest = np.zeros(len(pieces), np.int64)
    for length, all_asked in queries.items():
        furthest = max(abs(length - other) for other in choices)
        for start in range(0, len(all_asked), QUERIES):
            asked = all_asked[start : start + QUERIES]
            places = np.array([place for place, _ in asked])
            spellings = np.array([spelling for _, spelling in asked], dtype=object)
            best = np.full(len(asked), np.iinfo(np.int32).max)
            for gap in range(furthest + 1):
                open_ = np.flatnonzero(best > gap)
                near = sorted(pair for other in {length - gap, length + gap} for pair in choices.get(other, ()))
                if not len(open_):
                    break
                if not near:
                    continue
                edits = cdist(spellings[open_], [word for _, word in near], scorer=Levenshtein.distance, dtype=np.int32)
                column = edits.argmin(1)
                least = edits[np.arange(len(open_)), column]
                better = least < best[open_]
                best[open_[better]] = least[better]
                nearest[places[open_[better]]] = np.array([token for token, _ in near])[column[better]]
    return nearest


def _longest_first(piece: bytes, known: dict[bytes, int], longest: int) -> list[int]:
    tokens, begin = [], 0
    while begin < len(piece):
        for end in range(min(len(piece), begin + longest), begin, -1):
            if (token := known.get(piece[begin:end])) is not None:
                break
        else:
            return []
        tokens.append(token)
        begin = end
    return tokens


def _text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None
