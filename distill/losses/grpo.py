"""GRPO: tokens of completions that earned more than others to the same question become likelier (arXiv 2402.03300).

For a token drawn with probability pi_old in a completion of advantage A, with r = pi / pi_old,

    loss = -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta (pi_ref / pi - log(pi_ref / pi) - 1)

The last term estimates KL(pi || pi_ref) without bias and is never negative (Schulman's k3). Its gradient is the KL's
only where it is weighted by r (`use_bias_correction_kl`, DeepSeek-V3.2, arXiv 2512.02556). `importance_sampling_level`
sequence takes for r the geometric mean over the completion (GSPO, arXiv 2507.18071, eq. 7); `epsilon_high` is DAPO's
clip-higher (arXiv 2503.14476, eq. 10). How tokens are weighted against each other (`loss_type`) is in the batch's
weights and the step's mass, and what an advantage is in `distill.reinforce`: a batch brings both along
(`distill.batch.PolicyRows`).

It mixes with other modes: `--loss grpo=1,on_policy=0.1` adds a teacher's divergence on the same completions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.batch import Batch
from distill.drawn import drawn_logps
from distill.errors import UserError
from distill.forward import Forward
from distill.losses.base import Inner, LossOutput
from distill.rollouts import Rollouts

LEVELS = ("token", "sequence")


def grpo(
    student: Forward,
    teacher: Forward | None,
    batch: Batch,
    *,
    num_outcomes: int,
    inner: Inner,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    importance_sampling_level: str = "token",
    chunk_tokens: int | None = None,
) -> LossOutput:
    """Return ``sum w_t loss_t`` over the tokens that the student drew; `batch.policy` says what they are worth.

    Metrics (sums): `entropy` of the student in nats, `clipped_low` and `clipped_high` (the share of tokens whose
    gradient the clipping took), `ratio`, and with `beta` the estimated `reference_kl` in nats.

    Args:
        num_outcomes: tokens of the vocabulary; logits beyond are padding.
        inner: what `grpo_inner` returned.
        epsilon, epsilon_high: how far a ratio counts below and above 1; None is `epsilon`.
        beta: weight of the KL to the reference, in nats a token.
        use_bias_correction_kl: multiply its estimate by the ratio, whose gradient it then has, too.
        importance_sampling_level: ``token`` or ``sequence``.
        chunk_tokens: positions projected to the vocabulary at once; None chooses by bytes.

    Raises:
        UserError: an option out of its range.
    """
    policy = batch.policy
    assert policy is not None, "grpo declares that it needs rewarded completions"
    high = _check(epsilon, epsilon_high, beta, importance_sampling_level)
    trained = batch.trained()
    own, spread = drawn_logps(
        student, batch, num_outcomes=num_outcomes, temperature=inner.plan, chunk_tokens=chunk_tokens
    )
    row = trained.rows.nonzero()[:, 0]
    old = own.detach() if policy.old is None else policy.old[:, 1:][trained.rows]
    log_ratio = own - old
    if importance_sampling_level == "sequence":
        log_ratio = _row_means(log_ratio, row, len(batch.input_ids))[row]
    ratio, advantage = log_ratio.exp(), policy.advantages[row]
    plain, clipped = ratio * advantage, ratio.clamp(1 - epsilon, 1 + high) * advantage
    losses = -torch.minimum(plain, clipped)
    weights = trained.weights
    with torch.no_grad():
        bound = clipped < plain
        metrics = {
            "entropy": (weights * spread).sum(),
            "ratio": (weights * ratio).sum(),
            "clipped_low": (weights * (bound & (ratio < 1))).sum(),
            "clipped_high": (weights * (bound & (ratio > 1))).sum(),
        }
    if beta:
        assert policy.reference is not None, "the trainer reads the reference where beta is not 0"
        difference = policy.reference[:, 1:][trained.rows] - own
        estimate = difference.exp() - difference - 1
        losses = losses + beta * (estimate * ratio if use_bias_correction_kl else estimate)
        metrics["reference_kl"] = (weights * estimate.detach()).sum()
    return LossOutput((weights * losses).sum(), weights.sum(), metrics)


def grpo_inner(
    student_model: Any,
    teacher_model: Any,
    *,
    rollouts: Rollouts | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    importance_sampling_level: str = "token",
    chunk_tokens: int | None = None,
) -> Inner:
    """Refuse what would make the ratios those of another distribution; plan the temperature that was drawn at.

    Raises:
        UserError: rollouts from a nucleus, greedy ones, or an option out of its range.
    """
    _check(epsilon, epsilon_high, beta, importance_sampling_level)
    if rollouts is None:
        return Inner(plan=1.0)
    if rollouts.temperature == 0:
        raise UserError("grpo learns from how unlike completions are: rollouts at temperature 0 are all the same")
    if rollouts.top_p != 1.0:
        raise UserError(
            f"grpo: the student draws from its whole distribution, or the gradient is biased: the rollouts' top_p must "
            f"be 1, not {rollouts.top_p}"
        )
    return Inner(plan=rollouts.temperature)


def _check(epsilon: float, epsilon_high: float | None, beta: float, level: str) -> float:
    high = epsilon if epsilon_high is None else epsilon_high
    if not (epsilon > 0 and high > 0 and beta >= 0):
        raise UserError(
            f"grpo: epsilon and epsilon_high must be above 0 and beta 0 or more, not {epsilon}, {high}, {beta}"
        )
    if level not in LEVELS:
        raise UserError(f"grpo: importance_sampling_level is {' or '.join(LEVELS)}, not {level!r}")
    return high


def _row_means(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Return the mean of the values of each row, (rows,)."""
    count = torch.bincount(row, minlength=rows).clamp(min=1)
    return torch.zeros(rows, dtype=values.dtype, device=values.device).index_add(0, row, values) / count
