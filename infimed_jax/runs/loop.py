"""The one loop under training and GRPO: step, record, save, stop, verify.

A run's folder holds config.yaml, tokenizer/, checkpoints/, metrics.jsonl, tensorboard/ and, once it is finished,
result.json and curve.png; it may be moved. The same command continues a stopped run exactly.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import yaml

from infimed_jax import config
from infimed_jax.cost.limits import refuse_sizes
from infimed_jax.data.chat import Tokenizer, load_tokenizer
from infimed_jax.errors import Interrupted, UserError, one_line
from infimed_jax.files import lock, make_folder, write_json
from infimed_jax.progress import progress_line
from infimed_jax.runs.checkpoint import CHECKPOINTS, Checkpoints, Metadata, keep_tokenizer
from infimed_jax.runs.curve import CURVE, draw_curve
from infimed_jax.runs.guard import Watchdog, skipped_in_a_row, stop_requests
from infimed_jax.runs.meter import averaged
from infimed_jax.runs.metrics import MetricsLog, Row
from infimed_jax.sharding import micro_batches, run_mesh

CONFIG = "config.yaml"
RESULT = "result.json"

State = TypeVar("State")
Beat = Callable[[str], None]
"""Tells the watchdog what begins now."""
OnStep = Callable[[int, int, Row], None]
"""`(step, total_steps, metrics)`; steps count from 1."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What every part of a run needs: its settings, its place on the disk and its place on the devices."""

    cfg: config.Config
    mesh: jax.sharding.Mesh
    pieces: int
    """Micro-batches of a global batch on this mesh."""
    tokenizer: Tokenizer
    folder: Path
    checkpoints: Checkpoints
    start: int
    """Step of the latest checkpoint, from which the run continues; 0 for a new run."""
    metrics: MetricsLog
    on_step: OnStep | None

    def finished(self, total: int) -> bool:
        return self.start == total and (self.folder / RESULT).exists()

    def announce(self, total: int) -> None:
        again = f", continued after step {self.start}" if self.start else ""
        log.info("%s: %d steps%s", self.cfg.train.stage, total, again)


@dataclass(frozen=True)
class Stepped:
    """What a step leaves to be recorded."""

    read: Callable[[], Row]
    """Returns the step's line of metrics.jsonl, with `skipped_ids`, its samples, where updates were skipped.

    Raises UserError where the run must end.
    """
    on_devices: bool = False
    """`read` waits for the devices: the next step is started before it, so that they never wait for the host."""


Step = Callable[[State, int, Beat], tuple[State, Stepped]]
"""`step(state, number, beat)`; the state is donated."""


@contextlib.contextmanager
def open_run(cfg: config.Config, on_step: OnStep | None = None) -> Iterator[Run]:
    """Open the folder `cfg.train.output`, made where it is absent; the run's mesh is current within the block."""
    if not cfg.train.output:
        raise config.ConfigError("train.output is empty: name the run's folder")
    mesh = run_mesh(cfg)
    refuse_sizes(cfg, mesh)  # as the next line, before anything is written
    pieces = micro_batches(cfg.train, mesh)
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    folder = Path(cfg.train.output)
    make_folder(folder)
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.callback(os.close, lock(folder, folder))
        checkpoints = Checkpoints(folder / CHECKPOINTS, cfg.train.keep_checkpoints)
        stack.callback(checkpoints.close)
        with jax.set_mesh(mesh):
            start = checkpoints.latest_step() or 0
            metrics = MetricsLog(folder, start, cfg, active=jax.process_index() == 0)
            yield Run(cfg, mesh, pieces, tokenizer, folder, checkpoints, start, metrics, on_step)


