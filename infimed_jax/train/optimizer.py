"""AdamW as a direction without a learning rate, and the learning rate as a number on the host.

The rate is an argument of the compiled step: stages that differ in their schedule alone share one program.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from infimed_jax import config
from infimed_jax.arrays import Array

STACKED = ("blocks", "layers")
"""Names under which every leaf carries a leading layer axis."""


def make_optimizer(cfg: config.Optimizer) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled decay; the update is `params - learning_rate * direction`.

    Settings that are equal give the same object, so that compiled steps are shared between stages.
    """
    return _adamw(cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay, cfg.clip_norm, cfg.moments_dtype)


@functools.lru_cache(maxsize=8)
def _adamw(
    beta1: float, beta2: float, eps: float, decay: float, clip: float, moments: str
) -> optax.GradientTransformation:
    adam = optax.scale_by_adam if moments == "float32" else scale_by_adam_bfloat16
    return optax.chain(
        optax.clip_by_global_norm(clip),
        adam(b1=beta1, b2=beta2, eps=eps),
        optax.add_decayed_weights(decay, mask=decay_mask),
    )


def scale_by_adam_bfloat16(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with both moments stored in bfloat16; the step itself uses them before they are rounded.

    They are rounded stochastically: the second moment's increments are 1 - b2 = 0.1 % of what is missing, below
    bfloat16's resolution of 0.4 %, so rounding to nearest would leave it where it stands (and the first moment 3 %
    short of a constant gradient). The noise depends on the update's number alone.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.bfloat16), params)
        return optax.ScaleByAdamState(jnp.int32(0), zeros, jax.tree.map(jnp.copy, zeros))

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m.astype(jnp.float32) + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v.astype(jnp.float32) + (1 - b2) * g * g, state.nu, grads)
        first, second = (1 - beta ** count.astype(jnp.float32) for beta in (b1, b2))
        direction = jax.tree.map(lambda m, v: (m / first) / (jnp.sqrt(v / second) + eps), mu, nu)
        leaves, structure = jax.tree.flatten((mu, nu))
        key = jax.random.fold_in(jax.random.key(0), count)
        rounded = [stochastic_bfloat16(leaf, jax.random.fold_in(key, i)) for i, leaf in enumerate(leaves)]
        return direction, optax.ScaleByAdamState(count, *jax.tree.unflatten(structure, rounded))

    return optax.GradientTransformation(init, update)


def stochastic_bfloat16(x: Float[Array, "*shape"], key: jax.Array) -> Float[Array, "*shape"]:
    """Finite x rounded to one of its two bfloat16 neighbours, so that the expectation is x."""
    sharding = jax.typeof(x).sharding
    placed = None if sharding.mesh.empty else sharding
    noise = jax.random.bits(key, x.shape, jnp.uint32, out_sharding=placed) & jnp.uint32(0xFFFF)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def decay_mask(params: Any) -> Any:
    """True for matrices: neither biases, nor norms, nor anything that is 1-D before layers are stacked."""
    return jax.tree_util.tree_map_with_path(_decays, params)


def _decays(path: tuple[Any, ...], leaf: Array) -> bool:
    names = [str(getattr(entry, "key", entry)) for entry in path]
    own_dimensions = leaf.ndim - any(name in STACKED for name in names)
    return own_dimensions >= 2 and names[-1] != "bias"


def warmup_steps(cfg: config.Optimizer, total_steps: int) -> int:
    """Rounded up, as Hugging Face's trainer (the ancestor's) rounds `warmup_ratio`."""
    return math.ceil(cfg.warmup_fraction * total_steps)


def learning_rate(cfg: config.Optimizer, step: int, total_steps: int) -> float:
    """Rate of update number `step` (from 0): linear from 0 to the peak, then the schedule to its end."""
    warmup = warmup_steps(cfg, total_steps)
    if step < warmup:
        return cfg.learning_rate * step / warmup
    if cfg.schedule == "constant":
        return cfg.learning_rate
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.learning_rate * (cfg.final_fraction + (1 - cfg.final_fraction) * cosine)
