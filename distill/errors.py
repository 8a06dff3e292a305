"""The two ways a command ends badly, and their exit codes.

Everything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """The user's input is wrong: exit 2. The message says what was given, what is allowed, what to do."""

    exit_code = 2


class RunError(RuntimeError):
    """The input was fine and the run itself failed, or nothing survived it: exit 1."""

    exit_code = 1
