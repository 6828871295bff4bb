"""`settings`: what each setting means, printed from its own declaration."""

from __future__ import annotations

import argparse
from pathlib import Path

from infimed_jax.config import load_groups
from launch.cli.arguments import add_command
from launch.cli.help import render


def add(commands: argparse._SubParsersAction) -> None:
    text = "What each setting means: default, type, limits, unit, published value and source."
    p = add_command(commands, "settings", settings, text)
    p.add_argument(
        "--config", action="append", default=[], type=Path, metavar="FILE", help="show the values of these files"
    )
    names = "a group or setting, such as train.lora or train.steps [all]; values are those after NAME=VALUE"
    p.add_argument("names", nargs="*", metavar="NAME", help=names)


def settings(args: argparse.Namespace) -> None:
    values = [name for name in args.names if "=" in name]
    print(render([name for name in args.names if "=" not in name], load_groups(args.config, values)))
