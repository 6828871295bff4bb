"""Errors that are the user's to mend: one line that names the thing and the mend, exit code 2, no traceback."""

from __future__ import annotations

import errno


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, and what to do instead."""


class Interrupted(Exception):
    """A run was stopped by Ctrl-C or SIGTERM after saving its state; the message says how to resume."""


def describe(error: Exception) -> str:
    """One line for an error that is the user's to mend."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk of {error.filename or 'the output'}: free some and run it again"
    return " ".join(str(error).split())
