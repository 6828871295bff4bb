"""`doctor`: whether this machine can run the package, and what to fix."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.cli.arguments import add_command, check_file
from launch.machine import accelerator

EXIT_SOMETHING_WRONG = 1


def add(commands: argparse._SubParsersAction) -> None:
    p = add_command(commands, "doctor", doctor, "Check versions, devices, cache, disk, attention and a tiny step.")
    accelerator.add_option(p)
    p.add_argument(
        "--output", type=Path, default=Path(), help="where runs will be written; its disk is checked [%(default)s]"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write the results of the checks")


def doctor(args: argparse.Namespace) -> None:
    from infimed_jax.files import write_json
    from launch.machine.checks import checks

    check_file("--json", args.json)
    found = []
    for check in checks(args.platform, args.output):
        found.append(check)
        print(f"{'ok   ' if check.ok else 'WRONG'}  {check.name}: {check.found}", flush=True)
        if check.fix:
            print(f"       fix: {check.fix}", flush=True)
    wrong = [check.name for check in found if not check.ok]
    print(f"{len(found) - len(wrong)} of {len(found)} checks are well" + (f"; wrong: {', '.join(wrong)}" * bool(wrong)))
    if args.json:
        write_json(args.json, [{"name": c.name, "ok": c.ok, "found": c.found, "fix": c.fix} for c in found])
        print(f"Outputs: {args.json}")
    if wrong:
        raise SystemExit(EXIT_SOMETHING_WRONG)
