"""`quickstart`: the whole recipe on one small machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.cli.arguments import add_command, add_settings
from launch.cli.declare import add_fields, build


def add(commands: argparse._SubParsersAction) -> None:
    text = "Run the whole recipe on a tiny model: data, five stages, GRPO, report, export."
    p = add_command(commands, "quickstart", quickstart, text)
    p.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="the run's folder [%(default)s]")
    add_fields(p, "launch.demo.chain:Options", ("source", "input", "tokenizer", "seed", "resume", "overwrite"))
    add_settings(p, files=False)


def quickstart(args: argparse.Namespace) -> None:
    from launch.demo.chain import Options
    from launch.demo.quickstart import quickstart

    quickstart(build(Options, args))
