"""Errors that the user can fix: one line that names the thing and the fix, exit code 2, no traceback."""

from __future__ import annotations

import errno
import os

_FIXES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of the quota",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EACCES: "give this user the right to it, or name another folder",
    errno.EPERM: "give this user the right to it, or name another folder",
    errno.ENOTDIR: "name another folder",
    errno.EISDIR: "name a file",
    errno.EROFS: "name a folder on a disk that can be written",
}
"""What a file system refuses, and what the user can do about it."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, and what to do instead."""


class Interrupted(Exception):
    """A run was stopped by Ctrl-C or SIGTERM after saving its state; the message says how to resume."""


def describe(error: Exception) -> str:
    """One line for an error that the user can fix."""
    if isinstance(error, OSError) and (refusal := disk_refusal(error)):
        return f"{error.filename2 or error.filename or 'the output'}: {refusal}, and run it again"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}; give another path, and run it again"
    return one_line(error)


def one_line(text: object, most: int | None = None) -> str:
    """`text` without line breaks, cut after `most` characters."""
    return " ".join(str(text).split())[:most]


def disk_refusal(error: BaseException) -> str | None:
    """Cause and fix if the file system refused, as `permission denied; give this user …`; otherwise None.

    tensorstore has no class for it: its ValueErrors contain the system's message for the code.
    """
    code, text = getattr(error, "errno", None), str(error).lower()
    for known, fix in _FIXES.items():
        cause = os.strerror(known).lower()
        if code == known or (code is None and cause in text):
            return f"{cause}; {fix}"
    return None
