"""Relations: how the tokens of one response lie to each other in the student, against how they lie in the teacher.

Needs no projector: widths, depths, head counts and architectures may differ. Where the tokenizers differ, spans that
cover the same text stand for tokens, and there is no context (`distill.span_states`).
The points are the states that predict the trained tokens, as in `distill.losses.features`. A relation is taken within
one sequence, never across, so batch, padding and packing change nothing. A sequence's value counts with the sum of its
trained weights; within it, all tokens of positive weight are points of equal standing.

Where a relation includes the context (the untrained tokens before, so the prompt), the context's vectors are what the
response is compared *with*: they are detached, and no gradient enters there. What the matrices are is
`distill.relation_matrices`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill import relation_matrices as matrices
from distill.batch import Batch
from distill.blocks import decoder_blocks
from distill.errors import UserError
from distill.forward import Capture, Forward, probe, widened
from distill.layer_maps import layer_map
from distill.losses.base import Inner, LossOutput
from distill.sequences import Sequence, sequences
from distill.span_states import span_states
from distill.tables import lookup

NARROWEST = 16  # channels of a relation head: MiniLMv2 does best with 48 heads at width 768


class View(NamedTuple):
    """What both models say of n tokens of one response and of m tokens before it, in float32 or wider.

    Attributes:
        student, teacher: (n, Ds), (n, Dt); only `student` has a gradient.
        student_context, teacher_context: (m, Ds), (m, Dt).
        seen: (n, m) bool, which of the context stand before each token.
    """

    student: Tensor
    student_context: Tensor
    teacher: Tensor
    teacher_context: Tensor
    seen: Tensor


def rkd_distance(view: View) -> Tensor:
    """Distances within the response."""
    return matrices.rkd_distance(view.student, view.teacher)


def rkd_angle(view: View) -> Tensor:
    """Angles within the response."""
    return matrices.rkd_angle(view.student, view.teacher)


def gram(view: View) -> Tensor:
    """Cosines within the response."""
    return matrices.cosine_grams(view.student, view.student, view.teacher, view.teacher, _earlier(view, -1))


def gram_prompt(view: View) -> Tensor:
    """Cosines between the response and the context before it."""
    return matrices.cosine_grams(*view)


def cka(view: View) -> Tensor:
    """1 - CKA of the response (for language models: Dasgupta and Cohn, ICLR 2025, on encoders and encoder-decoders)."""
    return matrices.cka(view.student, view.teacher)


def cka_debiased(view: View) -> Tensor:
    """1 - CKA of the response, without the likeness that few tokens have by chance."""
    return matrices.cka(view.student, view.teacher, debiased=True)


def attention(view: View, *, heads: int) -> Tensor:
    """What each token of the response would attend to, in the context and the response up to itself.

    Its scores are squares of what is trained, so it is steeper than the other kinds and wants a smaller learning rate.
    """
    student, teacher = torch.cat([view.student_context, view.student]), torch.cat([view.teacher_context, view.teacher])
    visible = torch.cat([view.seen, _earlier(view, 0)], dim=1)
    # (heads, n, m) of a single sequence is held at a time: they are made again in the backward pass.
    return checkpoint(
        matrices.attention_relations,
        *(view.student, student, view.teacher, teacher, visible),
        heads=heads,
        use_reentrant=False,
        preserve_rng_state=False,
    )


def _earlier(view: View, diagonal: int) -> Tensor:
    """Return (n, n) which tokens of the response stand before each (`diagonal` -1), or before or at it (0)."""
    count = len(view.student)
    return torch.ones(count, count, dtype=torch.bool, device=view.seen.device).tril(diagonal)


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of relation.

    Attributes:
        compare: ``f(view) -> ()``, or ``f(view, *, heads) -> ()`` where it reads attention.
        max_tokens: tokens of the response, and of the context, that are compared at most unless told otherwise.
        least: tokens of the response that it needs.
        context: tokens of the context that it needs.
        attention: whether it reads queries, keys and values, whose three values are added, and not hidden states.
    """

    compare: Callable[..., Tensor]
    max_tokens: int = 256
    least: int = 2
    context: int = 0
    attention: bool = False


RELATIONS: dict[str, Relation] = {
    "rkd_distance": Relation(rkd_distance),
    "rkd_angle": Relation(rkd_angle, max_tokens=48, least=3),
    "gram": Relation(gram),
    "gram_prompt": Relation(gram_prompt, least=1, context=1),
    "cka": Relation(cka, least=3),
    "cka_debiased": Relation(cka_debiased, least=4),
    "attention": Relation(attention, least=1, attention=True),
}


class Plan(NamedTuple):
    """What `relations_inner` worked out.

    Attributes:
        kinds: name -> the relation, with its `max_tokens` as told.
        pairs: (student layer, teacher layer) -> relation heads there, None where no kind reads attention.
    """

    kinds: dict[str, Relation]
    pairs: dict[tuple[int, int], int | None]


