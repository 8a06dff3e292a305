"""On-policy: the teacher judges completions that the student wrote itself (`distill.rollouts`).

The student learns from the states it really gets into, its mistakes included, which traces of a teacher never show.
Both kinds pull the student towards the reverse KL divergence KL(student || teacher) at every token of its completions:

* ``divergence`` compares whole next-token distributions (GKD, arXiv 2306.13649, section 3), by default with
  `reverse_kl`, as TRL's DistillationTrainer does; any function of `DIVERGENCES` can take its place.
* ``policy_gradient`` looks at the drawn token alone (Lu and Thinking Machines Lab 2025, *On-policy distillation*;
  MiniLLM, arXiv 2306.08543, section 2.2): the student is rewarded with log t(y) - log s(y). In expectation over y its
  gradient is that of the reverse KL, at the price of noise. It is what remains where a teacher tells only the
  log-probability of given tokens, and what can look ahead: `discount`.

`reverse_kl` is the default because then `kind` changes the noise of the gradient and not what is minimised. As in GKD,
``divergence`` (and ``policy_gradient`` at discount 0) does not differentiate through the drawing: how a token changes
the states that follow is left out. Not here: MiniLLM's teacher-mixed sampling, length normalisation and clipping.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.batch import Batch
from distill.divergences import entropy
from distill.errors import UserError
from distill.forward import Forward
from distill.losses.base import Inner, LossOutput
from distill.losses.soft_logits import soft_logits
from distill.supports import dense
from distill.tables import suggest

if TYPE_CHECKING:
    from distill.rollouts import Rollouts

KINDS = ("divergence", "policy_gradient")
CHUNK_BYTES = 2**28  # one model's logits of a chunk, under the policy gradient


def on_policy(
    student: Forward,
    teacher: Forward | None,
    batch: Batch,
    *,
    num_outcomes: int,
    kind: str = "divergence",
    divergence: str = "reverse_kl",
    divergence_options: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    discount: float = 0.0,
    chunk_tokens: int | None = None,
) -> LossOutput:
    """Return ``sum w_t D(student_t, teacher_t)`` over the student's own tokens, or its estimate from the drawn tokens.

    Metrics (sums): `reverse_kl` in nats (exact under ``divergence`` with the divergence of that name at temperature 1;
    under ``policy_gradient`` the mean of log s(y) - log t(y)), `student_entropy`, `teacher_entropy`, `top1_agreement`,
    and what `soft_logits` adds.

    Args:
        num_outcomes: tokens of the shared vocabulary; logits beyond are padding.
        kind: ``divergence`` or ``policy_gradient``.
        divergence, divergence_options, temperature: as in `soft_logits`; only with kind ``divergence``. How the
            completions were drawn is another temperature, that of the rollouts.
        discount: of the rewards of later tokens, from 0 (each token answers for itself) to 1 (the reverse KL of whole
            completions, and most noise); only with kind ``policy_gradient``.
        chunk_tokens: positions projected to the vocabulary at once; None chooses by bytes.

    Raises:
        UserError: options that do not go together, and what `soft_logits` raises.
    """
    assert teacher is not None, "on_policy declares that it needs the teacher"
    _check(kind=kind, divergence=divergence, temperature=temperature, discount=discount)
    if kind == "policy_gradient":
        return _policy_gradient(
            student, teacher, batch, num_outcomes=num_outcomes, discount=discount, chunk_tokens=chunk_tokens
        )
    output = soft_logits(
        student,
        teacher,
        batch,
        num_outcomes=num_outcomes,
        divergence=divergence,
        divergence_options=divergence_options,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    exact = divergence == "reverse_kl" and temperature == 1.0
    return LossOutput(
        output.total,
        output.weight,
        output.metrics | ({"reverse_kl": output.metrics["divergence"]} if exact else {}),
    )


def on_policy_inner(
    student_model: Any,
    teacher_model: Any,
    *,
    rollouts: Rollouts | None = None,
    kind: str = "divergence",
    divergence: str = "reverse_kl",
    divergence_options: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    discount: float = 0.0,
    chunk_tokens: int | None = None,
) -> Inner:
    """Refuse, before anything is written, what cannot be meant or would bias the gradient; the rest is nothing.

    The policy gradient is an average over what the student itself draws. Drawn at another temperature, from a nucleus,
    or by the teacher, the same sum is the gradient of something else.

    Args:
        rollouts: how the batches will be written, where that is known; the other arguments are those of `on_policy`.

    Raises:
        UserError: the first thing wrong.
    """
    _check(kind=kind, divergence=divergence, temperature=temperature, discount=discount)
    for name in ("temperature", "top_p", "student_share") if rollouts and kind == "policy_gradient" else ():
        if (value := getattr(rollouts, name)) != 1.0:
            raise UserError(
                f"on_policy: kind=policy_gradient is biased unless the student draws all tokens from its own "
                f"distribution: the rollouts' {name} must be 1, not {value}; kind=divergence takes any"
            )
    return Inner()


def _check(*, kind: str, divergence: str, temperature: float, discount: float) -> None:
    if kind not in KINDS:
        raise UserError(f"on_policy: unknown kind {kind!r}: known are {', '.join(KINDS)}{suggest(kind, KINDS)}")
    if not 0 <= discount <= 1:
        raise UserError(f"on_policy: discount must be from 0 to 1, not {discount}")
    if kind == "divergence" and discount:
        raise UserError(f"on_policy: discount={discount} needs kind=policy_gradient")
    if kind == "policy_gradient" and (divergence != "reverse_kl" or temperature != 1.0):
        raise UserError(
            f"on_policy: kind=policy_gradient is the reverse KL at temperature 1, not {divergence} at {temperature}: "
            "leave both out, or use kind=divergence"
        )


class _Read(NamedTuple):
    """What both models say of the drawn tokens, each (N,): the student's log-probability has its graph."""

    student: Tensor
    teacher: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agree: Tensor


