"""A profiler's trace of a few steps, for TensorBoard or Perfetto."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax

FOLDER = "profile"

log = logging.getLogger(__name__)


class Trace:
    """Traces `steps` steps from step `first` on into the run's `profile/`; 0 steps trace nothing."""

    def __init__(self, folder: Path, first: int, steps: int) -> None:
        self._folder = folder / FOLDER
        self._first, self._last = first, first + steps - 1
        self._running = False

    def before(self, step: int) -> None:
        if step == self._first <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, outputs: Any) -> None:
        """Ends the trace once the last step's `outputs` are there."""
        if self._running and step >= self._last:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Also where a run ends sooner: what was traced is written."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            log.info(
                "profile: %s (open it with TensorBoard's profile plugin, or the .json.gz with Perfetto)", self._folder
            )
