"""`data STEP`: raw sources to prepared datasets."""

from __future__ import annotations

import argparse

from launch.cli.arguments import add_group
from launch.commands.data import mixing, packing, quality, sources

STEPS = (sources, quality, mixing, packing)


def add(commands: argparse._SubParsersAction) -> None:
    steps = add_group(commands, "data", "Raw sources to prepared datasets.")
    for module in STEPS:
        module.add(steps)
