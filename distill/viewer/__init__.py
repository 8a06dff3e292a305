"""The trace viewer: a trace store or an evaluation as one page to filter, search and read."""

from distill.viewer.page import write_view

__all__ = ["write_view"]
