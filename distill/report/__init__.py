"""One self-contained HTML page of a comparison, for people: `report.html`.

Everything is in the file: no script, no font, no image, no request (a Content-Security-Policy says so to the browser);
what can be switched or pointed at is done by the style sheet. Questions, completions and names are text written by
others and are escaped by the template, always. Python lays out numbers, `data/report*.j2` draw them. The figures
themselves come from `distill.compare`; only what it does not hold (levels, lengths, texts) is read again.
"""

from __future__ import annotations

from distill.report.numbers import FILTERS, nice_step
from distill.report.page import write_report

__all__ = ["FILTERS", "nice_step", "write_report"]
