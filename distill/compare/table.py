"""A comparison for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


MOST_RATIOS = 3  # said below the table; the page has them all


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """Return what is said below the table: the verdict, and what holds at equal compute."""
    level = result["matched"]
    ratios = [row["verdict"] for row in level["to_target"]]
    more = [f"({len(ratios) - MOST_RATIOS} more such ratios are in compare.json)"] if len(ratios) > MOST_RATIOS else []
    return [result["verdict"], *level["findings"], *ratios[:MOST_RATIOS], *more]


def render_table(result: Mapping[str, Any]) -> Table:
    """Return the comparison as a table for a terminal of 80 columns: a row per arm, differences to the first arm."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    arms, first = result["arms"], result["arms"][0]["name"]
    to_first = {p["a"]: p for p in result["pairs"] if p["b"] == first}
    with_bits = any(a["bits_per_byte"] is not None for a in arms)
    table = Table(
        title=f"{result['questions']} questions x {result['samples_per_question']} samples; accuracy in %, points",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        show_edge=False,
    )
    table.add_column("arm", overflow="fold", min_width=12)
    for column in ("accuracy [95 %]", f"against {first}"):
        table.add_column(Text(column), justify="right", no_wrap=True)
    for column in ["no answer", "tokens"] + ["bits /byte"] * with_bits:
        table.add_column(column, justify="right", min_width=6, max_width=6)
    for arm in arms:
        pair = to_first.get(arm["name"])
        row = [
            arm["name"] + (f" ({len(arm['seeds'])} seeds)" if len(arm["seeds"]) > 1 else ""),
            f"{100 * arm['accuracy']:.1f} [{100 * arm['ci95'][0]:.1f}, {100 * arm['ci95'][1]:.1f}]",
            f"{100 * pair['difference']:+.1f} [{100 * pair['ci95'][0]:.1f}, {100 * pair['ci95'][1]:.1f}]"
            if pair
            else "",
            f"{100 * arm['no_answer']:.1f} %",
            f"{arm['mean_completion_tokens']:.0f}",
        ]
        if with_bits:
            row.append("" if arm["bits_per_byte"] is None else f"{arm['bits_per_byte']:.3f}")
        table.add_row(*map(Text, row))
    return table
