"""Progress bars with the time left in a terminal, plain lines elsewhere: of one step, or of a chain of them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from infimed_jax.progress import Report, clock, progress_line

LINE_EVERY = 15.0
"""Seconds between plain lines where the output is no terminal (a log file, CI)."""

DRAW_EVERY = 0.1
"""Seconds between two drawings: a stream reports every record."""


class ChainProgress:
    """Shows which of `steps` runs, its progress, and the time that the whole chain still needs.

    `steps` maps each title to its usual share of the time (any unit). The estimate scales the remaining shares by
    the speed so far, so it is right on a slower machine too.
    """

    def __init__(self, steps: Mapping[str, float]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.steps = dict(steps)
        self.console = Console(stderr=False)
        self.live = sys.stdout.isatty()
        self.started = time.monotonic()
        self.finished: set[str] = set()
        self.spared = 0.0  # shares of steps that an earlier run finished: they cost no time in this process
        self.current, self.share, self.last_line = "", 0.0, 0.0
        self.bar = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=36), TextColumn("{task.fields[note]}"),
            console=self.console, transient=True, disable=not self.live,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=1.0, note="")

    def __enter__(self) -> ChainProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        """Print a line that stays above the bar."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def begin(self, title: str) -> None:
        self.current, self.share, self.last_line = title, 0.0, time.monotonic()
        self._draw("")

    def update(self, share: float, note: str) -> None:
        """`share` of the current step is done."""
        self.share = min(max(share, 0.0), 1.0)
        self._draw(note)

    def end(self, note: str, *, spared: bool = False) -> None:
        """Finish the current step; `spared` if an earlier run had finished it."""
        self.finished.add(self.current)
        if spared:
            self.spared += self.steps[self.current]
        number = f"[{len(self.finished):2}/{len(self.steps)}]"
        self.say(f"{number} {self.current:<34} {note}  ({clock(time.monotonic() - self.started)}, {self._left()})")
        self.current = ""

    def _left(self) -> str:
        total = sum(self.steps.values())
        done = sum(self.steps[t] for t in self.finished) + self.share * self.steps.get(self.current, 0.0) * bool(
            self.current
        )
        worked = done - self.spared
        if done >= total:
            return "done"
        if worked < 0.02 * total:
            return "estimating the time left"
        return f"{clock((total - done) * (time.monotonic() - self.started) / worked)} left"

    def _draw(self, note: str) -> None:
        total = sum(self.steps.values())
        done = sum(self.steps[t] for t in self.finished) + self.share * self.steps.get(self.current, 0.0)
        note = f"{note}  {self._left()}".strip()
        self.bar.update(self.task, description=self.current, completed=done / total, note=note)
        now = time.monotonic()
        if not self.live and now - self.last_line >= LINE_EVERY:
            self.last_line = now
            self.say(f"        {self.current}: {self.share:.0%}  {note}")


@contextlib.contextmanager
def progress_bar(title: str, what: str = "shards") -> Iterator[Report]:
    """One step's bar; a report with an empty note shows `done/total what`."""
    last = 0.0

    def report(done: int, total: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= DRAW_EVERY or done == total:
            last = now
            share, of = (done / total, f"/{total:,}") if total else (0.0, "")
            chain.update(share, note or f"{done:,}{of} {what}")

    with ChainProgress({title: 1.0}) as chain:
        chain.begin(title)
        yield report


def step_reports(report: Report) -> Callable[[int, int, Mapping[str, Any]], None]:
    """What `train` and `grpo` call after each step: step, loss and reward go to `report`."""

    def on_step(step: int, total: int, row: Mapping[str, Any]) -> None:
        report(step, total, progress_line(step, total, {name: row[name] for name in ("loss", "reward") if name in row}))

    return on_step
