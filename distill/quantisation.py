"""Models held in 4 or 8 bits (bitsandbytes): a teacher that is only asked, or a student that LoRA is trained beside."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

from distill.dtypes import torch_dtype
from distill.errors import UserError

Bits = Literal["4bit", "8bit"]


def quantisation(bits: Bits, dtype: str) -> Any:
    """Return the setting with which transformers loads a model in `bits`.

    4 bits are NF4 with quantised scales (QLoRA, arXiv 2305.14314), 8 bits are LLM.int8() (arXiv 2208.07339).

    Args:
        dtype: the type that layers compute in, and all else is held in.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise UserError(f"loading a model in {bits} needs bitsandbytes: pip install 'distill[qlora]'")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype(dtype),
    )
