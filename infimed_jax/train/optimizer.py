"""AdamW as a direction without a learning rate, and the learning rate as a number on the host.

The rate is an argument of the compiled step: stages that differ in their schedule alone share one program.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import optax

from infimed_jax import config

STACKED = ("blocks", "layers")
"""Names under which every leaf carries a leading layer axis."""


def make_optimizer(cfg: config.Optimizer) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled decay; the update is `params - learning_rate * direction`.

    Settings that are equal give the same object, so that compiled steps are shared between stages.
    """
    return _adamw(cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay, cfg.clip_norm)


@functools.lru_cache(maxsize=8)
def _adamw(beta1: float, beta2: float, eps: float, decay: float, clip: float) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps),
        optax.add_decayed_weights(decay, mask=decay_mask),
    )


def decay_mask(params: Any) -> Any:
    """True for matrices: neither biases, nor norms, nor anything that is 1-D before layers are stacked."""
    return jax.tree_util.tree_map_with_path(_decays, params)


def _decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
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
