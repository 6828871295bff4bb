"""One number a leaf that any flipped bit changes, equal on the host, on a device and under every sharding."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MIX = 0x9E3779B1


def checksums(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Sum of every element's bits times an odd number drawn from its index, modulo 2^32.

    An odd factor never loses a bit, so any single flip shows; integer sums do not depend on the order, so the value
    is the same under every sharding, and each device reads only its own part.
    """
    on_device = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    sums = jax.device_get(_device_checksums(on_device))
    return {name: int(sums[name] if name in sums else numpy_checksum(leaf)) for name, leaf in leaves.items()}


@jax.jit
def _device_checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _device_checksum(leaf) for name, leaf in leaves.items()}


def _device_checksum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, _unsigned(x.dtype)).astype(jnp.uint32)
    placed = jax.typeof(x).sharding
    placed = None if placed.mesh.empty else placed  # each device numbers its own part

    def add_axis(index: jax.Array, axis: int) -> jax.Array:
        iota: jax.Array = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=placed)
        return index * jnp.uint32(x.shape[axis]) + iota

    index = functools.reduce(add_axis, range(x.ndim), jnp.uint32(0))
    return jnp.sum(bits * (index * jnp.uint32(_MIX) | jnp.uint32(1)), dtype=jnp.uint32)


def numpy_checksum(x: np.ndarray) -> int:
    """The same number on the host, a slab of at most 2^22 elements at a time."""
    flat = np.ascontiguousarray(x).reshape(-1).view(_unsigned(x.dtype))
    total = 0
    for start in range(0, flat.size, 1 << 22):
        slab = flat[start : start + (1 << 22)].astype(np.uint32)
        index = np.arange(start, start + slab.size, dtype=np.uint64).astype(np.uint32)
        total += int(np.sum(slab * (index * np.uint32(_MIX) | np.uint32(1)), dtype=np.uint64))
    return total % (1 << 32)


def _unsigned(dtype: Any) -> np.dtype:
    return np.dtype({1: np.uint8, 2: np.uint16, 4: np.uint32}[np.dtype(dtype).itemsize])
