"""Errors that are the user's to mend: one line that names the thing and the mend, exit code 2, no traceback."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, and what to do instead."""
