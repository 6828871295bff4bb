"""Runs a step over the pieces of its input: in this process, in processes of this machine, or on a Ray cluster.

A piece that is done has its facts beside its shards, written last and whole. So a stopped step continues where it was,
and when a worker dies the pieces are simply run again: done ones return at once. On a cluster the output folder must be
on a disk that all machines share.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from infimed_jax.errors import UserError
from infimed_jax.files import write_json
from infimed_jax.progress import Report

T = TypeVar("T")
Work = Callable[[T, Path, str], dict[str, Any]]
"""(piece, folder, name) → the piece's facts, JSON values; it writes its shards into the folder, named `name…`."""
Name = Literal["loky", "ray"]
_ATTEMPTS = 4
"""Times that dead workers are replaced before the step gives up."""
_DEATHS = {"TerminatedWorkerError", "BrokenProcessPool", "RayError"}
"""Exceptions (or their bases, by name, since Ray may not be installed) that mean: a worker died, not the work."""
_POLL = 0.5
"""Seconds between looks at what workers have finished."""


@dataclass(frozen=True)
class Engine:
    """Where pieces run. One job, and no cluster, is this process."""

    name: Name = "loky"
    jobs: int = 1
    """Processes; -1 is one for each processor."""
    address: str = ""
    """Address of a running Ray cluster; empty starts one on this machine."""

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            raise UserError(f"no engine {self.name!r}: there are {', '.join(get_args(Name))}")
        if self.jobs == 0 or self.jobs < -1:
            raise UserError(f"jobs must be at least 1, or -1 for all processors, not {self.jobs}")
        if self.address and self.name != "ray":
            raise UserError(f"engine {self.name} goes to no address, {self.address}: choose ray, or leave it out")


HERE = Engine()


def run_pieces(
    work: Work[T], pieces: Sequence[T], folder: Path, engine: Engine, on_progress: Report | None = None
) -> list[dict[str, Any]]:
    """Run `work` on each piece that is not done yet, and return the facts of all, in order.

    An exception of the work ends the step; finished pieces stay. UserError: the engine is not installed, cannot be
    reached, or its workers die again and again.
    """
    names = [f"{number:06d}" for number in range(len(pieces))]
    task = partial(_piece, work, folder)
    if engine.name == "loky" and (engine.jobs == 1 or len(pieces) == 1):
        for done, (name, piece) in enumerate(zip(names, pieces, strict=True), start=1):
            task(name, piece)
            if on_progress is not None:
                on_progress(done, len(pieces), "")
    else:
        with _ray(engine) if engine.name == "ray" else nullcontext(), _watch(folder, names, on_progress):
            _run_parallel(task, list(zip(names, pieces, strict=True)), folder, engine)
    return [json.loads(_facts_file(folder, name).read_text(encoding="utf-8")) for name in names]


def _piece(work: Work[T], folder: Path, name: str, piece: T) -> None:
    if not _facts_file(folder, name).is_file():
        write_json(_facts_file(folder, name), work(piece, folder, name))


def _facts_file(folder: Path, name: str) -> Path:
    return folder / f"piece-{name}.json"


def _run_parallel(task: Callable[..., None], items: list[tuple[str, Any]], folder: Path, engine: Engine) -> None:
    import joblib

    for attempt in range(1, _ATTEMPTS + 1):
        left = [item for item in items if not _facts_file(folder, item[0]).is_file()]
        if not left:
            return
        try:
            parallel = joblib.Parallel(n_jobs=engine.jobs, backend=engine.name, batch_size=1)
            parallel(joblib.delayed(task)(*item) for item in left)
            return
        except Exception as error:
            if not {kind.__name__ for kind in type(error).__mro__} & _DEATHS or _is_works_own(error):
                raise
            if attempt == _ATTEMPTS:
                raise UserError(
                    f"workers died {attempt} times ({type(error).__name__}): give them more memory, or fewer --jobs"
                ) from error


def _is_works_own(error: Exception) -> bool:
    """Ray wraps what the work raised in a class that is both; only the bare ones are deaths."""
    return any(kind.__name__ == "RayTaskError" for kind in type(error).__mro__)


@contextmanager
def _ray(engine: Engine) -> Iterator[None]:
    """Connected to the cluster, or to one of this machine that ends with the step."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise UserError("engine ray needs the package ray: pip install ray") from error

    ours = not ray.is_initialized()
    if ours:
        # The address of a single machine may lead nowhere, and Ray asks the network for it unless it is given one.
        local = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
        local |= {} if engine.jobs == -1 else {"num_cpus": engine.jobs}
        try:
            ray.init(log_to_driver=False, **({"address": engine.address} if engine.address else local))
        except (ConnectionError, RuntimeError, ValueError) as error:
            if not engine.address:
                raise
            raise UserError(f"no ray cluster answers at {engine.address}: check the address ({error})") from error
    register_ray()
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _watch(folder: Path, names: Sequence[str], on_progress: Report | None) -> Iterator[None]:
    """Report progress by the facts that appear: not every backend says when a piece is done."""
    if on_progress is None:
        yield
        return
    over = threading.Event()

    def look() -> None:
        while not over.wait(_POLL):
            on_progress(len(list(folder.glob("piece-*.json"))), len(names), "")

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
        on_progress(len(names), len(names), "")
    finally:
        over.set()
        thread.join()
