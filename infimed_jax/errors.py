"""Errors that are the user's to mend: one line that names the thing and the mend, exit code 2, no traceback."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, and what to do instead."""


class Interrupted(Exception):
    """A run was stopped by Ctrl-C or SIGTERM after saving its state; the message says how to resume."""
