"""A teacher's stored numbers as training reads them: for each batch, what it said of exactly the trained tokens.

The folder (`distill.signals`) is memory-mapped, and nothing is read before a batch needs it: the numbers of a run may
be larger than memory. `distill.dataset` asks for a trace's tokens, so that the student is trained on those that the
numbers belong to; `distill.batch.collate` asks for the rows. An object of this module goes to a data loader's workers
by its path: each opens the folder for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.batch import TeacherRows
from distill.errors import RunError, UserError
from distill.models import fingerprint
from distill.render import Example
from distill.signals import SignalReader


class SignalData:
    """A folder of signals, for a student of the tokenizer that its ids belong to, or of another one.

    In the second case the examples name the teacher's tokens (`Example.other`), and the numbers of those in spans are
    given, span after span.
    """

    def __init__(
        self, folder: Path, tokenizer: Any, *, num_outcomes: int, teacher_tokenizer: Any | None = None
    ) -> None:
        """Open a folder.

        Args:
            tokenizer: the student's.
            num_outcomes: rows of the student's output embedding.
            teacher_tokenizer: the one that the ids belong to, where it is another than the student's.

        Raises:
            UserError: no signals there, damaged ones, or those of another tokenizer.
        """
        self.folder, self.num_tokens = folder, len(tokenizer if teacher_tokenizer is None else teacher_tokenizer)
        if teacher_tokenizer is not None:
            if self.reader.tokenizer != fingerprint(teacher_tokenizer):
                raise UserError(
                    f"{folder} holds the numbers of {self.reader.teacher}, made with another tokenizer than the "
                    "teacher's that was given: its token ids mean other texts. Name its own with --teacher-tokenizer"
                )
            return
        if self.reader.tokenizer != fingerprint(tokenizer):
            raise UserError(
                f"{folder} holds the numbers of {self.reader.teacher}, whose tokenizer is not the student's: its token "
                "ids mean other texts. Take a student of that tokenizer, or learn across tokenizers with --align"
            )
        if num_outcomes < self.num_tokens:
            raise UserError(
                f"the student has {num_outcomes} output embeddings for a tokenizer of {self.num_tokens} tokens: they "
                "do not belong together, or the embeddings must be resized"
            )

    @cached_property
    def reader(self) -> SignalReader:
        """The folder, mapped into this process."""
        return SignalReader(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "reader"}

    def tokens(self, uid: str) -> np.ndarray | None:
        """Return the tokens (T,) that a trace's numbers speak of; None where it has none."""
        try:
            return self.reader.gather([uid]).token_ids[0]
        except KeyError:
            return None

    def rows(self, examples: Sequence[Example]) -> TeacherRows:
        """Return what the teacher said of the trained tokens of some examples, one after another.

        Raises:
            RunError: the numbers are no longer those of the examples' tokens.
            UserError: a damaged record.
        """
        uids = [example.uid for example in examples]
        assert all(uid is not None for uid in uids), "examples are made with `load_examples(..., signals=...)`"
        found = self.reader.gather([str(uid) for uid in uids])
        chosen = np.zeros(found.token_ids.shape, bool)
        across = any(example.other is not None for example in examples)
        for row, example in enumerate(examples):
            own, trained = _spoken_of(example)
            # A folder that was written to since would answer with the numbers of other tokens.
            if len(own) > found.lengths[row] or (found.token_ids[row, : len(own)] != own).any():
                raise RunError(f"the numbers of {example.uid} in {self.folder} changed while they were being learnt")
            chosen[row, : len(own)] = trained
        ids = found.ids[chosen].astype(np.int64)
        every = (found.logprobs, found.counts, found.tail, found.token_logprobs if across else None)
        numbers = [None if values is None else values[chosen] for values in every]
        if ids.max(initial=-1) >= self.num_tokens:
            ids, *numbers = _without_padding(ids, *numbers, num_tokens=self.num_tokens)
        logprobs, counts, tail, realised = (None if each is None else torch.from_numpy(each) for each in numbers)
        if counts is None:
            return TeacherRows(torch.from_numpy(ids), logprobs, tail=tail, realised=realised)
        # Of draws the rest is not asked.
        return TeacherRows(torch.from_numpy(ids), logprobs, counts.to(torch.int64), realised=realised)


def _without_padding(
    ids: np.ndarray,
    logprobs: np.ndarray | None,
    counts: np.ndarray | None,
    tail: np.ndarray | None,
    realised: np.ndarray | None,
    *,
    num_tokens: int,
) -> tuple[np.ndarray | None, ...]:
    """Take ids that are no token out of rows (N, K): a teacher's output embedding may be padded beyond its tokenizer.

    As everywhere, a distribution is one over tokens. The places are left empty, at the end; what is there of mass is
    what logits beyond the tokens have, so what was listed, the tail (N,) and the token that came (N,) are scaled up to
    one without it, and draws that fell there are no draws.

    Raises:
        UserError: a row says nothing of any token.
    """
    out = ids >= num_tokens
    order = np.argsort(out | (ids < 0), axis=-1, kind="stable")
    moved = np.take_along_axis(out, order, -1)
    ids = np.where(moved, -1, np.take_along_axis(ids, order, -1))
    said = np.full(ids.shape, -np.inf) if logprobs is None else logprobs.astype(np.float64)
    lost = np.where(out, np.exp(said), 0.0).sum(-1, keepdims=True)
    if (ids[:, 0] < 0).any() or (lost >= 1).any():
        raise UserError(f"a place's numbers speak of nothing but ids beyond the {num_tokens} tokens of their tokenizer")
    if counts is not None:
        counts = np.where(moved, 0, np.take_along_axis(counts, order, -1))
    if logprobs is not None:
        logprobs = np.take_along_axis(logprobs, order, -1)
        kept = -np.log1p(-lost)
        logprobs = np.where(moved, -np.inf, logprobs + kept).astype(logprobs.dtype)
        tail, realised = (None if each is None else (each + kept[:, 0]).astype(each.dtype) for each in (tail, realised))
    return ids, logprobs, counts, tail, realised


def _spoken_of(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens (T,) that an example's numbers speak of, and which of them are asked for."""
    if example.other is None:
        return example.input_ids[example.begin :], example.weights[example.begin :] > 0
    own = example.other.input_ids[example.other.begin :]
    asked = np.zeros(len(own), bool)
    for begin, end in example.other.spans[:, 2:] - example.other.begin:
        asked[begin:end] = True
    return own, asked
