"""A world small enough to know everything: a model of bytes over short texts, and the exact models of its tokens.

A text is up to `longest` letters and then ends; its probability is a product of random conditionals on the letters
before it. A tokenizer's exact model gives each next token its share of the texts whose canonical tokenisation begins
like that. So a student and a teacher with different tokenizers can both be *perfect*, every probability is a finite
sum, and whatever a method then still compares as different is the method's own bias.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from align.byte_view import ByteView, byte_view
from align.kernels.cell_rows import Tables, interior_rows, root_rows
from align.kernels.covered_rows import Covered, covered_rows
from align.kernels.prefixes import Pairs
from align.kernels.prefixes import interior_rows as boundaries
from align.kernels.teacher_rows import Teacher
from align.methods import bpm, cspc, shared_kl
from align.spans import Spans, spans_of
from distill.divergences import DIVERGENCES

END = "<end>"


def random_tokenizer(letters: str, merges: int, seed: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of the letters, `<end>`, and some random merges of what is there."""
    draw = np.random.default_rng(seed)
    tokens, rules = [*letters], []
    while len(rules) < merges:
        first, second = (tokens[i] for i in draw.integers(len(tokens), size=2))
        if first + second not in tokens and len(first + second) <= 4:
            rules.append((first, second))
            tokens.append(first + second)
    order = draw.permutation(len(tokens) + 1)
    vocabulary = {token: int(index) for token, index in zip([END, *tokens], order, strict=True)}
    tokenizer = Tokenizer(models.BPE(vocabulary, rules))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def random_texts(letters: str, longest: int, seed: int, *, sharpness: float = 1.0) -> dict[str, float]:
    """Return all texts with their probabilities; the larger the sharpness the more some letters are preferred."""
    draw = np.random.default_rng(seed)
    texts: dict[str, float] = {}
    begun = {"": 1.0}
    tables: dict[str, np.ndarray] = {}
    for length in range(longest + 1):
        longer = {}
        for text, mass in begun.items():
            scores = tables.setdefault(text[-2:], sharpness * draw.normal(size=len(letters) + 1))
            shares = np.exp(scores) / np.exp(scores).sum() if length < longest else np.eye(len(letters) + 1)[-1]
            longer.update({text + letter: mass * share for letter, share in zip(letters, shares, strict=False)})
            texts[text] = mass * shares[-1]
        begun = {text: mass for text, mass in longer.items() if mass > 0}
    return texts


