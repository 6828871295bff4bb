"""The real train step with abstract arguments: what is traced, and compiled ahead of time, for a pod elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from infimed_jax import config, sharding
from infimed_jax.cost.memory import choose_remat
from infimed_jax.data.batch import Batch
from infimed_jax.models.compute import Compute
from infimed_jax.models.params import init_params
from infimed_jax.ops.attention import platform_backend
from infimed_jax.rl.loss import GrpoBatch, grpo_loss
from infimed_jax.train.optimizer import make_optimizer
from infimed_jax.train.state import TrainState, init_state
from infimed_jax.train.step import make_train_step, next_token_loss

GRPO_PIECES = 2
"""Pieces of a planned GRPO update: their number follows from the replies' lengths, and from two on it changes nothing
but the size of the batch."""


@dataclass(frozen=True)
class Program:
    """`step(*arguments)`, traced and lowered under the mesh it was made for."""

    step: Callable[..., Any]
    state: TrainState
    """Shapes, dtypes and shardings; no arrays."""
    batch: Any
    learning_rate: jax.ShapeDtypeStruct

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.state, self.batch, self.learning_rate

    def lower(self) -> jax.stages.Lowered:
        """The state is donated, as in training."""
        return jax.jit(self.step, donate_argnums=0).lower(*self.arguments)


def is_grpo(cfg: config.Config) -> bool:
    """Whether `cfg` is one of `grpo`: its update is planned, not its rollouts."""
    return cfg.train.stage == "grpo"


def train_program(cfg: config.Config, mesh: Mesh | AbstractMesh) -> Program:
    """The step that `train` (or the update that `grpo`) runs for `cfg`; call under `mesh`, and create no array there.

    Every batch is planned at its largest: `data.context` tokens and `data.images_per_row` images a row. Raises
    UserError where the mesh does not divide the model or the batch.
    """
    sharding.check_fits(cfg.model, mesh)
    rows, pieces = rows_and_pieces(cfg, mesh)
    optimizer = make_optimizer(cfg.optimizer)
    state = jax.eval_shape(lambda: init_state(init_params(jax.random.key(0), cfg.model), cfg, optimizer))
    state = jax.tree.map(lambda leaf: _placed(leaf, mesh), state)
    batch: Any = _abstract_batch(cfg, rows, mesh)
    compute = Compute.of(cfg.train)
    loss = next_token_loss(cfg.model, compute)
    if is_grpo(cfg):
        batch, loss = GrpoBatch(batch, *(batch.loss_weights,) * 3), grpo_loss(cfg.model, compute, cfg.grpo)
    step = make_train_step(loss, optimizer, pieces)
    return Program(step, state, batch, jax.ShapeDtypeStruct((), jnp.dtype("float32")))


def rows_and_pieces(cfg: config.Config, mesh: Mesh | AbstractMesh) -> tuple[int, int]:
    """Rows of a step over all devices, and its micro-batches. UserError where they do not split over `mesh`."""
    pieces = sharding.micro_batches(cfg.train, mesh)
    return (cfg.train.global_batch * GRPO_PIECES, GRPO_PIECES) if is_grpo(cfg) else (cfg.train.global_batch, pieces)


def settled(cfg: config.Config, mesh: Mesh | AbstractMesh, memory: float) -> config.Config:
    """`cfg` with `remat: auto` chosen as a run on devices of `memory` bytes chooses it; call under `mesh`."""
    if cfg.train.remat != "auto":
        return cfg
    rows, pieces = rows_and_pieces(cfg, mesh)
    shape = cfg.data.context, cfg.data.images_per_row
    state = train_program(cfg, mesh).state
    choice = "full" if is_grpo(cfg) else choose_remat(cfg, state, mesh, rows // pieces, shape, memory)
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, remat=choice))


def for_platform(cfg: config.Config, platform: str) -> config.Config:
    """`auto` attention as `platform` (tpu, gpu) chooses it: the choice made here would be a CPU's."""
    if cfg.train.attention != "auto":
        return cfg
    train = dataclasses.replace(cfg.train, attention=platform_backend(platform))
    return dataclasses.replace(cfg, train=train)


def _abstract_batch(cfg: config.Config, rows: int, mesh: Mesh | AbstractMesh) -> Batch:
    placed = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    tokens, images, model = cfg.data.context, cfg.data.images_per_row, cfg.model

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), jnp.dtype(dtype), sharding=placed)

    row = array(jnp.int32, tokens)
    positions = array(jnp.int32, model.position_axes, tokens)
    pixels = jax.tree.map(lambda x: array(x.dtype, images, *x.shape), model.blank_image())
    return Batch(row, row, positions, array(jnp.float32, tokens), row, pixels)


def _placed(leaf: jax.ShapeDtypeStruct, mesh: Mesh | AbstractMesh) -> jax.ShapeDtypeStruct:
    """`eval_shape` gives abstract shardings, and none for scalars, which are whole everywhere."""
    spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
