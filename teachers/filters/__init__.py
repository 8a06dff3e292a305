"""What is kept of a store: filters that look at a trace, and the keep rule that looks at its verdict and siblings."""

from __future__ import annotations

from teachers.filters.contamination import EvaluationIndex, Hit
from teachers.filters.judging import Judge, first_reason, make_judge, with_flags
from teachers.filters.keep import KeepRule, parse_keep
from teachers.filters.options import FilterOptions, parse_band
from teachers.filters.siblings import Siblings
from teachers.filters.table import DEFAULT_DROP, FILTERS, dropping, parse_drop

__all__ = [
    "DEFAULT_DROP",
    "FILTERS",
    "EvaluationIndex",
    "FilterOptions",
    "Hit",
    "Judge",
    "KeepRule",
    "Siblings",
    "dropping",
    "first_reason",
    "make_judge",
    "parse_band",
    "parse_drop",
    "parse_keep",
    "with_flags",
]
