"""What the steps that run over shards share: where they run, and their progress bar."""

from __future__ import annotations

import argparse


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=("loky", "ray", "dask", "spark"), default="loky",
                        help="processes of this machine, or a cluster through joblib [%(default)s]")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="processes; -1 is one a processor [%(default)s]")
    parser.add_argument("--address", default="", help="of a ray or dask cluster that runs [one is started here]")


def engine_of(args: argparse.Namespace):
    from data_prep.engine import Engine

    return Engine(args.engine, args.jobs, args.address)
