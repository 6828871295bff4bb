"""Runs a step over the pieces of its input: in this process, in local ones, or on a cluster, by joblib.

Of joblib's own backends those of loky and ray serve. Dask's waits for ever when workers die, and Spark's turns every
exception into a TypeError (joblib 1.6, joblibspark 0.6): there, joblib's threads run their pieces on the cluster.

A piece that is done has its facts beside its shards, written last and whole. So a step that was stopped goes on where
it was, and when a worker dies the pieces are simply run again: done ones return at once. On a cluster the output
folder must be on a disk that all machines share.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
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
Name = Literal["loky", "ray", "dask", "spark"]
Call = Callable[..., None]
"""Calls its first argument on the others, in a worker of the cluster, and raises what that raises."""
_PACKAGES = {"ray": "ray", "dask": "distributed", "spark": "pyspark"}
_ATTEMPTS = 4
"""Times that dead workers are replaced before the step gives up."""
_DEATHS = {"TerminatedWorkerError", "BrokenProcessPool", "RayError", "KilledWorker", "LostSparkWorker"}
"""Exceptions (or their bases, by name, since most engines are not installed) that mean: a worker died, not the work."""
_PATIENCE = 30
"""Seconds that a cluster's first worker may take."""
_POLL = 0.5
"""Seconds between looks at what workers have finished."""


@dataclass(frozen=True)
class Engine:
    """Where pieces run. One job, and no cluster, is this process."""

    name: Name = "loky"
    jobs: int = 1
    """Processes; -1 is one for each processor."""
    address: str = ""
    """Of a ray or dask cluster that exists; none starts one on this machine."""

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            raise UserError(f"no engine {self.name!r}: there are {', '.join(get_args(Name))}")
        if self.jobs == 0 or self.jobs < -1:
            raise UserError(f"jobs must be at least 1, or -1 for all processors, not {self.jobs}")
        if self.address and self.name not in ("ray", "dask"):
            raise UserError(
                f"engine {self.name} goes to no address, {self.address}: choose ray or dask, or leave it out"
            )


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
        with _cluster(engine) as (options, call), _watch(folder, names, on_progress):
            _run_parallel(partial(call, task), list(zip(names, pieces, strict=True)), folder, options)
    return [json.loads(_facts_file(folder, name).read_text(encoding="utf-8")) for name in names]


def _piece(work: Work[T], folder: Path, name: str, piece: T) -> None:
    if not _facts_file(folder, name).is_file():
        write_json(_facts_file(folder, name), work(piece, folder, name))


def _facts_file(folder: Path, name: str) -> Path:
    return folder / f"piece-{name}.json"


def _run_parallel(task: Callable[..., None], items: list[tuple[str, Any]], folder: Path, options: dict) -> None:
    import joblib

    for attempt in range(1, _ATTEMPTS + 1):
        left = [item for item in items if not _facts_file(folder, item[0]).is_file()]
        if not left:
            return
        try:
            joblib.Parallel(batch_size=1, **options)(joblib.delayed(task)(*item) for item in left)
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


def _here(function: Callable[..., None], *args: Any) -> None:
    function(*args)


@contextlib.contextmanager
def _cluster(engine: Engine) -> Iterator[tuple[dict[str, Any], Call]]:
    """joblib's arguments for this engine and how it is to call the work, its cluster connected meanwhile."""
    try:
        if engine.name == "ray":
            with _ray(engine):
                yield {"n_jobs": engine.jobs, "backend": "ray"}, _here
        elif engine.name == "dask":
            with _dask(engine) as client:
                jobs = sum(client.ncores().values()) if engine.jobs == -1 else engine.jobs
                yield {"n_jobs": jobs, "backend": "threading"}, partial(_on_dask, client)
        elif engine.name == "spark":
            spark = _spark()
            jobs = spark.defaultParallelism if engine.jobs == -1 else engine.jobs
            yield {"n_jobs": jobs, "backend": "threading"}, partial(_on_spark, spark)
        else:
            yield {"n_jobs": engine.jobs, "backend": "loky"}, _here
    except ImportError as error:
        package = _PACKAGES.get(engine.name)
        if package is None or (error.name or "").partition(".")[0] != package:
            raise
        raise UserError(f"engine {engine.name} needs the package {package}: pip install {package}") from error


@contextlib.contextmanager
def _ray(engine: Engine) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.util.joblib import register_ray

    ours = not ray.is_initialized()
    if ours:
        # On one machine, whose own address may lead nowhere: ray asks the network for it, unless it is told.
        local = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
        local |= {} if engine.jobs == -1 else {"num_cpus": engine.jobs}
        try:
            ray.init(log_to_driver=False, **({"address": engine.address} if engine.address else local))
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _unreachable(engine, error) from error
    register_ray()
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


@contextlib.contextmanager
def _dask(engine: Engine) -> Iterator[Any]:
    """A `distributed.Client`."""
    from distributed import Client

    logging.getLogger("distributed").setLevel(logging.WARNING)  # else each worker's comings and goings are told
    workers = None if engine.jobs == -1 else engine.jobs
    here = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None, "host": "127.0.0.1"}
    try:
        client = Client(**({"address": engine.address} if engine.address else here))
        client.wait_for_workers(1, _PATIENCE)
    except (OSError, ValueError) as error:
        raise _unreachable(engine, error) from error
    with client:
        yield client


def _unreachable(engine: Engine, error: Exception) -> Exception:
    if not engine.address:
        return error
    return UserError(f"no {engine.name} cluster answers at {engine.address}: check the address ({error})")


def _on_dask(client: Any, *call: Any) -> None:
    client.submit(*call, pure=False).result()


def _spark() -> Any:
    """The `SparkContext` of the session that there is, or of a new one by Spark's own settings."""
    # else it starts its workers with the PATH's python3, which may have none of our packages
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    from pyspark.errors import PySparkRuntimeError
    from pyspark.sql import SparkSession

    # its progress is drawn on the terminal, over ours
    session = SparkSession.builder.appName("infimed-jax").config("spark.ui.showConsoleProgress", "false")
    try:
        return session.getOrCreate().sparkContext
    except PySparkRuntimeError as error:
        raise UserError(f"Spark does not start; does `java -version` run? ({error})") from error


class LostSparkWorker(Exception):
    pass


def _on_spark(spark: Any, function: Callable[..., None], *args: Any) -> None:
    from py4j.protocol import Py4JJavaError

    try:
        raised = spark.parallelize([args], 1).map(partial(_raised, function)).first()
    except Py4JJavaError as error:
        if any(sign in str(error) for sign in ("Python worker exited unexpectedly", "ExecutorLostFailure")):
            raise LostSparkWorker from error
        raise
    if raised is not None:
        raise raised


def _raised(function: Callable[..., None], args: tuple[Any, ...]) -> Exception | None:
    """What the call raises, as a value: Spark would make text of it."""
    try:
        function(*args)
    except Exception as error:
        return error
    return None


@contextlib.contextmanager
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
