"""One process a host: which processes there are, from the command line, SLURM, or a TPU slice's own environment.

They are printed in one line before the connection is tried, so that a run that waits for a host names it.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from infimed_jax.errors import UserError, one_line

_PORT_RANGE = (61440, 65536)
"""Range of a job's own port, so that two jobs on one host do not collide."""
_GOOGLE_PCI_VENDOR = "0x1ae0"
_CONNECT_SECONDS = 300
_LOST = re.compile(r"Gloo|NCCL|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|heartbeat|by peer")
"""The runtime's messages for a collective that another process left."""


@dataclass(frozen=True)
class Processes:
    """How this process joins the others."""

    found_by: str
    """command line, SLURM, or TPU slice (where JAX itself reads the metadata server or GKE's variables)."""
    coordinator: str = ""
    """HOST:PORT of process 0; empty where JAX finds it."""
    number: int = 0
    """Number of this process."""
    count: int = 0
    """Processes in all; 0 where JAX finds it."""
    devices: tuple[int, ...] | None = None
    """GPUs of this process on its host; None: all that are visible."""

    def __str__(self) -> str:
        if not self.count:
            return f"processes: those of the {self.found_by}"
        whose = "all devices of its host" if self.devices is None else f"GPU {', '.join(map(str, self.devices))}"
        return f"processes: {self.number} of {self.count} by {self.found_by}, coordinator {self.coordinator}, {whose}"


def add_options(parser: argparse.ArgumentParser, *, default: object = None) -> None:
    """`default=argparse.SUPPRESS` lets a command repeat the options of the main parser without undoing them."""
    group = parser.add_argument_group("several hosts", "found by itself under SLURM (srun) and on TPU slices")
    group.add_argument("--coordinator", metavar="HOST:PORT", default=default, help="address of process 0, by hand")
    group.add_argument("--process-id", type=int, metavar="I", default=default, help="this process, from 0")
    group.add_argument("--num-processes", type=int, metavar="N", default=default, help="all of them; 1: this one alone")


def detect(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Processes | None:
    """The processes that `args` or the environment name; None for a process alone.

    Raises UserError for options that do not belong together, and for a SLURM allocation of several tasks that was
    entered without srun: each would otherwise train by itself.
    """
    given = {"--coordinator": args.coordinator, "--process-id": args.process_id, "--num-processes": args.num_processes}
    if args.num_processes == 1 and args.coordinator is None and args.process_id in (None, 0):
        return None
    if any(value is not None for value in given.values()):
        return _by_hand(given)
    return _slurm(environ) or _tpu_slice(environ)


def _by_hand(given: Mapping[str, str | int | None]) -> Processes:
    absent = [name for name, value in given.items() if value is None]
    if absent:
        raise UserError(f"several processes by hand need --coordinator, --process-id and --num-processes: {absent[0]}")
    coordinator, number, count = given.values()
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):\d{1,5}", str(coordinator)):
        raise UserError(f"--coordinator {coordinator!r} must be HOST:PORT, the address of process 0")
    if count < 1:
        raise UserError(f"--num-processes {count} must be at least 1: the number of all processes of the run")
    if not 0 <= number < count:
        raise UserError(f"--process-id {number} must lie in [0, {count - 1}], one for each of --num-processes {count}")
    return Processes("command line", coordinator, number, count)


def _slurm(environ: Mapping[str, str]) -> Processes | None:
    """The processes of a job step: srun gives every task its number and the step's nodes."""
    tasks = int(environ.get("SLURM_NTASKS", "1"))
    if "SLURM_JOB_ID" not in environ or tasks == 1:
        return None
    if "SLURM_STEP_NODELIST" not in environ:
        raise UserError(
            f"a SLURM allocation of {tasks} tasks, but not a task of srun: start it with srun "
            "(launch/slurm/train.sbatch), or give --num-processes 1 to run on this host alone"
        )
    job, number = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_PROCID"])
    port = _PORT_RANGE[0] + job % (_PORT_RANGE[1] - _PORT_RANGE[0])
    # One task a node owns all its GPUs; JAX's own detection would give it the first alone.
    shared = int(environ.get("SLURM_STEP_NUM_NODES", tasks)) < tasks
    devices = (int(environ["SLURM_LOCALID"]),) if shared else None
    coordinator = f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}"
    return Processes("SLURM", coordinator, number, tasks, devices)


def first_host(nodes: str) -> str:
    """First host of SLURM's compressed list: `gpu[07-09,12],big1` is gpu07, gpu08, gpu09, gpu12 and big1."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if not found:
        raise UserError(f"SLURM_STEP_NODELIST {nodes!r} names no host")
    return "".join(part or "" for part in found.groups())


def _tpu_slice(environ: Mapping[str, str]) -> Processes | None:
    """A host with TPU chips: JAX reads GKE's variables or the TPU VM's metadata, also for a single host."""
    wanted = environ.get("JAX_PLATFORMS", "tpu").split(",")
    if "tpu" not in wanted or not tpu_chips():
        return None
    return Processes("GKE TPU slice" if "TPU_WORKER_HOSTNAMES" in environ else "TPU slice")


def tpu_chips() -> int:
    """TPU chips on this host's bus."""
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor")
    return sum(Path(vendor).read_text().strip() == _GOOGLE_PCI_VENDOR for vendor in vendors)


def initialize(processes: Processes) -> None:
    """Join the other processes before anything asks JAX for a device. UserError if they cannot be reached."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of CPU processes; no accelerator reads it
    try:
        if not processes.count:
            jax.distributed.initialize()
            return
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.number,
            local_device_ids=processes.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=_CONNECT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:  # requests' errors are OSErrors
        raise UserError(
            f"{processes}: not joined ({one_line(error, 200)}); start every process, and see that each "
            "reaches that host and port; --num-processes 1 runs this one alone"
        ) from error


def lost_another(error: BaseException) -> str | None:
    """The message if `error` is that of a collective that another process has left; None for any other error.

    Gloo (CPU) raises it at once. If the runtime waits instead, JAX ends this process itself once the other has sent
    no heartbeat for 100 s, with a C++ message and exit code 134.
    """
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(error, jax.errors.JaxRuntimeError) or jax.process_count() == 1:
        return None
    text = one_line(error)
    if not _LOST.search(text):
        return None
    return (
        f"process {jax.process_index()} of {jax.process_count()} lost another one, whose log says why ({text[:300]}): "
        "start them all again, the same command continues from the latest checkpoint"
    )


def joined() -> bool:
    """Whether this process has joined others (or, on a TPU slice, might have); starts no backend."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def leave(code: int) -> NoReturn:
    """End this process at once: JAX's own shutdown waits five minutes for the others.

    They wait for this one in a collective, or are lost; when it leaves, they are notified.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
