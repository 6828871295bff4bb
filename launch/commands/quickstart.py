"""`quickstart`: the whole recipe on one small machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.commands.arguments import add_command, add_settings
from launch.commands.declare import build


def add(commands: argparse._SubParsersAction) -> None:
    text = "The whole recipe on a tiny model: data, five stages, GRPO, report, export."
    p = add_command(commands, "quickstart", quickstart, text)
    p.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="the run's folder [%(default)s]")
    p.add_argument("--source", default="phantom", help="phantom (embedded) or vqa_rad [%(default)s]")
    p.add_argument("--input", type=Path, help="the source's folder; the embedded phantoms need none")
    p.add_argument("--tokenizer", type=Path, help="a Qwen3 tokenizer folder [a small one is made from the data]")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--resume", action="store_true", help="continue the run that is in the folder")
    p.add_argument("--overwrite", action="store_true", help="delete the run that is in the folder")
    add_settings(p, files=False)


def quickstart(args: argparse.Namespace) -> None:
    from launch.demo.chain import Options
    from launch.demo.quickstart import quickstart

    quickstart(build(Options, args))
