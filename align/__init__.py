"""Alignments: how a teacher's distributions meet a student's vocabulary.

`METHODS` names them; "auto" takes the one that fits. So far there is one: both sides have the same vocabulary.
"""

from __future__ import annotations

from align.identity import METHODS, Comparison, open_alignment, same_vocabulary

__all__ = ["METHODS", "Comparison", "open_alignment", "same_vocabulary"]
