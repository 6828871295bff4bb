"""From a step's sums to its line of metrics.jsonl: speed, share of peak, waiting, memory, time left."""

from __future__ import annotations

import logging
import resource
import statistics
import time
from collections import deque
from typing import Any

import jax

from infimed_jax import config
from infimed_jax.cost import chips, flops
from infimed_jax.train import telemetry
from infimed_jax.train.telemetry import Row

COUNTS = ("tokens", "loss_tokens", "images", "bad_records")
_GIB = 2**30
_RECENT = 50
"""Steps whose median tells the time left."""

log = logging.getLogger(__name__)


class Meter:
    """Makes the rows of one run on one mesh."""

    def __init__(self, cfg: config.Config, mesh: jax.sharding.Mesh, total: int) -> None:
        self._total = total
        self._flops = flops.step_flops(cfg.model, cfg.train)
        device = mesh.devices.flat[0]
        peak = chips.peak_flops(device.device_kind) if cfg.train.compute_dtype == "bfloat16" else None
        self._peak = peak and peak * mesh.size
        self._devices = mesh.local_devices
        self._last = time.perf_counter(), telemetry.compile_seconds()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        if self._peak:
            log.info("share of peak: %s; %d x %.0f TFLOP/s bfloat16", flops.CONVENTION, mesh.size, peak / 1e12)
        else:
            log.info(
                "share of peak: not given, none is known for %s in %s", device.device_kind, cfg.train.compute_dtype
            )

    def row(self, step: int, metrics: dict[str, Any], rate: float, samples: int, waited: float) -> Row:
        """`metrics` are the step's, on the host; `waited` the seconds that the step waited for its batch."""
        now = time.perf_counter(), telemetry.compile_seconds()
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
            "memory_gib": memory_bytes(self._devices) / _GIB,
            "seconds_left": statistics.median(self._recent) * (self._total - step),
        }
        return row | ({"peak_share": computed / seconds / self._peak} if self._peak else {})


def averaged(rows: list[Row]) -> Row:
    """The last of `rows` with its speeds, shares and waiting taken over all of them, time spent compiling left out."""
    seconds = sum(row["seconds"] for row in rows)
    working = max(seconds - sum(row["compile_seconds"] for row in rows), 0.01 * seconds)
    last = rows[-1] | {
        "tokens_per_second": sum(row["tokens"] for row in rows) / working,
        "images_per_second": sum(row["images"] for row in rows) / working,
        "data_wait_share": sum(row["data_wait_share"] * row["seconds"] for row in rows) / seconds,
    }
    if "peak_share" in last:
        last["peak_share"] = sum(row["peak_share"] * row["seconds"] for row in rows) / working
    return last


def memory_bytes(devices: list[jax.Device]) -> float:
    """Peak so far of this process's fullest device; where devices keep no count (CPUs), of the process itself."""
    peaks = [stats["peak_bytes_in_use"] for device in devices if (stats := device.memory_stats())]
    return max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
