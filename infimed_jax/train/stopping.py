"""Ctrl-C, SIGTERM and preemption notices: a run finishes its step, saves, and says how to go on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from infimed_jax.errors import Interrupted


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields `asked(step) -> bool`, the same answer on every process.

    In one process the first Ctrl-C or SIGTERM asks, a second Ctrl-C stops at once. In several, JAX's preemption
    service carries one process's SIGTERM to all and chooses the step; its own handler must stay in place.
    A request that came too late for any step raises Interrupted at the end of the block, so that none is lost.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread alone
        yield lambda step: False
        return
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda step: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        raise Interrupted("stopped after the last step, which is saved: the same command ends the run")
