"""`plan`: whether a configuration fits a machine, and how fast it can be there, without the machine."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from infimed_jax.errors import UserError
from launch.cli.arguments import add_command, add_settings, check_file

if TYPE_CHECKING:
    from infimed_jax.config import Mesh


def add(commands: argparse._SubParsersAction) -> None:
    p = add_command(
        commands, "plan", plan, "Estimate memory, FLOPs and a bound on the step's time for TPU slices and GPUs."
    )
    p.add_argument("--topology", action="append", default=[], metavar="NAME",
                   help="v5p:4x4x8 (chips of a TPU slice), h100x32 (GPUs); repeatable")  # fmt: skip
    p.add_argument("--mesh", action="append", default=[], metavar="AXES",
                   help="data=2,fsdp=16,tensor=1; axes left out are 1, -1 takes the rest; repeatable "
                        "[the configuration's mesh]")  # fmt: skip
    p.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    p.add_argument("--no-compile", action="store_true", help="count only, in seconds: every memory is an estimate")
    add_settings(p)


def plan(args: argparse.Namespace) -> None:
    from infimed_jax.config import load, to_dict
    from infimed_jax.cost.chips import parse_topology

    config = load(args.config, args.settings)
    if not args.topology:
        raise UserError("plan needs a machine: --topology v5p:4x4x8, or h100x32; repeat it to compare")
    topologies = [parse_topology(name) for name in args.topology]
    meshes = [parse_mesh(text) for text in args.mesh] or [config.mesh]
    check_file("--json", args.json)
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs: an accelerator here stays untouched
    from infimed_jax.files import write_json
    from infimed_jax.plan import table
    from infimed_jax.plan.cell import best_first, compiled, counted
    from infimed_jax.plan.compile import HOW_TO_GET_IT, find_libtpu
    from infimed_jax.plan.roofline import ASSUMPTIONS

    # All are counted before any is compiled, so that a mesh that cannot be is answered at once.
    cells = [counted(config, topology, mesh) for topology in topologies for mesh in meshes]
    print(table.heading(cells[0]))
    library = None if args.no_compile else find_libtpu()
    on_tpu = [i for i, cell in enumerate(cells) if cell["chip"]["tpu"]]
    if on_tpu and library is None and not args.no_compile:
        print(HOW_TO_GET_IT)
    since, compiling = time.monotonic(), 0
    for number, i in enumerate(on_tpu if library else [], start=1):
        cells[i] = cell = compiled(cells[i], config, library)
        compiling += not cell["compiled"]["kept"]
        left = (len(on_tpu) - number) * (time.monotonic() - since) / compiling if compiling else 0
        how = "kept" if cell["compiled"]["kept"] else f"compiled in {cell['compiled']['seconds']:.0f} s"
        axes = ",".join(map(str, cell["mesh"].values()))
        print(f"[{number}/{len(on_tpu)}] {cell['topology']} {axes}: {how}, {left / 60:.0f} min left", flush=True)
    cells = best_first(cells)
    print(f"\n{table.render(cells)}\n\n{table.notes()}")
    if args.json:
        write_json(args.json, {"config": to_dict(config), "assumptions": ASSUMPTIONS, "cells": cells})
        print(f"Outputs: {args.json}")


def parse_mesh(text: str) -> Mesh:
    """`data=2,fsdp=-1` as config.Mesh; UserError for another axis or a size that is no number."""
    from infimed_jax.config import Mesh

    known = [field.name for field in dataclasses.fields(Mesh)]
    sizes = dict.fromkeys(known, 1)
    for part in text.split(","):
        axis, equals, size = part.strip().partition("=")
        if axis not in known or not equals or not size.removeprefix("-").isdigit():
            raise UserError(f"--mesh {text!r} must look like data=2,fsdp=16,tensor=1 (axes: {', '.join(known)})")
        sizes[axis] = int(size)
    return Mesh(**sizes)