def relations(
    student: Forward,
    teacher: Forward | None,
    batch: Batch,
    *,
    inner: Inner,
    kind: str = "cka",
    layers: str = "last-1",
    max_tokens: int | None = None,
    relation_heads: int | None = None,
) -> LossOutput:
    """Return ``sum over sequences of (sum of w_t) * mean over pairs of layers of R``, in float32 or wider.

    Metrics: `relations` (a sum), `relations_KIND` of each kind where there are several, and `relations_KIND_tokens`,
    the share of the trained tokens that was compared: below 1 where responses are longer than `max_tokens`, or too
    short for the kind (fewer than 2 to 4 tokens, or no context), which then add nothing.

    Args:
        inner: what `relations_inner` made of the same options; they are read there.
        kind: a name of `RELATIONS` or ``pkg.mod:name`` of a `Relation`, or several joined by ``+``, which are added.
            The default has the range [0, 1] for any two models, and does not see what all tokens have in common.
        layers: which layers are compared: see `distill.layer_maps`.
        max_tokens: tokens of a response, and of its context, that are compared at most: evenly spaced ones, the first
            and the last among them. By default the kind's own: 256, or 48 for `rkd_angle`, whose cost is cubic.
        relation_heads: of `attention`. By default as many as divide all widths and stay at least 16 wide.
    """
    assert teacher is not None, "relations declares that it needs the teacher"
    plan: Plan = inner.plan
    mass = batch.trained().weights.sum()
    student, teacher, batch = span_states(student, teacher, batch)
    device = student.hidden.device
    # Starting from a zero that hangs on the student keeps the graph whole for a batch without trained tokens.
    total = widened(student.hidden.flatten()[:1]).sum() * 0.0
    values = {name: torch.zeros_like(total) for name in plan.kinds}
    counts = {name: torch.zeros(2) for name in plan.kinds}
    with torch.autocast(device.type, enabled=False):  # differences of inner products do not survive bfloat16
        for sequence in sequences(batch):
            for name, relation in plan.kinds.items():
                compared = sequence.sample(relation.max_tokens)
                enough = len(sequence.response) >= relation.least and len(sequence.context) >= relation.context
                counts[name] += torch.tensor([len(compared.response) * enough, len(sequence.response)])
                for pair, heads in plan.pairs.items() if enough else ():
                    values[name] = values[name] + sequence.mass.to(device) * sum(
                        relation.compare(view, **({"heads": heads} if relation.attention else {}))
                        for view in _views(relation, student, teacher, compared, pair)
                    )
    parts = {f"relations_{name}": value / len(plan.pairs) for name, value in values.items()}
    total = sum(parts.values(), start=total)
    metrics = {name: part.detach() for name, part in parts.items()} if len(parts) > 1 else {}
    metrics |= {f"relations_{name}_tokens": count.to(device) for name, count in counts.items()}
    return LossOutput(total, mass, metrics | {"relations": total.detach()})


def relations_inner(
    student_model: Any,
    teacher_model: Any,
    *,
    kind: str = "cka",
    layers: str = "last-1",
    max_tokens: int | None = None,
    relation_heads: int | None = None,
) -> Inner:
    """Return which layers and projections `relations` reads, and its `Plan`; there is nothing to train.

    Raises:
        UserError: an unknown kind; a layer map that the two models do not allow; attention of an unknown layout;
            relation heads that do not divide a width; too few `max_tokens` for the kind.
    """
    kinds = {name: _relation(name) for name in kind.split("+")}
    if max_tokens is not None:
        for name, relation in kinds.items():
            if max_tokens < relation.least:
                raise UserError(f"max_tokens {max_tokens} is too few: {name!r} compares at least {relation.least}")
        kinds = {name: replace(relation, max_tokens=max_tokens) for name, relation in kinds.items()}
    reads_attention = any(relation.attention for relation in kinds.values())
    reads_layers = not all(relation.attention for relation in kinds.values())
    if relation_heads is not None and not reads_attention:
        raise UserError(f"relation_heads belongs to the kind 'attention', not to {kind!r}")
    depths = len(decoder_blocks(student_model)), len(decoder_blocks(teacher_model))
    pairs = layer_map(layers, *depths, lowest=1 if reads_attention else 0)
    captures = []
    for side in range(2):
        numbers = frozenset(pair[side] for pair in pairs)
        captures.append(Capture(numbers if reads_layers else frozenset(), numbers if reads_attention else frozenset()))
    ours, theirs = captures
    heads: dict[tuple[int, int], int | None] = dict.fromkeys(pairs)
    if reads_attention:
        student, teacher = probe(student_model, ours).attention, probe(teacher_model, theirs).attention
        for left, right in pairs:
            widths = [states.shape[-1] for states in (*student[left], *teacher[right])]
            heads[left, right] = _relation_heads(widths, relation_heads)
    return Inner(ours, theirs, plan=Plan(kinds, heads))


def _relation(name: str) -> Relation:
    relation = lookup(RELATIONS, name, "kind of relation")
    if not isinstance(relation, Relation):
        raise UserError(f"{name} must name a distill.losses.relations.Relation, not a {type(relation).__name__}")
    return relation


def _relation_heads(widths: list[int], given: int | None) -> int:
    common = math.gcd(*widths)
    if given is None:
        return max(n for n in range(1, common + 1) if common % n == 0 and (n == 1 or min(widths) // n >= NARROWEST))
    if given < 1 or common % given:
        raise UserError(f"relation_heads {given} must divide the widths of queries, keys and values: {widths}")
    return given


def _views(
    relation: Relation, student: Forward, teacher: Forward, sequence: Sequence, pair: tuple[int, int]
) -> Iterator[View]:
    row, device = sequence.row, student.hidden.device
    response, context = sequence.response.to(device), sequence.context.to(device)
    left, right = pair
    all_ours = student.attention[left] if relation.attention else (student.layers[left],)
    all_theirs = teacher.attention[right] if relation.attention else (teacher.layers[right],)
    for ours, theirs in zip(all_ours, all_theirs, strict=True):
        yield View(
            widened(ours[row, response]),
            widened(ours[row, context]).detach(),
            widened(theirs[row, response]).detach(),
            widened(theirs[row, context]).detach(),
            context < response[:, None],
        )
