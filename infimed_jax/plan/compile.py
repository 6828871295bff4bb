"""Ahead-of-time compilation of the real step for a TPU that is not here, in a process of its own, kept on disk.

The process gets libtpu's settings and gigabytes of memory, and gives both back when it ends. Needs `libtpu`, no TPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from infimed_jax import config
from infimed_jax.errors import UserError, one_line
from infimed_jax.files import to_json, write_json

PACKAGE = Path(__file__).resolve().parents[1]
HOW_TO_GET_IT = "libtpu is not installed: pip install 'jax[tpu]' (no TPU is needed) to compile instead of estimate"
_SOURCES = ("models", "ops", "train", "rl", "plan", "sharding", "data/batch.py")
"""What the compiled program is made of; a change in one of them makes every kept result void."""
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu's lock file else stops a second process
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
_SIZE = r"([\d.]+)([KMGT])"
_MEMORY = re.compile(rf"Used {_SIZE} of {_SIZE} hbm|temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")
"""How libtpu says that a program does not fit: it differs with how far the compiler came."""
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Compiled:
    """What the TPU compiler says of one device."""

    fits: bool
    arguments: int = 0
    """Bytes: state and batch, with the padding of the device's layout."""
    temporaries: int = 0
    """Bytes: gradients, activations, gathered weights."""
    code: int = 0
    needed: int = 0
    """Bytes in all, also where they do not fit."""
    available: int = 0
    """Bytes that the compiler may use; 0 where it did not say, which is where they fit."""
    seconds: float = 0.0
    """Time that the compilation took."""
    kept: bool = False
    """Read from disk."""


def find_libtpu() -> str | None:
    """libtpu.so's path, or None; `TPU_LIBRARY_PATH` goes before the installed package, as in JAX."""
    given = os.environ.get("TPU_LIBRARY_PATH")
    if given and Path(given).is_file():
        return given
    spec = importlib.util.find_spec("libtpu")
    path = Path(spec.origin).with_name("libtpu.so") if spec and spec.origin else None
    return str(path) if path and path.is_file() else None


def compile_step(cfg: config.Config, topology: str, mesh: dict[str, int], library: str) -> Compiled:
    """Compile `cfg`'s step for the TPU `topology`, or read what an earlier call found.

    Takes about a minute of CPU and up to 3 GB of memory for the 4B model. Raises UserError for what cannot be
    compiled at all: a topology that libtpu does not know, a kernel that does not tile.
    """
    question = {"config": config.to_dict(cfg), "topology": topology, "mesh": mesh}
    answer = cache_folder() / f"{_key(question, library)}.json"
    if answer.exists():
        return Compiled(**json.loads(answer.read_text(encoding="utf-8"))["compiled"], kept=True)
    found = _in_a_process(question, library)
    answer.parent.mkdir(parents=True, exist_ok=True)
    write_json(answer, question | {"compiled": found})
    return Compiled(**found)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "infimed_jax" / "plan"


def _key(question: dict[str, Any], library: str) -> str:
    made_by = [metadata.version(name) for name in ("jax", "jaxlib", "flax")]
    made_by += [library, str(Path(library).stat().st_size)]
    for source in _SOURCES:
        path = PACKAGE / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            made_by.append(hashlib.sha256(file.read_bytes()).hexdigest())
    return hashlib.sha256(to_json([question, made_by], sort_keys=True).encode()).hexdigest()[:32]


def _in_a_process(question: dict[str, Any], library: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "infimed_jax.plan.compile"],
        input=to_json(question),
        env=os.environ | ENVIRONMENT | {"TPU_LIBRARY_PATH": library},
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(
            f"compiling for {question['topology']} ended with code {done.returncode}: {last}; "
            "code -9 is the machine's memory (the 4B step takes about 3 GB)"
        )
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise UserError(f"cannot compile for {question['topology']}: {answer['error']}")
    return answer


def _main() -> None:
    """One question on standard input, one line of JSON on standard output."""
    import time

    import jax
    from jax.experimental import topologies

    from infimed_jax import sharding
    from infimed_jax.plan.program import train_program

    question = json.load(sys.stdin)
    cfg = config.from_dict(config.Config, question["config"])
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=question["topology"]).devices
        mesh = sharding.make_mesh(config.Mesh(**question["mesh"]), devices)
        with jax.set_mesh(mesh):
            lowered = train_program(cfg, mesh).lower()
            since = time.perf_counter()
            found = _compiled(lowered)
        answer = found | {"seconds": round(time.perf_counter() - since, 1)}
    except (UserError, ValueError, jax.errors.JaxRuntimeError) as error:
        answer = {"error": one_line(error, 400)}
    print(to_json(answer))


def does_not_fit(said: str) -> dict[str, Any] | None:
    """What libtpu's refusal says: `needed` and `available` bytes of a chip; None where it is about something else."""
    found = _MEMORY.search(said)
    if not found:
        return None
    used, used_unit, available, unit = (group for group in found.groups() if group)
    bytes_ = int(float(used) * _UNITS[used_unit]), int(float(available) * _UNITS[unit])
    return {"fits": False, "needed": bytes_[0], "available": bytes_[1]}


def _compiled(lowered: Any) -> dict[str, Any]:
    import jax

    try:
        stats = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        refusal = does_not_fit(str(error))
        if refusal is None:
            raise
        return refusal
    # Outputs that take over an argument's place (the donated state) need none of their own.
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return {
        "fits": True,
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "needed": stats.argument_size_in_bytes + fresh + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes,
    }


if __name__ == "__main__":
    _main()
