"""Options that the steps share: where they run, and how many damaged records they accept."""

from __future__ import annotations

import argparse

from infimed_jax.config import Data


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=("loky", "ray"), default="loky",
                        help="processes of this machine (loky), or a Ray cluster [%(default)s]")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=-1, help="processes [one for each processor]")
    parser.add_argument("--address", default="", help="of a running Ray cluster [one is started here]")


def add_max_bad_records(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-bad-records", type=float, default=Data.max_bad_records, metavar="SHARE",
                        help="of records that may be damaged; they are left out and named [%(default)s]")  # fmt: skip


def engine_of(args: argparse.Namespace):
    from data_prep.engine import Engine

    return Engine(args.engine, args.jobs, args.address)