def run_steps(
    run: Run,
    state: State,
    step: Step[State],
    total: int,
    metadata: Callable[[], Metadata],
    *,
    updates: int = 1,
) -> State:
    """Run the steps `run.start + 1` to `total` and return the last state, saved and read back.

    `metadata` gives what a checkpoint of that moment carries. A row whose `skipped` equals `updates`, the number of
    updates in a step, is of a step that changed nothing. Raises Interrupted after Ctrl-C or SIGTERM, with the state
    saved; UserError where updates stay non-finite, or a checkpoint cannot be written or read back.
    """
    cfg, checkpoints, rows = run.cfg, run.checkpoints, run.metrics.rows
    if jax.process_index() == 0:
        values = yaml.safe_dump(config.to_dict(cfg), sort_keys=False)
        (run.folder / CONFIG).write_text(values, encoding="utf-8")
        keep_tokenizer(run.tokenizer, run.folder)
    unread: list[tuple[int, Stepped]] = []
    due = False
    with run.metrics, stop_requests() as asked, Watchdog(cfg.train.step_timeout) as watchdog:

        def record(keep: int = 0) -> None:
            """Record all steps but the latest `keep`."""
            while len(unread) > keep:
                number, stepped = unread.pop(0)
                _beat(watchdog, number, "waiting for its result")
                run.metrics.write(stepped.read())
                _check_skips(run, updates)
                _report(run, number, total)

        for number in range(run.start + 1, total + 1):
            checkpoints.wait(0)  # raises the errors of the save under way
            state, stepped = step(state, number, partial(_beat, watchdog, number))
            unread.append((number, stepped))
            record(keep=int(stepped.on_devices))
            stop, last = asked(number), number == total
            due |= number % cfg.train.checkpoint_every == 0
            if stop or due or last:
                record()
            # In a run of skipped updates saves would push out the states from before it.
            if stop or last or (due and rows[-1]["skipped"] < updates):
                due = False
                _beat(watchdog, number, "saving")
                checkpoints.save(number, state, metadata() | {"step": number})
            if stop and not last:
                checkpoints.wait()
                raise Interrupted(
                    f"{cfg.train.stage} stopped after step {number} of {total} and saved in {cfg.train.output}: "
                    "the same command continues from there"
                )
    checkpoints.wait()
    checkpoints.verify(total, state)
    return state


def write_result(run: Run, result: Any) -> None:
    """Write result.json, all fields of the dataclass `result` but `params` and `history`, and the history's curve."""
    if jax.process_index() == 0:
        draw_curve(result.history, f"{run.cfg.train.stage}: {run.folder}", run.folder / CURVE)
        values = {name: value for name, value in vars(result).items() if name not in ("params", "history")}
        write_json(run.folder / RESULT, values)


def read_result(run: Run) -> dict[str, Any]:
    """UserError where the file is damaged."""
    file = run.folder / RESULT
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({one_line(error)}): remove it and run the same command") from error
    return dict(values)


def few(ids: Sequence[str], most: int = 8) -> str:
    """The first of `ids`, and how many more there are."""
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def _beat(watchdog: Watchdog, number: int, doing: str) -> None:
    watchdog.beat(f"step {number}: {doing}")


def _report(run: Run, number: int, total: int) -> None:
    rows, every = run.metrics.rows, run.cfg.train.log_every
    if number % every == 0 or number == total:
        log.info(progress_line(number, total, averaged(rows[-min(every, number - run.start) :])))
    if run.on_step is not None:
        run.on_step(number, total, rows[-1])


def _check_skips(run: Run, updates: int) -> None:
    """End a run whose parameters have turned to NaN, which would compute for ever."""
    rows = run.metrics.rows
    in_a_row = skipped_in_a_row(rows, updates)
    if 0 < run.cfg.train.max_skipped_updates <= in_a_row:
        raise UserError(
            f"{in_a_row} updates in a row had a non-finite loss or gradient, the last at step {rows[-1]['step']} on "
            f"samples {few(rows[-1]['skipped_ids'])}: continue in {run.checkpoints.elsewhere()}, with a lower "
            "optimizer.learning_rate or without these samples"
        )
