"""Exchange of small values between the processes of a run, and the prefix of their log lines."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from infimed_jax.files import to_json


def process_prefix() -> str:
    """Log prefix `process 1 of 2: `; empty in a single process."""
    return f"process {jax.process_index()} of {jax.process_count()}: " if jax.process_count() > 1 else ""


def gather(value: Any) -> list[Any]:
    """Every process's `value` (plain JSON), in the order of the processes. All of them call this at the same step."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(to_json(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(own)] = own
    parts = multihost_utils.process_allgather(padded)
    return [json.loads(part[:size].tobytes()) for part, size in zip(parts, sizes, strict=True)]