def _policy_gradient(
    student: Forward, teacher: Forward, batch: Batch, *, num_outcomes: int, discount: float, chunk_tokens: int | None
) -> LossOutput:
    """Return a sum whose value estimates ``sum w_t KL_t`` and whose gradient is the policy gradient.

    With rewards r_t = w_t (log t(y_t) - log s(y_t)), the gradient is -sum_t G_t grad log s(y_t), where
    G_t = r_t + discount * G_{t+1} within a row.
    """
    trained = batch.trained()
    read = _read(student, teacher, batch, num_outcomes=num_outcomes, chunk_tokens=chunk_tokens)
    with torch.no_grad():
        rewards = trained.weights * (read.teacher - read.student)
        returns = rewards
        if discount:
            by_row = torch.zeros(trained.rows.shape, dtype=rewards.dtype, device=rewards.device)
            returns = discounted(by_row.masked_scatter(trained.rows, rewards), discount)[trained.rows]
        sums = {
            "reverse_kl": -rewards.sum(),
            "student_entropy": (trained.weights * read.student_entropy).sum(),
            "teacher_entropy": (trained.weights * read.teacher_entropy).sum(),
            "top1_agreement": (trained.weights * read.agree).sum(),
        }
    # The second factor is 0 with the gradient of log s(y): the value stays the estimate.
    total = sums["reverse_kl"] - (returns * (read.student - read.student.detach())).sum()
    return LossOutput(total, trained.weights.sum(), sums)


def _read(student: Forward, teacher: Forward, batch: Batch, *, num_outcomes: int, chunk_tokens: int | None) -> _Read:
    """Project the trained positions `chunk_tokens` at a time, and again in the backward pass."""
    trained = batch.trained()
    student_rows = student.hidden[:, :-1][trained.rows]
    teacher_rows = teacher.hidden[:, :-1][trained.rows]

    def one_chunk(piece: slice) -> _Read:
        with torch.no_grad():
            teacher_logits = teacher.head(teacher_rows[piece])
        student_logp, teacher_logp = dense(student.head(student_rows[piece]), teacher_logits, num_outcomes=num_outcomes)
        drawn = trained.labels[piece, None]
        own = student_logp.gather(-1, drawn).squeeze(-1)
        with torch.no_grad():
            theirs = teacher_logp.gather(-1, drawn).squeeze(-1)
            agree = student_logp.argmax(-1) == teacher_logp.argmax(-1)
            return _Read(own, theirs, entropy(student_logp), entropy(teacher_logp), agree)

    rows = chunk_tokens or max(1, CHUNK_BYTES // (4 * num_outcomes))
    # At least one, if empty, so that a batch without trained tokens keeps its graph.
    pieces = [slice(start, start + rows) for start in range(0, max(1, len(trained.labels)), rows)]
    chunks = [checkpoint(one_chunk, piece, use_reentrant=False) for piece in pieces]
    return _Read(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def discounted(rewards: Tensor, discount: float) -> Tensor:
    """Return ``G[:, t] = sum_k discount^k rewards[:, t + k]``, ``(B, T) -> (B, T)``, in log2 T passes.

    After a pass, each place sums twice as many terms as before.
    """
    returns, reach = rewards, 1
    while reach < rewards.shape[1]:
        later = torch.nn.functional.pad(returns[:, reach:], (0, reach))
        returns, reach = returns + discount**reach * later, 2 * reach
    return returns
