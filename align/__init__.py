"""Alignments: how a teacher's distributions meet a student's vocabulary, whatever the two tokenizers.

`METHODS` names the methods; `open_alignment` takes the one that a run asks for, "auto" the one that fits.
"""

from __future__ import annotations

from align.engine.opening import open_alignment, open_training
from align.identity import Comparison, same_vocabulary
from align.methods import METHODS
from align.spans import common_spans

__all__ = ["METHODS", "Comparison", "common_spans", "open_alignment", "open_training", "same_vocabulary"]
