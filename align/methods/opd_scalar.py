"""On-policy rewards from realised log-probabilities: what a teacher thinks of each span the student wrote.

The student's tokens are rewarded with what the teacher, and no other row of it, says of the same text: the policy
gradient of the reverse KL (`distill.losses.on_policy`, kind ``policy_gradient``) with spans in the place of tokens. It
needs the teacher's log-probabilities of given tokens only, as any API returns them.

* `opd_scalar` is the advantage of a span: log P_T - log P_S, DPCA (arXiv 2606.09456). With a *weak reference*, a small
  model R of the teacher's family, it is CompassOPD's (arXiv 2609.10154): log P_T - log P_R less
  alpha (log P_S - log P_0), P_0 the student as it was. What the two families disagree about anyway (style, formatting)
  drops out of the difference, and the optimum is P_0 exp((log P_T - log P_R) / alpha) / Z instead of the teacher.
* `to_tokens` gives it to the span's tokens. "share" (DPCA): each the part log p_i / log P_S, so that A_i =
  (log P_T / log P_S - 1) log p_i, and a span's tokens add up to its advantage. "whole" (the policy gradient of a span's
  log-likelihood): each the whole of it, and in expectation over spans that is the gradient of their reverse KL.
  For spans of one token both are log p_T - log p_S.
* `surrogate` is the sum whose gradient is the policy gradient.

DPCA limits an advantage to ±10 nats and leaves out spans of more than 6 tokens: options, and both are counted. Not
here: PPO's ratio, rewriting a chat template into another, a discount over later spans.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from align.kernels.chain import span_sums
from distill.errors import UserError

SPREADS = ("share", "whole")


class Advantages(NamedTuple):
    """What each token is rewarded with.

    Attributes:
        values: (n,) nats, without a graph.
        limited: () int64, tokens whose advantage was beyond the limit.
        left_out: () int64, spans with too many tokens, whose tokens get 0.
    """

    values: Tensor
    limited: Tensor
    left_out: Tensor


@torch.no_grad()
def opd_scalar(
    student_logp: Tensor,
    teacher_logp: Tensor,
    *,
    weak_reference: Tensor | None = None,
    initial_logp: Tensor | None = None,
    alpha: float = 0.5,
) -> Tensor:
    """Return ``(S,)`` advantages of spans in nats, without a graph.

    Args:
        student_logp, teacher_logp: (S,) log-likelihoods of the spans: `align.kernels.chain.span_sums`.
        weak_reference: (S,) the same of a weak model of the teacher's family; None is DPCA's advantage.
        initial_logp: (S,) of the student as it was when training began; with `weak_reference`.
        alpha: how much the student is held there.

    Raises:
        UserError: `weak_reference` without `initial_logp` or the other way round; an alpha that is not positive.
    """
    if weak_reference is None and initial_logp is None:
        return teacher_logp - student_logp
    if weak_reference is None or initial_logp is None:
        raise UserError("opd_scalar: weak_reference goes with initial_logp, the student before training: give both")
    if not alpha > 0:
        raise UserError(f"opd_scalar: alpha must be positive, not {alpha}")
    return (teacher_logp - weak_reference) - alpha * (student_logp - initial_logp)


@torch.no_grad()
def to_tokens(
    advantages: Tensor,
    token_logp: Tensor,
    span: Tensor,
    *,
    spread: str = "share",
    limit: float | None = 10.0,
    longest: int | None = 6,
) -> Advantages:
    """Return each token's advantage, from those of the spans.

    Args:
        advantages: (S,) `opd_scalar`.
        token_logp: (n,) the student's log-probabilities of its tokens.
        span: (n,) int64 the span each is in.
        spread: a name of `SPREADS`.
        limit: nats, on either side; None for none.
        longest: tokens of a span that is still rewarded; None for any.

    Raises:
        UserError: an unknown spread, a limit that is not positive.
    """
    if spread not in SPREADS:
        raise UserError(f"opd_scalar: unknown spread {spread!r}: known are {', '.join(SPREADS)}")
    if limit is not None and not limit > 0:
        raise UserError(f"opd_scalar: limit must be positive, not {limit}")
    tokens = span_sums(torch.ones_like(token_logp), span, len(advantages))
    values = advantages[span]
    if spread == "share":
        whole = span_sums(token_logp, span, len(advantages))[span]
        # A span the student is certain of has no shares of its own: its tokens are alike.
        known = (whole < 0) & whole.isfinite()
        values = values * torch.where(known, token_logp / whole.masked_fill(~known, 1.0), 1 / tokens[span])
    too_long = tokens > (len(token_logp) if longest is None else longest)
    values = values.masked_fill(too_long[span], 0.0)
    beyond = torch.zeros_like(values, dtype=torch.bool) if limit is None else values.abs() > limit
    return Advantages(values if limit is None else values.clamp(-limit, limit), beyond.sum(), too_long.sum())


def surrogate(token_logp: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """Return the scalar -sum w A whose gradient is that of -sum w A log s: what `on_policy`'s policy gradient returns.

    Args:
        token_logp: (n,) the student's log-probabilities of its tokens, with their graph.
        advantages: (n,) nats, `to_tokens`.
        weights: (n,) of each token.
    """
    rewards = weights * advantages
    # The last factor is 0 with the gradient of log s: the value stays the estimate of the reverse KL.
    return -rewards.sum() - (rewards * (token_logp - token_logp.detach())).sum()
