"""Linear, RMSNorm and LayerNorm: each declares its weights once, with their logical axes, and uses them from there.

Flax's own layers do not work under an explicit mesh, so these take `self.param` alone and name every output's sharding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from infimed_jax.sharding import LogicalAxes, gathered_spec, spec_of, stored_spec

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]

normal_002: Initializer = nn.initializers.normal(0.02)
"""Hugging Face's initialisation of Qwen3 and of a LLaVA projector, residual branches included."""


def fan_in_normal(fan_in: int) -> Initializer:
    """LeCun's normal of variance 1/fan_in, for kernels whose shape does not say which axes are contracted."""
    return nn.initializers.normal(1 / math.sqrt(fan_in))


def weight(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: LogicalAxes,
    init: Initializer,
    dtype: jnp.dtype,
) -> Array:
    """Declare a float32 parameter stored as `axes` says; returned in `dtype` and gathered over fsdp, ready for use."""

    def sharded(key: jax.Array, shape: tuple[int, ...]) -> Array:
        return jax.sharding.reshard(init(key, shape, jnp.float32), stored_spec(axes, shape))

    stored = module.param(name, sharded, shape)
    return jax.sharding.reshard(stored.astype(dtype), gathered_spec(axes))


class Linear(nn.Module):
    """Contract the last axes of x with the first of the kernel; attention keeps its heads as an axis of their own."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: LogicalAxes
    """Of the kernel: inputs, then outputs."""
    dtype: jnp.dtype
    bias: bool = False
    init: Initializer = normal_002
    lora_scale: float = 0.0
    """Of the adapters beside the kernel, where there are any (`models.lora`)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        contracted = len(self.inputs)
        kernel = weight(self, "kernel", self.inputs + self.outputs, self.axes, self.init, self.dtype)
        out_axes = self.axes[contracted:]
        out = _contract(x, kernel, contracted, out_axes)
        if self.lora_scale and self.has_variable("params", "lora_a"):
            whole = jax.sharding.reshard(x, PartitionSpec(*spec_of(x)))  # the rank is not split as the outputs are
            low = _contract(whole, self._adapter("lora_a", (*self.axes[:contracted], None)), contracted, (None,))
            out = out + self.lora_scale * _contract(low, self._adapter("lora_b", (None, *out_axes)), 1, out_axes)
        if self.bias:
            out = out + weight(self, "bias", self.outputs, out_axes, nn.initializers.zeros, self.dtype)
        return out

    def _adapter(self, name: str, axes: LogicalAxes) -> Array:
        return jax.sharding.reshard(self.get_variable("params", name).astype(self.dtype), gathered_spec(axes))


def _contract(x: Array, kernel: Array, contracted: int, out_axes: LogicalAxes) -> Array:
    lead = x.ndim - contracted
    return jax.lax.dot_general(
        x,
        kernel,
        ((tuple(range(lead, x.ndim)), tuple(range(contracted))), ((), ())),
        out_sharding=PartitionSpec(*spec_of(x)[:lead], *gathered_spec(out_axes)),
    )


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = weight(self, "scale", x.shape[-1:], (None,), nn.initializers.ones, jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias over the last axis, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = weight(self, "scale", x.shape[-1:], (None,), nn.initializers.ones, jnp.float32)
        bias = weight(self, "bias", x.shape[-1:], (None,), nn.initializers.zeros, jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale + bias).astype(x.dtype)
