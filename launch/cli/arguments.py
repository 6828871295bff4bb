"""What the commands' parsers share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from infimed_jax.config import load_groups
from infimed_jax.errors import UserError
from launch.cli.help import render
from launch.machine import accelerator, distributed

Run = Callable[[argparse.Namespace], None]


class Help(argparse.Action):
    """Prints the help, and below it the groups of settings that the command reads (`add_settings`) and their values."""

    def __call__(self, parser, namespace, values, option=None) -> None:
        parser.print_help()
        if groups := getattr(namespace, "setting_groups", ()):
            try:
                shown = render(groups, load_groups(namespace.config, namespace.settings))
            except UserError as error:
                parser.exit(2, f"error: {error}\n")
            print(f"\nsettings:\n\n{shown}")
        parser.exit()


def add_command(commands: argparse._SubParsersAction, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """Add a command that calls `run(args)`; `text` is its help, one line."""
    parser = commands.add_parser(name, help=text, description=text, add_help=False)
    parser.add_argument(
        "-h", "--help", action=Help, nargs=0, default=argparse.SUPPRESS, help="show this help message and exit"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def add_group(commands: argparse._SubParsersAction, name: str, text: str) -> argparse._SubParsersAction:
    """Add a command that only holds others: `run.py NAME STEP …`."""
    parser = commands.add_parser(name, help=text, description=text)
    return parser.add_subparsers(dest=f"{name}_step", required=True, metavar="STEP")


def add_devices(parser: argparse.ArgumentParser, *, hosts: str) -> None:
    """The main parser's options, here too: `hosts` is "many" for a command that runs on several, otherwise "one"."""
    accelerator.add_option(parser)
    distributed.add_options(parser, default=argparse.SUPPRESS)
    parser.set_defaults(hosts=hosts)


def check_file(option: str, file: Path | None) -> None:
    """UserError if the file that `option` names cannot be written; called before the work, not after it."""
    if file is None:
        return
    if file.is_dir():
        raise UserError(f"{option} {file} is a folder: name a file in it")
    if not file.absolute().parent.is_dir():
        raise UserError(f"{option} {file}: there is no folder {file.parent}: make it, or name another")


def add_settings(parser: argparse.ArgumentParser, *, files: bool = True, shown: Sequence[str] = ()) -> None:
    """Settings on the command line, and in YAML files if `files`; `--help` prints the groups `shown`."""
    if files:
        parser.add_argument("--config", action="append", default=[], type=Path, metavar="FILE",
                            help="YAML settings, repeatable; later files override earlier ones")  # fmt: skip
    where = "listed below" if shown else "`settings` lists them"
    parser.add_argument(
        "settings", nargs="*", default=[], metavar="SETTING=VALUE", help=f"such as train.steps=20; {where}"
    )
    parser.set_defaults(setting_groups=shown)
