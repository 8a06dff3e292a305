"""The embedded world: problems made on the spot, and a trained teacher of 0.4 M parameters as package data.

It lets the whole road run with nothing downloaded. Importing this loads no torch.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from teachers.nano.problems import parse_levels, problems

__all__ = ["model_path", "parse_levels", "problems"]


def model_path() -> Path:
    """Return the folder of the embedded teacher: weights, config and tokenizer, as `from_pretrained` takes it."""
    return Path(str(files("teachers.nano"))) / "weights"
