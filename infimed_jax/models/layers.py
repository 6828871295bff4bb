"""Linear, RMSNorm and LayerNorm over the weights that a family's table declares.

Flax's own layers do not work under an explicit mesh, so these take `self.param` alone and name every output's sharding.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float

from infimed_jax.arrays import Array
from infimed_jax.models.weights import Weight
from infimed_jax.sharding import LogicalAxes, gathered_spec, spec_of, stored_spec

Weights = Mapping[str, Weight]
"""A layer's weights by their last names: `kernel`, `bias`, `scale`."""


def initial(weight: Weight, key: jax.Array) -> Array:
    """The leaf's first values, float32, born in the placement that its axes say."""
    values = weight.init(key, weight.leaf_shape, weight.fan_in)
    return jax.sharding.reshard(values, stored_spec(weight.leaf_axes, weight.leaf_shape))


def parameter(module: nn.Module, weight: Weight, dtype: DTypeLike) -> Array:
    """The module's parameter (of one layer) in `dtype`, gathered over fsdp, ready for use."""

    def never(key: jax.Array) -> Array:
        return jnp.zeros(weight.shape)  # parameters come from `params.init_params`; Flax compares the shape

    stored = module.param(weight.name, never)
    return jax.sharding.reshard(stored.astype(dtype), gathered_spec(weight.axes))


class Linear(nn.Module):
    """Contract the last axes of x with the first of the kernel; attention keeps its heads as an axis of their own."""

    weights: Weights
    """`kernel`, and `bias` where it has one."""
    dtype: DTypeLike
    lora_scale: float = 0.0
    """Scale of the adapters beside the kernel, where there are any (`models.lora`)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        declared = self.weights["kernel"]
        # einsum contracts in alphabetical order, capitals first: `nh` would transpose the kernel, `Nh` does not.
        letters = declared.letters[0] + declared.letters[1:].lower().replace(" ", "")
        into, out = letters[: declared.inputs], letters[declared.inputs :]
        in_axes, out_axes = declared.axes[: declared.inputs], declared.axes[declared.inputs :]
        y = _product(f"...{into},{letters}->...{out}", x, parameter(self, declared, self.dtype), out_axes)
        if self.lora_scale and self.has_variable("params", "lora_a"):
            whole = jax.sharding.reshard(x, PartitionSpec(*spec_of(x)))  # the rank is not split as the outputs are
            low = _product(f"...{into},{into}r->...r", whole, self._adapter("lora_a", (*in_axes, None)), (None,))
            high = _product(f"...r,r{out}->...{out}", low, self._adapter("lora_b", (None, *out_axes)), out_axes)
            y = y + self.lora_scale * high
        if "bias" in self.weights:
            y = y + parameter(self, self.weights["bias"], self.dtype)
        return y

    def _adapter(self, name: str, axes: LogicalAxes) -> Array:
        return jax.sharding.reshard(self.get_variable("params", name).astype(self.dtype), gathered_spec(axes))


def _product(equation: str, x: Array, kernel: Array, out_axes: LogicalAxes) -> Array:
    rows = spec_of(x)[: x.ndim - equation.index(",") + len("...")]
    return jnp.einsum(equation, x, kernel, out_sharding=PartitionSpec(*rows, *gathered_spec(out_axes)))


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32."""

    weights: Weights
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = parameter(self, self.weights["scale"], jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias over the last axis, in float32."""

    weights: Weights
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = parameter(self, self.weights["scale"], jnp.float32)
        bias = parameter(self, self.weights["bias"], jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale + bias).astype(x.dtype)
