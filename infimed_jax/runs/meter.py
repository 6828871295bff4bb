"""What a step costs: counts of its batch, time, share of peak, memory, and a profiler's trace.

Throughput counts non-padding tokens, visual places included; `loss_tokens` are those with a weight; an image counts
once per row slot, which is how often it is encoded; `samples` are those of the batch's plan, bad records included.
"""

from __future__ import annotations

import functools
import logging
import resource
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int

from infimed_jax import config
from infimed_jax.arrays import Array
from infimed_jax.cost import chips, flops
from infimed_jax.cost.chips import GIB
from infimed_jax.data.batch import Batch
from infimed_jax.runs.metrics import Row

COUNTS = ("tokens", "loss_tokens", "images", "bad_records")
PROFILE = "profile"
"""Folder of a run that holds a trace."""
_RECENT = 50
"""The time left is estimated from the median of this many steps."""
_COMPILE_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
_compiled = [0.0]

log = logging.getLogger(__name__)


def _count_compilation(event: str, duration_secs: float, **_: str | int) -> None:
    if event in _COMPILE_EVENTS:
        _compiled[0] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


def compile_seconds() -> float:
    """Seconds that this process has spent lowering and compiling (or reading compiled programs from the cache)."""
    return _compiled[0]


@functools.partial(jax.jit, static_argnames="visual_tokens")
def batch_counts(batch: Batch, visual_tokens: int) -> dict[str, jax.Array]:
    """Counts of a global batch: `tokens`, `loss_tokens`, `images` (i32) and `pairs` (f32), attended query-key pairs."""
    used = batch.segment_ids != 0
    return {
        "tokens": jnp.sum(used),
        "pairs": jnp.sum(jnp.where(used, _keys(batch), 0).astype(jnp.float32)),
        "loss_tokens": jnp.sum(batch.loss_weights > 0),
        # build_row fills a row's image slots in order, so the highest index tells how many are used.
        "images": jnp.sum((jnp.max(batch.visual_index, axis=1) + visual_tokens) // visual_tokens),
    }


def _keys(batch: Batch) -> Int[Array, "B T"]:
    """How many keys each place attends to: its own segment's up to itself, and the prefix that it continues."""
    ids = batch.segment_ids
    place = jnp.arange(ids.shape[1])
    begins = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    keys = place + 1 - jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    if batch.prefix_ids is None:
        return keys
    same = (batch.prefix_ids[:, :, None] == ids[:, None, :]) & (batch.prefix_ids[:, :, None] > 0)
    return keys + jnp.sum(same, axis=2)


class Meter:
    """Makes a training run's rows of metrics.jsonl from the sums of its steps."""

    def __init__(self, cfg: config.Config, mesh: jax.sharding.Mesh, total: int) -> None:
        self._total = total
        self._flops = flops.step_flops(cfg.model, cfg.train)
        device = mesh.devices.flat[0]
        peak = chips.peak_flops(device.device_kind) if cfg.train.compute_dtype == "bfloat16" else None
        self._peak = None if peak is None else peak * mesh.size
        self._devices = mesh.local_devices
        self._last = time.perf_counter(), compile_seconds()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        if peak is not None:
            log.info("share of peak: %s; %d x %.0f TFLOP/s bfloat16", flops.CONVENTION, mesh.size, peak / 1e12)
        else:
            log.info(
                "share of peak: not given, none is known for %s in %s", device.device_kind, cfg.train.compute_dtype
            )

    def row(self, step: int, metrics: dict[str, Any], rate: float, samples: int, waited: float) -> Row:
        """The row of a step: `metrics` are its sums on the host, `waited` the seconds it waited for its batch."""
        now = time.perf_counter(), compile_seconds()
        (seconds, compiling), self._last = (now[0] - self._last[0], now[1] - self._last[1]), now
        self._recent.append(max(seconds - compiling, 0.0))
        counts = {name: int(metrics[name]) for name in COUNTS}
        computed = self._flops.of(counts | {"pairs": float(metrics["pairs"])})
        floats = {name: float(x) for name, x in metrics.items() if name not in (*COUNTS, "pairs", "non_finite")}
        row = {
            "step": step,
            **floats,
            **counts,
            "samples": samples,
            "skipped": int(metrics["non_finite"]),
            "learning_rate": rate,
            "seconds": seconds,
            "compile_seconds": compiling,
            "tokens_per_second": counts["tokens"] / seconds,
            "images_per_second": counts["images"] / seconds,
            "flops": computed,
            "data_wait_share": min(1.0, waited / seconds),
            "memory_gib": memory_bytes(self._devices) / GIB,
            "seconds_left": statistics.median(self._recent) * (self._total - step),
        }
        return row | ({"peak_share": computed / seconds / self._peak} if self._peak else {})


def averaged(rows: list[Row]) -> Row:
    """The last of `rows` with its speeds and shares taken over all of them, time spent compiling left out."""
    seconds = sum(row["seconds"] for row in rows)
    working = max(seconds - sum(row.get("compile_seconds", 0.0) for row in rows), 0.01 * seconds)
    means = {f"{name}_per_second": sum(row.get(name, 0) for row in rows) / working for name in ("tokens", "images")}
    for name, time_taken in (("data_wait_share", seconds), ("peak_share", working)):
        means[name] = sum(row.get(name, 0.0) * row["seconds"] for row in rows) / time_taken
    return rows[-1] | {name: mean for name, mean in means.items() if name in rows[-1]}


def memory_bytes(devices: list[jax.Device]) -> float:
    """Peak so far of this process's fullest device; where devices keep no count (CPUs), of the process itself."""
    peaks = [stats["peak_bytes_in_use"] for device in devices if (stats := device.memory_stats())]
    return max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Trace:
    """Traces `steps` steps from step `first` on into the run's `profile/`; 0 steps trace nothing."""

    def __init__(self, folder: Path, first: int, steps: int) -> None:
        self._folder = folder / PROFILE
        self._first, self._last = first, first + steps - 1
        self._running = False

    def before(self, step: int) -> None:
        if step == self._first <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, outputs: Any) -> None:
        """End the trace when the last step's `outputs` are ready."""
        if self._running and step >= self._last:
            jax.block_until_ready(outputs)
            self.close()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        """Write the trace, also where the run ends early."""
        self.close()

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            log.info(
                "profile: %s (open it with TensorBoard's profile plugin, or the .json.gz with Perfetto)", self._folder
            )
