"""TensorBoard's event file, written by the thread that trains.

tensorboardX's own SummaryWriter writes in a thread: on a full disk that thread dies, its queue fills, and the next
number waits for ever. Its protocol buffers and checksum are used here, its writers are not.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Board:
    """One run's scalars. On resume TensorBoard forgets what it read of steps from `first_step` on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        # Imports torch where it is installed: seconds.
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = file.open("ab", buffering=0)  # nothing is left to be written when it is closed
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._append(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """In the file when this returns; OSError where the disk is full."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _append(self, event: Any) -> None:
        """A TFRecord: the length and its checksum, the bytes and theirs."""
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        parts = (len(data).to_bytes(8, "little"), data)
        record = b"".join(part + masked_crc32c(part).to_bytes(4, "little") for part in parts)
        if self._file.write(record) < len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def close(self) -> None:
        self._file.close()
