"""A run's metrics: one line a step in metrics.jsonl, TensorBoard, Weights & Biases, and a line for people."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infimed_jax import config
from infimed_jax.errors import UserError
from infimed_jax.files import to_json, write_text

Row = dict[str, Any]
"""One step's line of metrics.jsonl."""

METRICS, DAMAGED = "metrics.jsonl", "metrics.damaged.jsonl"

log = logging.getLogger(__name__)


class MetricsLog:
    """metrics.jsonl (every step), TensorBoard and Weights & Biases (every `train.log_every` steps) of one run.

    A context manager: files are opened on entry, and none is written where it is not `active`. On resume, lines past
    `start_step` are dropped, since those steps run again.
    """

    def __init__(self, folder: Path, start_step: int, cfg: config.Config, *, active: bool = True) -> None:
        rows, self._damaged = _read(folder / METRICS)
        self.rows = [row for row in rows if row["step"] <= start_step]
        self._folder, self._start_step, self._cfg, self._active = folder, start_step, cfg, active

    def __enter__(self) -> MetricsLog:
        """UserError, on every process, where `train.wandb` is set and its package is not installed."""
        wandb = _wandb_package(self._cfg) if self._cfg.train.wandb else None
        if self._active:
            self._wandb = _wandb_run(wandb, self._folder, self._cfg) if wandb else None
            if self._damaged:
                log.warning("the damaged %s is kept as %s", METRICS, DAMAGED)
                shutil.copyfile(self._folder / METRICS, self._folder / DAMAGED)
            write_text(self._folder / METRICS, "".join(map(_line, self.rows)))
            self._file = (self._folder / METRICS).open("a", encoding="utf-8", buffering=1)
            self._board = Board(self._folder / "tensorboard", self._start_step + 1)
        return self

    def write(self, row: Row) -> None:
        self.rows.append(row)
        if not self._active:
            return
        self._file.write(_line(row))
        if row["step"] % self._cfg.train.log_every == 0:
            numbers = {name: value for name, value in row.items() if name != "step" and not isinstance(value, list)}
            self._board.write(numbers, row["step"])
            if self._wandb:
                self._wandb.log(numbers, step=row["step"])

    def __exit__(self, *_: object) -> None:
        """Close each file, also where closing another one fails on a full disk."""
        if not self._active:
            return
        with contextlib.ExitStack() as stack:
            stack.callback(self._file.close)
            stack.callback(self._board.close)
            if self._wandb:
                stack.callback(self._wandb.finish)


class Board:
    """TensorBoard's event file of one run; on resume TensorBoard forgets what it read of steps from `first_step` on.

    Where the disk refuses a write, a warning says so and the board ends: metrics.jsonl is the record. (tensorboardX's
    SummaryWriter writes in a thread: on a full disk that thread dies, its queue fills, and the next number waits for
    ever. Its synchronous writer is used here.)
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        # Imports torch where it is installed: seconds.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._writer: Any = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        self._append(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """In the file when this returns."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._append(Event(step=step, summary=Summary(value=values)))

    def _append(self, event: Any) -> None:
        if self._writer is None:
            return
        event.wall_time = time.time()
        try:
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            log.warning("TensorBoard gets no more numbers (%s); metrics.jsonl goes on", error)
            self.close()

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):  # raised again for the bytes that were not written
                writer.close()


def _wandb_package(cfg: config.Config) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"train.wandb={cfg.train.wandb} needs the wandb package: pip install wandb") from error
    return wandb


def _wandb_run(wandb: Any, folder: Path, cfg: config.Config) -> Any:
    """The run's page; its id is kept in the folder, so that a resumed run goes on there."""
    file = folder / "wandb_id.txt"
    if not file.exists():
        file.write_text(secrets.token_hex(8), encoding="utf-8")
    return wandb.init(
        project=cfg.train.wandb,
        name=f"{cfg.train.stage} {folder.name}",
        id=file.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(folder),
        config=config.to_dict(cfg),
    )


def read_metrics(folder: str | Path) -> list[Row]:
    """Lines of a run's metrics.jsonl, null read as the NaN it was; none where there is no file.

    A line cut by a kill is left out. So are damaged ones, as a power loss leaves them: a warning counts them.
    """
    return _read(Path(folder) / METRICS)[0]


def _read(file: Path) -> tuple[list[Row], int]:
    """The rows, and how many lines are damaged."""
    if not file.exists():
        return [], 0
    rows, damaged = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:  # the rest was never finished
        try:
            row = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
            if type(row["step"]) is not int:
                raise ValueError
            rows.append(row)
        except (ValueError, AttributeError, KeyError, RecursionError):
            damaged += 1
    if damaged:
        log.warning("%s has %d damaged lines, which are left out", file, damaged)
    return rows, damaged


def _line(row: Row) -> str:
    return to_json(row) + "\n"
