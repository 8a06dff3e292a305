"""The products of a fused loss: rows of hidden states to logits, and a gradient by logits back to all that made them.

`Matrices` multiplies with the head's own matrices into memory it is given. `Opaque` calls a head that is not known to
be matrices (quantised weights, DoRA, hooks) and lets autograd take its gradient, a chunk at a time: right, and slower.
Both add up gradients in float32 or wider. Nothing here knows what is compared.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distill.errors import UserError
from distill.head import Factors, Head


class Projection(Protocol):
    """A head over N rows, and the gradients of what it was made of.

    Attributes:
        inputs: the tensors that gradients are for.
        gradients: one for each of `inputs` that needs one, complete once every row has been pulled back; else None.
        device: where the products are made.
    """

    inputs: tuple[Tensor, ...]
    gradients: list[Tensor | None]
    device: torch.device

    def project(self, piece: slice, out: Tensor) -> None:
        """Write the products of the rows `piece` with the first columns, before scale and cap, to `out`."""

    def pull_back(self, piece: slice, gradient: Tensor, factor: Tensor) -> None:
        """Add the gradients of the rows `piece` last projected: `gradient` (n, columns) times `factor` (n,) by row."""


def projection(head: Head, hidden: Tensor, *, trained: bool) -> Projection:
    """Return the products of `head` with ``(N, D)`` rows, with gradients where `trained` and a tensor asks for them."""
    with torch.set_grad_enabled(trained):
        factors = head.factors(hidden)
    return Opaque(head, hidden, trained=trained) if factors is None else Matrices(factors, trained=trained)


def vocabulary_width(head: Head) -> int:
    """Return how many logits a head has.

    Raises:
        UserError: its module does not tell.
    """
    weight = getattr(head.linear, "weight", None)
    width = getattr(head.linear, "out_features", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2:  # quantised weights are packed
        width = weight.shape[0]
    if width is None:
        raise UserError(f"the head, a {type(head.linear).__name__}, has neither a matrix nor out_features")
    return int(width)


class Matrices:
    """A head whose matrices are known.

    Products with bfloat16 matrices are made in bfloat16, both ways; gradients by a matrix add up in float32. The range
    of float16 is too small for gradients, which are taken with a float32 copy of the matrix.
    """

    def __init__(self, factors: Factors, *, trained: bool) -> None:
        self.inputs = tuple(tensor for pair in factors.pairs for tensor in pair)
        self.bias = factors.bias
        if self.bias is not None:
            self.inputs += (self.bias,)
        self.device = factors.pairs[0][1].device
        kind = torch.get_autocast_dtype(self.device.type) if torch.is_autocast_enabled(self.device.type) else None
        self.pairs = [
            (rows.detach().to(kind or rows.dtype), matrix.detach().to(kind or matrix.dtype))
            for rows, matrix in factors.pairs
        ]
        self.gradients = [
            torch.zeros_like(tensor, dtype=_wide(tensor.dtype)) if trained and tensor.requires_grad else None
            for tensor in self.inputs
        ]
        self._wide_matrices: dict[int, Tensor] = {}
        self._low: dict[torch.dtype, Tensor] = {}

    def project(self, piece: slice, out: Tensor) -> None:
        for number, (rows, matrix) in enumerate(self.pairs):
            right = matrix[: out.shape[1]].t()
            if matrix.dtype == out.dtype:
                torch.addmm(out, rows[piece], right, beta=int(number > 0), out=out)
                continue
            if self.device.type == "cuda" and matrix.dtype.itemsize == 2:  # only there: unrounded 16-bit products
                product = torch.mm(rows[piece], right, out_dtype=out.dtype)
            else:
                product = torch.mm(rows[piece], right, out=self._buffer(matrix.dtype, out))
            out.add_(product) if number else out.copy_(product)
        if self.bias is not None:
            out.add_(self.bias.detach()[: out.shape[1]])

    def pull_back(self, piece: slice, gradient: Tensor, factor: Tensor) -> None:
        columns = gradient.shape[1]
        for number, (rows, _) in enumerate(self.pairs):
            by_rows, by_matrix = self.gradients[2 * number : 2 * number + 2]
            if by_rows is not None:
                left, right = gradient, self._matrix(number)[:columns]
                if right.dtype != gradient.dtype:
                    left = self._buffer(right.dtype, gradient).copy_(gradient)
                torch.mul(torch.mm(left, right), factor[:, None], out=by_rows[piece])
            if by_matrix is not None:
                _add_product(by_matrix[:columns], gradient.t(), rows[piece], factor)
        if self.bias is not None and (by_bias := self.gradients[-1]) is not None:
            by_bias[:columns].addmv_(gradient.t(), factor)

    def _matrix(self, number: int) -> Tensor:
        matrix = self.pairs[number][1]
        if matrix.dtype != torch.float16:
            return matrix
        if number not in self._wide_matrices:
            self._wide_matrices[number] = matrix.float()
        return self._wide_matrices[number]

    def _buffer(self, dtype: torch.dtype, like: Tensor) -> Tensor:
        if dtype not in self._low or self._low[dtype].numel() < like.numel():
            self._low[dtype] = torch.empty_like(like, dtype=dtype)
        return self._low[dtype].flatten()[: like.numel()].view(like.shape)


class Opaque:
    """A head that can only be called. Its parameters' gradients come from autograd, one chunk at a time."""

    def __init__(self, head: Head, hidden: Tensor, *, trained: bool) -> None:
        self.linear, self.hidden, self.trained = head.linear, hidden.detach(), trained
        self.inputs = (hidden, *(p for p in head.linear.parameters() if p.requires_grad)) if trained else ()
        self.device = hidden.device
        self.autocast = torch.get_autocast_dtype(self.device.type), torch.is_autocast_enabled(self.device.type)
        self.gradients = [
            torch.zeros_like(tensor, dtype=_wide(tensor.dtype)) if tensor.requires_grad else None
            for tensor in self.inputs
        ]

    def project(self, piece: slice, out: Tensor) -> None:
        dtype, enabled = self.autocast
        with torch.set_grad_enabled(self.trained), torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
            self._rows = self.hidden[piece].requires_grad_(self.trained)
            self._product = self.linear(self._rows)
        out.copy_(self._product.detach()[:, : out.shape[1]])

    def pull_back(self, piece: slice, gradient: Tensor, factor: Tensor) -> None:
        whole = torch.zeros_like(self._product)
        whole[:, : gradient.shape[1]] = gradient * factor[:, None]
        parts = torch.autograd.grad(self._product, (self._rows, *self.inputs[1:]), whole, allow_unused=True)
        for place, (total, part) in enumerate(zip(self.gradients, parts, strict=True)):
            if total is not None and part is not None:
                (total[piece] if place == 0 else total).add_(part)
        del self._rows, self._product


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _add_product(total: Tensor, left: Tensor, rows: Tensor, factor: Tensor) -> None:
    # total += left @ (rows * factor), never rounded on the way: one low-precision rounding per chunk would add up.
    right = rows.to(total.dtype) * factor[:, None]
    if total.device.type == "cuda" and rows.dtype == torch.bfloat16:
        torch.addmm(total, left.to(rows.dtype), right.to(rows.dtype), out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left, right)
