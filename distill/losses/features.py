"""Features: the student's hidden states, through a projector, against the teacher's, layer by layer (FitNets,
arXiv 1412.6550).

Widths, depths and architectures may differ. Compared are the states that predict the trained tokens: the state at
position t - 1 for a weight on token t. It is the state that this prediction is made from, so the one mask means the
same here as in every other mode: prompt and padding receive no gradient of their own, the last prompt token, which
predicts the first trained one, does, and the state at the end-of-turn token, which predicts nothing, does not. Where
the tokenizers differ, the states are those in which both models have read the same text (`distill.span_states`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from distill.batch import Batch
from distill.blocks import decoder_blocks
from distill.forward import Capture, Forward, probe, widened
from distill.layer_maps import layer_map
from distill.losses.base import Inner, LossOutput
from distill.projectors import Projectors
from distill.span_states import span_states
from distill.tables import lookup


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over the width of ``(s - t)^2``, ``(N, D), (N, D) -> (N,)``: size and direction (FitNets).

    A few channels and a few tokens of a language model are a hundred and more times as large as the rest (massive
    activations, arXiv 2402.17762) and states grow with depth, so a handful of numbers can be most of this value.
    """
    return (student - teacher).square().mean(-1)


def normalised(student: Tensor, teacher: Tensor) -> Tensor:
    """Return `mse` of both states brought to mean 0 and variance 1 over the width, a value in [0, 4].

    The teacher's features are whitened by a LayerNorm without parameters in Wei et al. 2022 (arXiv 2205.14141);
    here both are, so it is 2 (1 - correlation). Every token and every layer weighs the same.
    """
    width = student.shape[-1:]
    # Small beside the variance of any state, embeddings included.
    return mse(functional.layer_norm(student, width, eps=1e-8), functional.layer_norm(teacher, width, eps=1e-8))


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ``1 - cos(s, t)``, in [0, 2] (DistilBERT, arXiv 1910.01108), as half the squared distance of directions.

    That form is exactly 0 at equality and never below. Twice it is PKD's loss (arXiv 1908.09355).
    """
    return (functional.normalize(student, dim=-1) - functional.normalize(teacher, dim=-1)).square().sum(-1) / 2


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"normalised": normalised, "mse": mse, "cosine": cosine}


def features(
    student: Forward,
    teacher: Forward | None,
    batch: Batch,
    *,
    inner: Inner,
    kind: str = "normalised",
    layers: str = "uniform",
    projector: str = "linear",
    projector_width: int | None = None,
    projector_bias: bool = False,
    shared_projector: bool = False,
    projector_seed: int = 0,
) -> LossOutput:
    """Return ``sum w_t mean over pairs D(P(s_t), t_t)`` over the trained tokens, in float32 or wider.

    Metrics (sums): `features`, and `features_I_J` of each pair where there are several.

    Args:
        inner: what `features_inner` made of the same options; all but `kind` are read there.
        kind: a name of `DISTANCES` or ``pkg.mod:function``. The default keeps loud tokens and deep layers from
            drowning the others.
        layers: which layers are compared: see `distill.layer_maps`.
        projector: a name of `distill.projectors.PROJECTORS` or ``pkg.mod:function``.
        projector_width: between the two maps of an `mlp`; by default the teacher's width.
        projector_bias: whether the projector's maps have a bias.
        shared_projector: one projector for all pairs instead of one for each.
        projector_seed: of the projectors' initial weights.
    """
    assert teacher is not None, "features declares that it needs the teacher"
    distance = lookup(DISTANCES, kind, "kind of feature")
    mass = batch.trained().weights.sum()
    student, teacher, batch = span_states(student, teacher, batch)
    trained = batch.trained()
    pairs: list[tuple[int, int]] = inner.plan
    states = [student.layers[number][:, :-1][trained.rows] for number, _ in pairs]
    if inner.modules is not None:
        states = inner.modules(states)
    # Starting from a zero that hangs on the student keeps the graph whole for a batch without trained tokens.
    total = widened(student.hidden.flatten()[:1]).sum() * 0.0
    metrics = {}
    for (student_number, teacher_number), state in zip(pairs, states, strict=True):
        target = teacher.layers[teacher_number][:, :-1][trained.rows].detach()
        part = (trained.weights * distance(widened(state), widened(target))).sum()
        metrics[f"features_{student_number}_{teacher_number}"] = part.detach()
        total = total + part / len(pairs)
    return LossOutput(total, mass, (metrics if len(pairs) > 1 else {}) | {"features": total.detach()})


def features_inner(
    student_model: Any,
    teacher_model: Any,
    *,
    kind: str = "normalised",
    layers: str = "uniform",
    projector: str = "linear",
    projector_width: int | None = None,
    projector_bias: bool = False,
    shared_projector: bool = False,
    projector_seed: int = 0,
) -> Inner:
    """Return which layers `features` compares, its new projectors, and as the plan the pairs of layers.

    Raises:
        UserError: an unknown name, a layer map that the two models do not allow, or widths that the projector does not.
    """
    lookup(DISTANCES, kind, "kind of feature")
    pairs = layer_map(layers, len(decoder_blocks(student_model)), len(decoder_blocks(teacher_model)))
    ours = Capture(layers=frozenset(number for number, _ in pairs))
    theirs = Capture(layers=frozenset(number for _, number in pairs))
    student, teacher = probe(student_model, ours).layers, probe(teacher_model, theirs).layers
    projectors = Projectors(
        projector,
        {pair: (student[pair[0]].shape[-1], teacher[pair[1]].shape[-1]) for pair in pairs},
        inner_width=projector_width,
        bias=projector_bias,
        shared=shared_projector,
        seed=projector_seed,
    )
    return Inner(ours, theirs, projectors if any(True for _ in projectors.parameters()) else None, pairs)
