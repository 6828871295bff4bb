"""The training state: what learns, what is frozen, the moments, and the number of batches consumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from infimed_jax import config
from infimed_jax.errors import UserError
from infimed_jax.models.lora import init_lora
from infimed_jax.models.params import Params, init_params
from infimed_jax.sharding import on_mesh


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Gradients and moments exist for `trainable` alone; stage and freezing are this one split."""

    trainable: Params
    """Float32 masters of what learns: whole parts by top-level name, or with LoRA the text model's adapters."""
    frozen: Params
    """The rest, in the compute dtype."""
    opt: optax.OptState
    step: jax.Array
    """i32[]; batches consumed, skipped updates included: the position in the data."""

    @property
    def params(self) -> dict[str, Any]:
        """The whole model, adapters as leaves of their own."""
        return merge_params(self.trainable, self.frozen)


def split_params(params: Params, train: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen) by top-level part names; UserError for a part that the model does not have."""
    absent = [part for part in train if part not in params]
    if absent:
        raise UserError(f"train.train names {absent[0]!r}, but the model's parts are {', '.join(sorted(params))}")
    trainable = {name: part for name, part in params.items() if name in train}
    return trainable, {name: part for name, part in params.items() if name not in train}


def merge_params(trainable: Params, frozen: Params) -> dict[str, Any]:
    """Both trees as one. They share no leaf; an adapted linear has its adapters in the one, its kernel in the other."""
    merged = dict(frozen)
    for name, part in trainable.items():
        merged[name] = merge_params(part, frozen[name]) if name in frozen else part
    return merged


def init_state(params: Params, cfg: config.Config, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step. Parameters are copied: the step donates its state, never the caller's arrays."""
    trainable, frozen = split_params(params, cfg.train.train)
    if cfg.train.lora.rank:
        frozen[cfg.model.language] = trainable[cfg.model.language]
        trainable |= init_lora(jax.random.key(cfg.train.seed), cfg.model, cfg.train.lora)
    trainable = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trainable)
    frozen = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.dtype(cfg.train.compute_dtype), copy=True), frozen)
    return TrainState(trainable, frozen, _replicate_scalars(optimizer.init(trainable)), _replicated(jnp.int32(0)))


def abstract_state(cfg: config.Config, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of the state under the current mesh: the target of a restore."""
    # The key is made inside: under an abstract mesh nothing may create an array.
    state = jax.eval_shape(lambda: init_state(init_params(jax.random.key(0), cfg.model), cfg, optimizer))
    return on_mesh(state)


def _replicate_scalars(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: _replicated(leaf) if leaf.ndim == 0 else leaf, tree)


def _replicated(scalar: jax.Array) -> jax.Array:
    return jax.sharding.reshard(scalar, PartitionSpec()) if not jax.sharding.get_abstract_mesh().empty else scalar
