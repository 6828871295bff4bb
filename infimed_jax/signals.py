"""Ctrl-C and SIGTERM while a command starts, before a run listens for them itself."""

from __future__ import annotations

import signal
from types import FrameType

early: list[int] = []
"""Signals that came. The KeyboardInterrupt of one may be lost: JAX ignores it inside a callback, and an extension that
is being imported turns it into an error of its own."""


def listen() -> None:
    """Let both signals raise KeyboardInterrupt, and be remembered in `early`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    early.append(number)
    raise KeyboardInterrupt
