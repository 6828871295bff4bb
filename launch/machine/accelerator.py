"""Which accelerator was requested, and whether it is there: a fall-back to the CPU is an error, not a warning."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Mapping

from infimed_jax.errors import UserError, one_line
from launch.machine import distributed
from launch.machine.distributed import tpu_chips

PLATFORMS = ("cpu", "gpu", "tpu")
_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_NAMES = {"cuda": "gpu", "rocm": "gpu"}
"""JAX's names for what the options call gpu."""
_NO_ROOM = re.compile(r"RESOURCE_EXHAUSTED|out of memory|exceeded hbm capacity", re.IGNORECASE)
"""The messages of the runtime, and of a TPU's compiler."""
_ROOM = {
    "train": "train.rows_per_device=1, train.remat=full, train.lora.rank=16, or more devices; `plan` says what fits",
    "grpo": "train.rows_per_device=1, train.remat=full, fewer sampling.slots, or more devices; `plan` says what fits",
}
"""Settings that need less memory, by command."""


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--platform", choices=PLATFORMS, help="run there or not at all [what is installed]")


def requested(platform: str | None, environ: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """(platform, what requests it): the option, then JAX_PLATFORMS, then what is installed; None for nothing.

    libtpu counts only if a TPU is on the bus: otherwise it is there to compile ahead of time (`plan`).
    """
    if platform:
        return platform, "--platform"
    first = environ.get("JAX_PLATFORMS", "").split(",")[0].strip()
    if first:
        return _NAMES.get(first, first), "JAX_PLATFORMS"
    plugin = next((name for name in _CUDA_PLUGINS if importlib.util.find_spec(name)), None)
    if plugin:
        return "gpu", f"the installed {plugin}"
    if tpu_chips():
        return "tpu", "a TPU on this host's bus"
    return None


def start(args: argparse.Namespace) -> None:
    """Join the other processes and select the requested platform, before a command asks JAX for a device.

    `args.hosts` is "many" for a command that runs on several hosts, otherwise "one". UserError if that is impossible.
    """
    select(args.platform)
    # JAX takes three quarters of a GPU by itself; beside a large model there is nothing else to leave room for.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    processes = distributed.detect(args)
    if processes and processes.count > 1 and args.hosts == "one":
        raise UserError(f"{args.command} runs in one process, but there are {processes}; start it on one host alone")
    if processes:
        print(processes, flush=True)
        distributed.initialize(processes)
    check(args.platform)


def refuse_hosts(args: argparse.Namespace) -> None:
    """UserError if a command that runs on one host is given several."""
    given = args.coordinator or args.num_processes or args.process_id is not None
    if given and not hasattr(args, "hosts"):
        raise UserError(
            f"{args.command} runs in one process: --coordinator, --process-id and --num-processes are for train"
        )


def select(platform: str | None) -> None:
    """Pass an explicit `--platform` on to JAX; before JAX is imported."""
    if platform:
        os.environ["JAX_PLATFORMS"] = "cuda" if platform == "gpu" else platform


def check(platform: str | None) -> str:
    """The platform JAX runs on; UserError if another was requested. Starts JAX's backend."""
    wanted = requested(platform)
    import jax

    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter where no plugin offers that platform
        who = f" ({wanted[0]} was requested by {wanted[1]})" if wanted else ""
        reason = one_line(error, 200) or "no plugin for it is installed"
        raise UserError(f"JAX cannot start{who}: {reason}; {fix_for(wanted[0] if wanted else '')}") from error
    if wanted and found != wanted[0]:
        raise UserError(f"{wanted[0]} was requested by {wanted[1]}, but JAX found only {found}: {fix_for(wanted[0])}")
    return found


def out_of_memory(error: BaseException, command: str) -> str | None:
    """The message if a device has no room, while it compiles or runs; None for any other error."""
    jax = sys.modules.get("jax")
    text = one_line(error)
    if jax is None or not isinstance(error, jax.errors.JaxRuntimeError) or not _NO_ROOM.search(text):
        return None
    fix = _ROOM.get(command, "a smaller sampling.slots or context, or more devices")
    return f"out of memory on a device ({text[:200]}): {fix}"


def fix_for(platform: str) -> str:
    """What to do if `platform` was requested and is not there."""
    torch = "; a torch with CUDA in the same environment brings other CUDA libraries: remove it" if torch_cuda() else ""
    return {
        "gpu": "see nvidia-smi, pip install -e '.[cuda]', or --platform cpu to mean the CPU" + torch,
        "tpu": "pip install -e '.[tpu]' on the TPU VM, one process a host; or --platform cpu to mean the CPU",
    }.get(platform, "look at JAX_PLATFORMS, and run `doctor`")


def torch_cuda() -> str:
    """The version of an installed torch that was built with CUDA, otherwise ''; does not import it."""
    from importlib import metadata

    try:
        version = metadata.version("torch")
        needs = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return ""
    if "+cpu" in version:
        return ""
    built_with_cuda = "+cu" in version or any(name.startswith(("nvidia-", "cuda-")) for name in needs)
    installed = any(importlib.util.find_spec(name) for name in ("nvidia",))
    return version if built_with_cuda and installed else ""
