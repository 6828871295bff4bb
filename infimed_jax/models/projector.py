"""The connector between the towers: a two-layer MLP on pooled patches (Open-Qwen2VL, arXiv 2504.00595)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from infimed_jax.models.compute import Compute
from infimed_jax.models.layers import Linear


class Projector(nn.Module):
    """Linear, exact GELU, Linear, both with biases: vision width → text width."""

    width: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B P Dv"]) -> Float[Array, "B P D"]:
        dtype = jnp.dtype(self.compute.dtype)
        x = Linear((x.shape[-1],), (self.width,), ("embed", "mlp"), dtype, True, name="linear_1")(x)
        x = jax.nn.gelu(x, approximate=False)
        return Linear((self.width,), (self.width,), ("mlp", "embed"), dtype, True, name="linear_2")(x)
