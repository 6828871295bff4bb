"""The one entry: `python launch/run.py COMMAND --help`, or `infimed COMMAND --help` once installed by pip.

A user's mistake ends with one line and exit code 2 (`--debug` shows the traceback); a run that was interrupted, or lost
one of its processes, and can be resumed ends with exit code 75. If one of several processes fails, it leaves at once:
the others must not wait for it. Heavy imports happen inside the commands, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

sys.path.insert(len(sys.path) if __package__ else 0, str(Path(__file__).resolve().parents[1]))  # first for a script

from infimed_jax import signals
from infimed_jax.errors import Interrupted, UserError, describe
from launch import commands
from launch.machine import accelerator, distributed

EXIT_FAULT = 1  # a traceback, as Python's own
EXIT_USER_ERROR = 2
EXIT_RESUME_ME = 75  # EX_TEMPFAIL: schedulers take it for "run the same command again"


def configure_jax() -> None:
    """Environment that must be set before JAX is imported; what the user has set stays."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "infimed_jax" / "compiled"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    virtual = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    if virtual.isdigit() and int(virtual) > 1:
        # A waiting collective blocks a thread: with one thread a device, two of them could block all for ever.
        os.environ.setdefault("NPROC", str(8 * int(virtual)))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every folder is given by path: nothing is looked up
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main(arguments: list[str] | None = None) -> int:
    if sys.stdout is None:  # closed by the caller, as `>&-` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    prog = "infimed" if Path(sys.argv[0]).stem == "infimed" else "launch/run.py"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    distributed.add_options(parser)
    commands.add_commands(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    args = parse(parser, arguments)
    configure_jax()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for chatty in ("jax", "orbax", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    quiet_after_failed_saves()
    try:
        refuse_addresses(args)
        accelerator.refuse_hosts(args)
        args.run(args)
        return 0
    except Interrupted as stop:  # all processes together, after the same step
        print(f"\n{stop}", file=sys.stderr)
        return EXIT_RESUME_ME
    except (Exception, KeyboardInterrupt) as error:
        code = report_error(error, args)
        if not distributed.joined():
            if code is None:
                raise
            return code
        if code is None:
            traceback.print_exc()
        distributed.leave(EXIT_FAULT if code is None else code)


def report_error(error: BaseException, args: argparse.Namespace) -> int | None:
    """Print one line for the error that ended a command and return the exit code; None if it needs a traceback."""
    if isinstance(error, BrokenPipeError):
        return None
    mistake = isinstance(error, (UserError, OSError))
    if isinstance(error, KeyboardInterrupt) or (signals.early and not mistake):
        # Wherever it was: a run may have saved nothing yet, and an answer keeps nothing.
        print("\nInterrupted: the same command goes on from what is saved, or else from the start.", file=sys.stderr)
        return EXIT_RESUME_ME
    line = describe(error) if mistake else accelerator.out_of_memory(error, args.command)
    if line and not args.debug:
        print(f"error: {line}", file=sys.stderr)
        return EXIT_USER_ERROR
    if lost := distributed.lost_another(error):
        print(f"\n{lost}", file=sys.stderr)
        return EXIT_RESUME_ME
    return None


def refuse_addresses(args: argparse.Namespace) -> None:
    """UserError for gs://bucket/x, which pathlib reads as a folder `gs:` of this machine."""
    for value in vars(args).values():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path) and re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
                raise UserError(f"{path} is an address, and only folders are read and written: mount it, and name that")


def quiet_after_failed_saves() -> None:
    """Orbax raises what its threads also log, or print when they find its loop closed: pages, on a full disk."""
    for second in ("absl", "asyncio"):
        logging.getLogger(second).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Settings may stand anywhere among the options; argparse takes the first group of them and leaves the rest."""
    args, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(args, "settings") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.settings = [*args.settings, *rest]
    return args


def start() -> NoReturn:
    """The console command: as Ctrl-C, SIGTERM means "resume me" too, also while a run starts and no step runs yet."""
    signals.listen()
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(EXIT_FAULT)


if __name__ == "__main__":
    # A script's own folder is in the path: there our distributed.py would hide an installed package of that name.
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    start()
