"""Adaptive average pooling as two small matmuls."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from infimed_jax.arrays import Array
from infimed_jax.sharding import reshape_rows


def averaging_matrix(size: int, bins: int) -> Float[np.ndarray, "bins size"]:
    """Row i averages [floor(size * i / bins), ceil(size * (i + 1) / bins)), the bins of torch's AdaptiveAvgPool.

    27 → 12 gives bins of three that overlap: a strided pooling is not the same.
    """
    matrix = np.zeros((bins, size), np.float32)
    for i in range(bins):
        start, end = size * i // bins, -(-size * (i + 1) // bins)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def adaptive_average_pool(x: Float[Array, "B P D"], grid: int) -> Float[Array, "B {grid}*{grid} D"]:
    """Pool the P = side * side positions (row-major) of each image to grid * grid; the identity where equal."""
    side = round(x.shape[1] ** 0.5)
    if grid == side:
        return x
    matrix = jnp.asarray(averaging_matrix(side, grid), x.dtype)
    square = reshape_rows(x, x.shape[0], side, side, x.shape[2])
    pooled = jnp.einsum("brcd,ir,jc->bijd", square, matrix, matrix)
    return reshape_rows(pooled, x.shape[0], grid * grid, x.shape[2])
