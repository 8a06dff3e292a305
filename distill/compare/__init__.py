"""Several evaluations, one verdict: what `distill compare EVAL_DIR...` computes and writes to `compare.json`.

Every score is recomputed from `samples.jsonl` (a truncated sample is wrong and no answer); only costs and bits per
byte, which the samples do not hold, are taken from `eval.json` and from what a run recorded of its data.

Nothing here trains, generates or draws: `distill.report` draws. No torch.
"""

from __future__ import annotations

from distill.compare.arms import score_matrix
from distill.compare.comparison import compare
from distill.compare.table import render_table, summary_lines

__all__ = ["compare", "render_table", "score_matrix", "summary_lines"]
