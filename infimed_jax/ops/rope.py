"""Rotary position embedding in the half-split layout of Hugging Face's Qwen3."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Float, Int

from infimed_jax.arrays import Array


def rope_tables(
    positions: Int[Array, "B T"], head_dim: int, theta: float
) -> tuple[Float[Array, "B T 1 {head_dim}//2"], Float[Array, "B T 1 {head_dim}//2"]]:
    """Cosine and sine of every position's angles in float32, broadcastable over heads."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B T N H"], tables: tuple[Float[Array, "B T 1 H//2"], Float[Array, "B T 1 H//2"]]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x[h], x[h + H/2]) of each head; float32 inside, `x`'s type outside."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
