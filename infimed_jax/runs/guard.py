"""Guards of a run: a stop request ends it after a save, a step that hangs is reported, skipped updates are counted."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

from infimed_jax import signals
from infimed_jax.errors import Interrupted
from infimed_jax.runs.metrics import Row

log = logging.getLogger(__name__)


class Watchdog:
    """Log an error, once for each `beat`, if no other beat follows within `seconds`; 0 turns it off.

    It ends nothing: a slow file system may recover, and a scheduler has its own limit. Every process runs one, so hosts
    that wait for a collective report too; the one that waits for something else is the cause.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = (time.monotonic(), "start")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()

    def beat(self, doing: str) -> None:
        """Note what begins now, such as `step 7: waiting for data`."""
        self._last = (time.monotonic(), doing)

    def _watch(self) -> None:
        reported = 0.0
        while not self._stop.wait(min(self._seconds / 10, threading.TIMEOUT_MAX)):
            since, doing = self._last
            if since != reported and time.monotonic() - since > self._seconds:
                reported = since
                log.error(
                    "hung: %s for more than %g s (train.step_timeout) on host %s, process %d of %d; its threads follow",
                    doing,
                    self._seconds,
                    socket.gethostname(),
                    jax.process_index(),
                    jax.process_count(),
                )
                if sys.__stderr__ is not None:
                    faulthandler.dump_traceback(sys.__stderr__)


def skipped_in_a_row(rows: Sequence[Row], updates: int) -> int:
    """Skipped updates of the last steps, as far back as every step skipped all its `updates`.

    Of a step that skipped a part of them it is not known which ones.
    """
    skipped = itertools.takewhile(lambda row: row["skipped"] == updates, reversed(rows))
    return sum(row["skipped"] for row in skipped)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yield `asked(step) -> bool`, with the same answer in every process.

    In one process the first Ctrl-C or SIGTERM is a request, a second of either stops at once. In several, JAX's
    preemption service carries one process's SIGTERM to all and chooses the step; its own handler must stay in place. A
    request that came after the last step raises Interrupted at the end of the block, so that none is lost.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread alone
        yield lambda step: False
        return
    received = list(signals.early)  # one that was lost while the run started stops it after its first step

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
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
