"""Names a step that hangs: a lost host or a stuck reader would else keep a pod waiting without a word."""

from __future__ import annotations

import faulthandler
import logging
import socket
import sys
import threading
import time
from types import TracebackType

import jax

log = logging.getLogger(__name__)


class Watchdog:
    """Logs an error, once for each `beat`, where no other follows within `seconds`; 0 turns it off.

    It ends nothing: a slow file system may recover, and a scheduler has its own limit. Every process runs one, so the
    hosts that wait for a collective name themselves too; the one that waits for something else is the culprit.
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
        """What begins now, such as `step 7: waiting for data`."""
        self._last = (time.monotonic(), doing)

    def _watch(self) -> None:
        reported = 0.0
        while not self._stop.wait(self._seconds / 10):
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
                faulthandler.dump_traceback(sys.__stderr__)