@dataclass
class ExactModel:
    """The model of a tokenizer's tokens that gives texts exactly the probabilities they have."""

    tokenizer: Tokenizer
    texts: dict[str, float]
    view: ByteView = field(init=False)
    end: int = field(init=False)
    _next: dict[tuple[int, ...], np.ndarray] = field(init=False)
    _mass: dict[tuple[int, ...], float] = field(init=False)

    def __post_init__(self) -> None:
        self.view, self.end = byte_view(self.tokenizer), self.tokenizer.token_to_id(END)
        masses: dict[tuple[int, ...], np.ndarray] = defaultdict(lambda: np.zeros(len(self.view)))
        for text, mass in self.texts.items():
            ids = (*self.ids(text), self.end)
            for place, token in enumerate(ids):
                masses[ids[:place]][token] += mass
        self._mass = {begun: float(each.sum()) for begun, each in masses.items()}
        self._mass |= {(*self.ids(text), self.end): mass for text, mass in self.texts.items()}
        self._next = {begun: each / each.sum() for begun, each in masses.items() if each.sum() > 0}

    def ids(self, text: str) -> tuple[int, ...]:
        """Return the canonical tokens of a text."""
        return tuple(token.id for token in self.tokenizer.model.tokenize(text))

    def mass(self, begun: tuple[int, ...]) -> float:
        """Return the probability of all texts whose tokens, with the end, begin like that."""
        return self._mass[begun]

    def probabilities(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield every beginning of tokens with the (V,) probabilities of the next, float64."""
        for begun, row in self._next.items():
            yield begun, torch.from_numpy(row)

    def rows(self, text: str) -> Tensor:
        """Return (T + 1, V) log-probabilities, float64: before each token of a text, and before its end."""
        ids = self.ids(text)
        return torch.tensor(np.stack([self._next[ids[:place]] for place in range(len(ids) + 1)])).log()


class Aligned(NamedTuple):
    """One text in both tokenisations, as a method sees it.

    Attributes:
        student, teacher: the rows of either model.
        roots: (S + 1, 2) rows at boundaries of both sides, the end's last.
        pairs, covered: boundaries inside tokens; the roots but the first, with the tokens that end there.
    """

    text: str
    mass: float
    student: Tensor
    teacher: Tensor
    spans: Spans
    roots: Tensor
    pairs: Pairs
    covered: Covered


def aligned(student: ExactModel, teacher: ExactModel) -> Iterator[Aligned]:
    """Yield every text with its alignment."""
    for text, mass in student.texts.items():
        if mass == 0:
            continue
        ids = [np.array(model.ids(text), np.int64) for model in (student, teacher)]
        pieces = [model.view.of(own.tolist()) for model, own in zip((student, teacher), ids, strict=True)]
        spans = spans_of(pieces[0], pieces[1])
        lengths = [np.array([len(piece) for piece in side], np.int64) for side in pieces]
        inner = boundaries(spans.student, spans.teacher, lengths[0], lengths[1])
        token = np.where(
            inner.coarser,
            ids[0][inner.student] if text else inner.student,
            ids[1][inner.teacher] if text else inner.teacher,
        )
        starts = np.stack([np.append(side[:, 0], len(own)) for side, own in zip(spans, ids, strict=True)], -1)
        pairs = Pairs(*map(torch.from_numpy, (inner.student, inner.teacher, token, inner.cut, inner.coarser)))
        roots = torch.from_numpy(starts)
        own, others = roots[1:].T
        tokens = [torch.from_numpy(side)[rows - 1] for side, rows in zip(ids, (own, others), strict=True)]
        covered = Covered(own, others, own - 1, others - 1, *tokens)
        yield Aligned(text, mass, student.rows(text), teacher.rows(text), spans, roots, pairs, covered)


class Bias(NamedTuple):
    """What a method makes of a perfect student and of a wrong one, means per row; total variation, in [0, 1].

    Attributes:
        root, inside: of the perfect student at root rows and at boundaries inside tokens: the method's bias.
        wrong: of a student that is perfect for another distribution of texts, over all those rows.
        exact: of that student's tokens against the perfect one's at root rows: all there is to see.
    """

    root: float
    inside: float
    wrong: float
    exact: float


def bias(student: ExactModel, teacher: ExactModel, wrong: ExactModel, tables: Tables, *, covered: bool = False) -> Bias:
    """Return a method's bias over all texts, each weighted with its probability.

    Args:
        covered: compare what both say of the next bytes, `align.kernels.covered_rows`, wherever a token has ended.
    """
    sums = dict.fromkeys(("root", "inside", "wrong", "exact"), 0.0)
    roots = inner = 0.0
    for each in aligned(student, teacher):
        who, (own, others) = Teacher(logp=each.teacher), each.roots.T
        other = wrong.rows(each.text)
        pairs = _known(each.pairs, tables)

        def values(rows: Tensor, each=each, who=who, own=own, others=others, pairs=pairs) -> tuple[Tensor, Tensor]:
            alone = 1 if covered else len(own)
            root = root_rows(rows[own[:alone]], who.rows(others[:alone]), tables, divergence="tvd")
            if covered:
                root = torch.cat([root, covered_rows(rows, who, tables, each.covered, divergence="tvd")])
            return root.sum(), interior_rows(rows, who, tables, pairs, divergence="tvd").sum()

        right, late = values(each.student), values(other)
        sums["root"] += each.mass * right[0].item()
        sums["inside"] += each.mass * right[1].item()
        sums["wrong"] += each.mass * (late[0] + late[1]).item()
        sums["exact"] += each.mass * DIVERGENCES["tvd"](other[own], each.student[own]).sum().item()
        roots, inner = roots + each.mass * len(own), inner + each.mass * len(pairs.cut)
    return Bias(
        sums["root"] / roots, sums["inside"] / max(inner, 1e-9), sums["wrong"] / (roots + inner), sums["exact"] / roots
    )


def _known(pairs: Pairs, tables: Tables) -> Pairs:
    """Return the boundaries that a method has rows for."""
    known = torch.zeros_like(pairs.coarser)
    for coarser, inside in ((False, tables.finer), (True, tables.coarser)):
        if inside is not None:
            known |= pairs.coarser == coarser
    return Pairs(*(part[known] for part in pairs))


def bias_table(worlds: int = 6, longest: int = 4) -> str:
    """Return every method's bias in random worlds as a Markdown table."""
    methods = {
        "shared tokens and the rest": shared_kl.tables,
        "BPM": bpm.tables,
        "CSPC, plain roots": cspc.tables,
        "CSPC": cspc.tables,
    }
    lines = [
        "| student's merges, teacher's | method | bias at root rows | inside tokens | a wrong student | exactly |",
        "|---|---|---|---|---|---|",
    ]
    for merges in ((6, 6), (2, 10), (10, 2)):
        for name, tables_of in methods.items():
            found = []
            for seed in range(worlds):
                texts, others = (random_texts("abc", longest, seed + 1000 * n) for n in range(2))
                own, teachers = (random_tokenizer("abc", n, seed + 100 * side) for side, n in enumerate(merges))
                student, teacher = ExactModel(own, texts), ExactModel(teachers, texts)
                tables = tables_of(own, teachers, stops=([student.end], [teacher.end]))
                found.append(bias(student, teacher, ExactModel(own, others), tables, covered=name == "CSPC"))
            means = (f"{mean:.3f}" for mean in np.mean(found, 0))
            lines.append(f"| {merges[0]}, {merges[1]} | {name} | {' | '.join(means)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(bias_table())
