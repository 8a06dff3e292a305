"""What a method across vocabularies is to the engine: an entry of `align.methods.METHODS`, and a tokenizer pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from align.pairing import Side

# What a teacher must say: all its logits, its most likely tokens at least, or only the log-probabilities of given ones.
Needs = Literal["logits", "top_logprobs", "realised"]


@dataclass(frozen=True)
class Pair:
    """A student's and a teacher's tokenizer.

    Attributes:
        student, teacher: either side.
        specials: student id -> teacher id of special tokens that mean the same (`align.specials.special_pairs`).
    """

    student: Side
    teacher: Side
    specials: Mapping[int, int]

    @property
    def tokenizers(self) -> tuple[Any, Any]:
        """The student's and the teacher's."""
        return self.student.tokenizer, self.teacher.tokenizer

    @property
    def stops(self) -> tuple[list[int], list[int]]:
        """The ids that end an answer, rising, the student's first."""
        return sorted(self.student.stops), sorted(self.teacher.stops)

    @cached_property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """(V_S,) and (V_T,) int64, the bytes of each token; 0 where it stands for no text."""
        own, theirs = (
            np.array([len(token or b"") for token in side.view.tokens], np.int64)
            for side in (self.student, self.teacher)
        )
        return own, theirs


@dataclass(frozen=True, slots=True)
class Method:
    """How two models of different vocabularies are compared.

    Attributes:
        kind: what `compare` is called with, and when.
            "rows": ``f(pair, tables, places, batch, *, options) -> [align.engine.rows.Comparison]``, before a batch's
            loss.
            "merged": ``f(student_logits (S, V_S), teacher of S rows, tables, *, student_prior (S,), teacher_prior (S,),
            options) -> (S,)``: the last row of each span, with the log-probability of its tokens before.
            "states": ``f(student Rows, teacher Rows, weights (R,), modules, *, chunk_tokens, options)
            -> total, metrics``: R rows of hidden states with their heads, `align.methods.dskd.Rows`.
            "spans": ``f(student_logp (S,), teacher_logp (S,), *, options) -> (S,)``.
            "advantages": ``f(student_logp (S,), teacher_logp (S,), token_logp (n,), span (n,), *, options)
            -> Advantages`` of n tokens,
            on the student's own completions only.
        compare: that function; its keyword-only arguments are the method's options.
        needs: the least that a teacher must say.
        about: one line for a person.
        tables: ``f(pair, *, options)``: what is worked out once for a pair, with ``to(device)``; None has none. For
            states: ``f(student_model, teacher_model, *, options)``, a module that is trained beside the student.
        labelled: whether the text's own tokens take part, as this method has them by default.
    """

    kind: Literal["rows", "merged", "states", "spans", "advantages"]
    compare: Callable[..., Any]
    needs: Needs
    about: str
    tables: Callable[..., Any] | None = None
    labelled: bool = False
