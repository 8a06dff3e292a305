"""Distil a strong reasoning teacher into a small student. Importing this package loads no torch."""

from distill.errors import RunError, UserError
from distill.records import Completion, Prompt, Trace, Verdict

__all__ = ["Completion", "Prompt", "RunError", "Trace", "UserError", "Verdict", "__version__"]

__version__ = "0.1.0"
