"""Spans of several tokens as one row or one number each, by the chain rule.

The probability of a span is the product of its tokens'. Its *last row* times the probability of the tokens before the
last (the *prior*, which were realised) is the distribution over how the span may end, as a part of all that could have
happened: what one side says of a span is then a row, whichever way it splits it.

Rows here are right-shifted as everywhere in this package: row i predicts token i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.kernels.teacher_rows import Teacher
from distill.errors import UserError
from distill.supports import check_width


def span_sums(values: Tensor, span: Tensor, spans: int) -> Tensor:
    """Return ``(spans,)`` sums of token values (n,) by the span (n,) int64 that each is in."""
    return values.new_zeros(spans).index_add(0, span, values)


def last_rows(span: Tensor, spans: int) -> Tensor:
    """Return ``(spans,)`` int64, the place of each span's last token; every span has one, in order of the text."""
    return torch.searchsorted(span, torch.arange(spans, device=span.device), right=True) - 1


def priors(token_logp: Tensor, span: Tensor, spans: int) -> Tensor:
    """Return ``(spans,)`` log-probabilities of the tokens before each span's last, 0 for spans of one token.

    Args:
        token_logp: (n,) log-probabilities of the realised tokens, with their graph where it is wanted.
        span: (n,) int64, rising, the span each token is in.
    """
    before = torch.ones_like(span, dtype=torch.bool).index_fill_(0, last_rows(span, spans), False)
    return span_sums(token_logp.masked_fill(~before, 0.0), span, spans)


def student_rows(logits: Tensor, width: int, prior: Tensor | None = None) -> Tensor:
    """Return ``(n, width)`` log-masses: the log-softmax of the first `width` logits, times the prior (n,).

    Args:
        logits: (n, V), already divided by a temperature; what is behind `width` is padding.

    Raises:
        UserError: there are fewer logits than tokens.
    """
    check_width("student", logits.shape[-1], width)
    wide = logits[:, :width].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return wide if prior is None else wide + prior[:, None]


def teacher_rows(teacher: Teacher, method: str, prior: Tensor | None = None) -> Tensor:
    """Return ``(n, V_T)`` log-masses of a teacher of which everything is known, times the prior (n,); no gradient.

    Raises:
        UserError: only its most likely outcomes were stored.
    """
    if teacher.logp is None:
        raise UserError(
            f"{method} needs the teacher's whole distribution, and only its most likely tokens were stored: "
            "name a running teacher, or an alignment that lives with top-k"
        )
    rows = teacher.logp.detach()
    return rows if prior is None else rows + prior.detach()[:, None]
