"""What the steps share: where they run, and their progress bar."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator

from infimed_jax.config import Data

_EVERY = 0.1
"""Seconds between two drawings: a stream tells of each record."""


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=("loky", "ray", "dask", "spark"), default="loky",
                        help="processes of this machine (loky), or a cluster [%(default)s]")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=-1, help="processes [one a processor]")
    parser.add_argument("--address", default="", help="of a ray or dask cluster that runs [one is started here]")


def add_max_bad_records(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-bad-records", type=float, default=Data.max_bad_records, metavar="SHARE",
                        help="of the records that may be damaged; they are left out by name [%(default)s]")  # fmt: skip


def engine_of(args: argparse.Namespace):
    from data_prep.engine import Engine

    return Engine(args.engine, args.jobs, args.address)


@contextlib.contextmanager
def bar(title: str, what: str = "shards") -> Iterator[Callable[..., None]]:
    """`told(done, total, note)` moves the bar; of a stream, whose end is not known, `total` is 0."""
    from launch.progress import ChainProgress

    last = 0.0

    def told(done: int, total: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _EVERY or done == total:
            last = now
            share, of = (done / total, f"/{total:,}") if total else (0.0, "")
            chain.update(share, note or f"{done:,}{of} {what}")

    with ChainProgress({title: 1.0}) as chain:
        chain.begin(title)
        yield told
