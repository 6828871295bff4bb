"""Low-rank adapters of the text model's linears (Hu et al., arXiv 2106.09685), as leaves beside the kernels.

An adapted linear is {"kernel", "lora_a", "lora_b"}: y = x W + (alpha / rank) (x A) B. `layers.Linear` applies them
where it finds them, so a tree without adapters is the plain model, and `merge_lora` makes such a tree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infimed_jax import config
from infimed_jax.sharding import LogicalAxes, spec_of, stored_spec

A, B = "lora_a", "lora_b"

_HEADS: LogicalAxes = ("embed", "heads", None)
_AXES: dict[str, tuple[str, LogicalAxes, int]] = {
    "q_proj": ("self_attn", _HEADS, 1),
    "k_proj": ("self_attn", _HEADS, 1),
    "v_proj": ("self_attn", _HEADS, 1),
    "o_proj": ("self_attn", ("heads", None, "embed"), 2),
    "gate_proj": ("mlp", ("embed", "mlp"), 1),
    "up_proj": ("mlp", ("embed", "mlp"), 1),
    "down_proj": ("mlp", ("mlp", "embed"), 1),
}
"""Target → its module in a block, its kernel's logical axes, and how many of them are inputs."""


def init_lora(key: jax.Array, text: config.Text, lora: config.Lora) -> dict[str, Any]:
    """Adapters {"layers": {module: {target: {"lora_a" [L, inputs, r], "lora_b" [L, r, outputs]}}}}, float32.

    B is zero, so that the adapted model is the model; A is drawn as PEFT draws it, uniform in ±1/sqrt(inputs).
    """
    layers: dict[str, Any] = {}
    for target, target_key in zip(lora.targets, jax.random.split(key, len(lora.targets)), strict=True):
        module, axes, contracted = _AXES[target]
        shape = _kernel_shape(text, target)
        inputs, outputs = shape[:contracted], shape[contracted:]
        a_shape, b_shape = (text.num_layers, *inputs, lora.rank), (text.num_layers, lora.rank, *outputs)
        bound = 1 / math.sqrt(math.prod(inputs))
        a = jax.random.uniform(target_key, a_shape, jnp.float32, -bound, bound)
        layers.setdefault(module, {})[target] = {
            A: jax.sharding.reshard(a, stored_spec((None, *axes[:contracted], None), a_shape)),
            B: jax.sharding.reshard(jnp.zeros(b_shape), stored_spec((None, None, *axes[contracted:]), b_shape)),
        }
    return {"layers": layers}


def _kernel_shape(text: config.Text, target: str) -> tuple[int, ...]:
    d, n, k, h, f = text.hidden_size, text.num_heads, text.num_kv_heads, text.head_dim, text.intermediate_size
    return {
        "q_proj": (d, n, h),
        "k_proj": (d, k, h),
        "v_proj": (d, k, h),
        "o_proj": (n, h, d),
        "gate_proj": (d, f),
        "up_proj": (d, f),
        "down_proj": (f, d),
    }[target]


def scale_of(lora: config.Lora) -> float:
    """What the adapters' output is multiplied by; 0 without adapters."""
    return lora.alpha / lora.rank if lora.rank else 0.0


def merge_lora(params: Mapping[str, Any], scale: float, dtype: str = "float32") -> dict[str, Any]:
    """The plain model that computes what `params` with its adapters does: W + scale * A B, added in float32.

    Merged kernels come in `dtype`, all else as it is. NumPy trees give NumPy trees.
    """
    if A in params:
        rest = {name: leaf for name, leaf in params.items() if name not in ("kernel", A, B)}
        merge = _merge_on_host if isinstance(params["kernel"], np.ndarray) else _merge
        return rest | {"kernel": merge(params["kernel"], params[A], params[B], scale, dtype)}
    return {
        name: merge_lora(leaf, scale, dtype) if isinstance(leaf, Mapping) else leaf for name, leaf in params.items()
    }


@functools.partial(jax.jit, static_argnames=("scale", "dtype"))
def _merge(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float, dtype: str) -> jax.Array:
    """A layer at a time: a product for all of them would need the stack once more."""
    spec = spec_of(kernel)

    def layer(_: None, weights: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        kernel, a, b = weights
        product = jax.lax.dot_general(
            jax.sharding.reshard(a, jax.sharding.PartitionSpec(*spec[1 : a.ndim])),
            jax.sharding.reshard(b, jax.sharding.PartitionSpec(None, *spec[a.ndim :])),
            (((a.ndim - 1,), (0,)), ((), ())),
            precision="highest",
            out_sharding=jax.sharding.PartitionSpec(*spec[1:]),
        )
        return None, (kernel.astype(jnp.float32) + scale * product).astype(dtype)

    return jax.lax.scan(layer, None, (kernel, a, b))[1]


def _merge_on_host(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, dtype: str) -> np.ndarray:
    merged = kernel.astype(np.float32)
    for layer in range(len(merged)):
        merged[layer] += np.float32(scale) * np.tensordot(a[layer], b[layer], axes=1)
    return merged.astype(jnp.dtype(dtype), copy=False)  # a stack of the 4B model's MLP is 3.6 GB


def dimensions(text: config.Text, lora: config.Lora) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each adapted linear; empty without adapters."""
    found = {}
    for target in lora.targets if lora.rank else ():
        shape, contracted = _kernel_shape(text, target), _AXES[target][2]
        found[target] = math.prod(shape[:contracted]), math.prod(shape[contracted:])
    return found


def splits_inputs(target: str) -> bool:
    """Whether `tensor` divides that linear's inputs; else its outputs."""
    return _AXES[target][1][0] != "embed"


def param_count(text: config.Text, lora: config.Lora) -> int:
    """Elements of all adapters."""
    return text.num_layers * lora.rank * sum(map(sum, dimensions(text, lora).values()))
