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
from infimed_jax.config.fields import nearest
from infimed_jax.errors import UserError
from infimed_jax.models.family import weights
from infimed_jax.models.weights import Weight
from infimed_jax.sharding import spec_of, stored_spec
from infimed_jax.trees import nest

A, B = "lora_a", "lora_b"


def adapted(model: config.Model, lora: config.Lora) -> list[Weight]:
    """The kernels that get adapters, in the order of `lora.targets`; empty without adapters."""
    if not lora.rank:
        return []
    kernels = {w.module: w for w in weights(model) if w.part == model.language and w.layers and w.inputs}
    if unknown := [target for target in lora.targets if target not in kernels]:
        hint = nearest(unknown[0], kernels, repr)
        raise UserError(f"train.lora.targets: {unknown[0]!r} is none of the model's {', '.join(kernels)}{hint}")
    return [kernels[target] for target in lora.targets]


def init_lora(key: jax.Array, model: config.Model, lora: config.Lora) -> dict[str, Any]:
    """Adapters beside the kernels' paths, {"lora_a" [L, inputs, r], "lora_b" [L, r, outputs]}, float32.

    B is zero, so that the adapted model is the model; A is drawn as PEFT draws it, uniform in ±1/sqrt(inputs).
    """
    flat: dict[str, Any] = {}
    kernels = adapted(model, lora)
    for kernel, one in zip(kernels, jax.random.split(key, len(kernels)), strict=True):
        n, module = kernel.inputs, kernel.path.removesuffix("kernel")
        a_shape = (kernel.layers, *kernel.shape[:n], lora.rank)
        b_shape = (kernel.layers, lora.rank, *kernel.shape[n:])
        bound = 1 / math.sqrt(kernel.fan_in)
        a = jax.random.uniform(one, a_shape, jnp.float32, -bound, bound)
        a_spec = stored_spec((None, *kernel.axes[:n], None), a_shape)
        b_spec = stored_spec((None, None, *kernel.axes[n:]), b_shape)
        flat[module + A] = jax.sharding.reshard(a, a_spec)
        flat[module + B] = jax.sharding.reshard(jnp.zeros(b_shape), b_spec)
    return nest(flat)


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
        into, out = "ij"[: a.ndim - 1], "kl"[: b.ndim - 1]
        product = jnp.einsum(
            f"{into}r,r{out}->{into}{out}",
            jax.sharding.reshard(a, jax.sharding.PartitionSpec(*spec[1 : a.ndim])),
            jax.sharding.reshard(b, jax.sharding.PartitionSpec(None, *spec[a.ndim :])),
            precision="highest",
            out_sharding=jax.sharding.PartitionSpec(*spec[1:]),
        )
        return None, (kernel.astype(jnp.float32) + scale * product).astype(dtype)

    return jax.lax.scan(layer, None, (kernel, a, b))[1]


def _merge_on_host(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, dtype: str) -> np.ndarray:
    merged, rank = kernel.astype(np.float32), a.shape[-1]
    for layer in range(len(merged)):
        product = np.einsum("ir,rk->ik", a[layer].reshape(-1, rank), b[layer].reshape(rank, -1), optimize=True)
        merged[layer] += np.float32(scale) * product.reshape(merged.shape[1:])
    return merged.astype(jnp.dtype(dtype), copy=False)  # a stack of the 4B model's MLP is 3.6 GB


def param_count(model: config.Model, lora: config.Lora) -> int:
    """Elements of all adapters."""
    return sum(kernel.layers * lora.rank * (kernel.fan_in + kernel.fan_out) for kernel in adapted(model, lora))
