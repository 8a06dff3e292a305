"""The number types weights are held in, by the name a user types."""

from __future__ import annotations

from typing import Any

from distill.errors import UserError
from distill.tables import suggest

DTYPES = ("float32", "bfloat16", "float16")


def torch_dtype(dtype: str) -> Any:
    """Return the torch dtype of a name in `DTYPES`.

    Raises:
        UserError: another name.
    """
    import torch

    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: known are {', '.join(DTYPES)}{suggest(dtype, DTYPES)}")
    return getattr(torch, dtype)
