"""Projectors: learned maps from the student's hidden width to the teacher's, trained beside the student.

They are a module of their own, never part of the student, so the trained student is the model it was. Their initial
weights come from a seed of their own: the global random numbers are neither read nor moved. A new projector keeps the
size of what it maps: states of unit variance come out with about unit variance, whatever the two widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from distill.errors import UserError
from distill.tables import lookup

Pair = tuple[int, int]


class Linear(nn.Linear):
    """A linear map that widens narrower input to its weights' type."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


def _gaussian(rows: int, columns: int, bias: bool, generator: Generator, gain: float = 1.0) -> Linear:
    layer: Any = nn.utils.skip_init(Linear, rows, columns, bias=bias, dtype=torch.float32)
    nn.init.normal_(layer.weight, std=(gain / rows) ** 0.5, generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def none(
    student_width: int, teacher_width: int, *, inner_width: int | None, bias: bool, generator: Generator
) -> nn.Module:
    """Return the identity, without parameters.

    Raises:
        UserError: the widths differ.
    """
    if student_width != teacher_width:
        raise UserError(
            f"the student's states have width {student_width}, the teacher's {teacher_width}: "
            "projector 'none' needs equal widths; take 'linear'"
        )
    return nn.Identity()


def linear(
    student_width: int, teacher_width: int, *, inner_width: int | None, bias: bool, generator: Generator
) -> nn.Module:
    """Return one linear map, FitNets' regressor (arXiv 1412.6550) without its convolution.

    It begins as the identity where both widths are equal: a student cut from its teacher shares the teacher's axes.
    """
    layer = _gaussian(student_width, teacher_width, bias, generator)
    if student_width == teacher_width:
        nn.init.eye_(layer.weight)
    return layer


def mlp(
    student_width: int, teacher_width: int, *, inner_width: int | None, bias: bool, generator: Generator
) -> nn.Module:
    """Return a linear map, GELU, and a linear map with gain 2 for what GELU takes away (He et al., arXiv 1502.01852).

    Raises:
        UserError: an inner width below 1.
    """
    between = teacher_width if inner_width is None else inner_width
    if between < 1:
        raise UserError(f"a projector's inner width must be at least 1, not {between}")
    first = _gaussian(student_width, between, bias, generator)
    return nn.Sequential(first, nn.GELU(), _gaussian(between, teacher_width, bias, generator, gain=2.0))


PROJECTORS: dict[str, Callable[..., nn.Module]] = {"linear": linear, "mlp": mlp, "none": none}


class Projectors(nn.Module):
    """One projector for each pair of layers, or one for all.

    Parameters are named by the pair, ``maps.2_4.weight`` for student layer 2 and teacher layer 4, or
    ``maps.shared.weight``.

    Args:
        kind: a name of `PROJECTORS` or ``pkg.mod:function``.
        widths: (student layer, teacher layer) -> (student width, teacher width).
        inner_width: between the two maps of ``mlp``; None is the teacher's width.
        bias: whether the maps have one, 0 at first.
        shared: one projector for all pairs.
        seed: of the initial weights.

    Raises:
        UserError: unknown kind; an inner width for another kind than ``mlp``; a shared projector between layers of
            different widths.
    """

    def __init__(
        self,
        kind: str,
        widths: Mapping[Pair, Pair],
        *,
        inner_width: int | None = None,
        bias: bool = False,
        shared: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        make = lookup(PROJECTORS, kind, "projector")
        if inner_width is not None and kind in ("linear", "none"):
            raise UserError(f"projector {kind!r} has no inner width (given: {inner_width}); 'mlp' has")
        named = {f"{left}_{right}": pair for (left, right), pair in widths.items()}
        self.order = list(named)
        if shared:
            if len(set(named.values())) > 1:
                raise UserError(f"a shared projector needs layers of equal widths, not {sorted(set(named.values()))}")
            named, self.order = {"shared": next(iter(named.values()))}, ["shared"] * len(named)
        options = {"inner_width": inner_width, "bias": bias, "generator": torch.Generator().manual_seed(seed)}
        self.maps = nn.ModuleDict({name: make(*pair, **options) for name, pair in named.items()})

    def forward(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Map (N, student width) to (N, teacher width) for each pair, in the order of `widths`."""
        return [self.maps[name](state) for name, state in zip(self.order, states, strict=True)]
