"""The methods across vocabularies, by the name that `--align` takes.

A method is a module of kernels, an adapter that says which rows or spans of a batch they see, and a line here.
"""

from __future__ import annotations

from align.methods.dskd import dskd, maps_for
from align.methods.entry import Method, Needs, Pair
from align.methods.of_cells import (
    bpm_rows,
    bpm_tables,
    cspc_rows,
    cspc_tables,
    mined_rows,
    mined_table,
    shared_rows,
    shared_tables,
)
from align.methods.of_spans import (
    alm_spans,
    gold_matching,
    gold_spans,
    opd_tokens,
    uld_spans,
    uld_width,
    xtoken_spans,
    xtoken_tables,
)

__all__ = ["METHODS", "Method", "Needs", "Pair"]

METHODS: dict[str, Method] = {
    "cspc": Method(
        "rows",
        cspc_rows,
        "top_logprobs",
        "cells that both tokenizers begin a text with, and the text's tokens within them",
        cspc_tables,
        labelled=True,
    ),
    "shared_kl": Method(
        "rows", shared_rows, "top_logprobs", "the tokens both have, and the rest as one", shared_tables
    ),
    "bpm": Method("rows", bpm_rows, "top_logprobs", "the longest student token a teacher's begins with", bpm_tables),
    "xtoken": Method("merged", xtoken_spans, "top_logprobs", "a sparse map between the vocabularies", xtoken_tables),
    "mined": Method("rows", mined_rows, "top_logprobs", "the nearest spelling", mined_table),
    "gold": Method("merged", gold_spans, "logits", "equal tokens, the others as sorted lists", gold_matching),
    "uld": Method("merged", uld_spans, "logits", "sorted lists of probabilities", uld_width),
    "dskd": Method("states", dskd, "logits", "hidden states through the other model's head", maps_for),
    "alm": Method("spans", alm_spans, "realised", "the likelihood of each span of text"),
    "opd_scalar": Method("advantages", opd_tokens, "realised", "what the teacher thinks of each span that was written"),
}
