"""The commands of `launch/run.py`, a module each: their arguments, and the call that each one is.

Each imports what it needs when it runs: `--help` must not wait for JAX.
"""

from __future__ import annotations

import argparse

from launch.commands import compare, convert, data, doctor, evaluate, generate, grade, plan, quickstart, settings, train

MODULES = (quickstart, train, evaluate, grade, compare, generate, data, convert, plan, settings, doctor)


def add_commands(commands: argparse._SubParsersAction) -> None:
    for module in MODULES:
        module.add(commands)
