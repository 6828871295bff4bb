"""Where arrays live: the mesh, the rule from logical axes to mesh axes, and the placing of global batches.

The mesh is always `("data", "fsdp", "tensor")` with explicit axes: shardings are part of an array's type, an
ambiguous matmul is an error at trace time, and gradients and moments inherit their parameter's placement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from infimed_jax import config
from infimed_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
"""Rows of a batch are split over both: fully sharded parameters are data parallelism with thrifty storage."""

LogicalAxes = tuple[str | None, ...]

_RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor", None: None}
"""A weight's logical axis → the mesh axis that stores it. `fsdp` is gathered before use, `tensor` never is."""


def run_mesh(cfg: config.Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run over `devices` (default: all); `mesh.tensor` = 0 is settled by the global batch."""
    devices = jax.devices() if devices is None else devices
    return make_mesh(settle_mesh(cfg, len(devices)), devices)


def settle_mesh(cfg: config.Config, devices: int) -> config.Mesh:
    """`cfg.mesh` with a positive `tensor`: the least with which the rows of the global batch split over the rest.

    Raises UserError where the rows do not split over the sizes given, or no `tensor` that divides the model helps.
    """
    mesh = cfg.mesh
    fixed = math.prod(size for size in (mesh.data, mesh.fsdp) if size != -1)
    if mesh.tensor != 0 or devices % fixed:
        return mesh  # mesh_sizes refuses what does not divide
    if -1 not in (mesh.data, mesh.fsdp):
        return replace(mesh, tensor=devices // fixed)
    rows = cfg.train.global_batch // cfg.train.micro_batches
    if rows % fixed:  # no tensor and no other number of devices would help
        axis = "data" if mesh.fsdp == -1 else "fsdp"
        raise UserError(
            f"{rows} rows (train.global_batch / train.micro_batches) do not split over mesh.{axis}={fixed}: lower "
            f"mesh.{axis}, or make the rows a multiple of it"
        )
    common = math.gcd(*cfg.model.split.values())
    for tensor in range(1, devices + 1):
        shards = devices // tensor
        if devices % tensor == 0 and shards % fixed == 0 and rows % shards == 0 and common % tensor == 0:
            return replace(mesh, tensor=tensor)
    raise UserError(
        f"{rows} rows (train.global_batch / train.micro_batches) do not split over {devices} devices with any "
        "mesh.tensor that divides the model: change train.global_batch or the number of devices"
    )


def mesh_sizes(mesh: config.Mesh, devices: int) -> dict[str, int]:
    """Size of each axis over `devices` devices; a size of -1 takes what the others leave, `tensor` = 0 is 1.

    Raises UserError where the sizes do not multiply to the number of devices.
    """
    given = {axis: getattr(mesh, axis) or 1 for axis in AXES}
    fixed = math.prod(size for size in given.values() if size != -1)
    sizes = {axis: devices // fixed if size == -1 else size for axis, size in given.items()}
    if math.prod(sizes.values()) != devices:
        asked = " * ".join(f"mesh.{axis}={size}" for axis, size in given.items() if size != -1)
        if -1 in given.values():
            raise UserError(f"{asked} = {fixed} does not divide the {devices} devices at hand: change a size")
        raise UserError(f"{asked} = {fixed}, not the {devices} devices at hand: change a size, or set one to -1")
    return sizes


def make_mesh(mesh: config.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The explicit mesh over `devices` (default: all), of the sizes that `mesh_sizes` gives."""
    devices = jax.devices() if devices is None else devices
    sizes = tuple(mesh_sizes(mesh, len(devices)).values())
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices)


def abstract_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh without devices, to trace a model for a pod that is not here (`jax.sharding.use_abstract_mesh`)."""
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Explicit,) * 3)


def check_fits(model: config.Model, mesh: Mesh | AbstractMesh) -> None:
    """UserError where `mesh.tensor` does not divide the heads, the feed-forward or the vocabulary of `model`."""
    tensor, split = mesh.shape["tensor"], model.split
    for name, size in split.items():
        if size % tensor:
            raise UserError(
                f"mesh.tensor={tensor} does not divide model.{name}={size}: choose a divisor of "
                f"{math.gcd(*split.values())}, and leave the other devices to mesh.data or mesh.fsdp"
            )


def stored_spec(axes: LogicalAxes, shape: tuple[int, ...]) -> PartitionSpec:
    """Placement of a weight in the state, under the current mesh.

    An axis that `fsdp` does not divide stays whole: 512-way, the patch embedding's 1152 columns are not worth padding.
    """
    fsdp = jax.sharding.get_abstract_mesh().shape["fsdp"]
    rules = (_RULES[axis] for axis in axes)
    return PartitionSpec(
        *(None if rule == "fsdp" and size % fsdp else rule for rule, size in zip(rules, shape, strict=True))
    )


def gathered_spec(axes: LogicalAxes) -> PartitionSpec:
    """Placement of a weight where it is used: whole over `fsdp`, still split over `tensor`."""
    return PartitionSpec(*(None if _RULES[axis] == "fsdp" else _RULES[axis] for axis in axes))


def spec_of(x: jax.Array) -> tuple[Any, ...]:
    """The mesh axes of each dimension of `x`, as many entries as dimensions."""
    return jax.typeof(x).sharding.spec.partitions


def defer_grad_reduction(x: jax.Array, axes: str | Sequence[str] | None) -> jax.Array:
    """Identity. The gradient stays an unreduced partial sum over the mesh `axes`, so several uses of `x` cost one
    all-reduce, not one each: each use of `x` with operands split over `axes` would otherwise reduce its own gradient.
    """
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return jax.sharding.reshard(x, PartitionSpec(*spec_of(x), reduced=frozenset(axes)))


def reshape_rows(x: jax.Array, *shape: int) -> jax.Array:
    """Reshape where only axis 0 is split, and stays so; explicit meshes want the result's sharding named."""
    return jnp.reshape(x, shape, out_sharding=PartitionSpec(spec_of(x)[0]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 over `data` and `fsdp`, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Parts into which the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def micro_batches(train: config.Train, mesh: Mesh | AbstractMesh) -> int:
    """Pieces of a global batch: `train.micro_batches`, or the fewest that `train.rows_per_device` allows on `mesh`.

    The global batch is the recipe's on any number of devices. Raises UserError where it does not split over them.
    """
    shards, rows = row_shards(mesh), train.global_batch // train.micro_batches
    if rows % shards:
        raise UserError(
            f"{rows} rows (train.global_batch / train.micro_batches) do not split over mesh.data * mesh.fsdp = "
            f"{shards}: change the mesh, train.global_batch or train.micro_batches"
        )
    if not train.rows_per_device:
        return train.micro_batches
    each = train.global_batch // shards
    return next(k for k in range(1, each + 1) if each % k == 0 and each // k <= train.rows_per_device)


def local_rows(rows: int, mesh: Mesh) -> np.ndarray:
    """i64[n], ascending: the rows of a global batch of `rows` rows that this process must load.

    Raises UserError where the rows do not split evenly.
    """
    shards = row_shards(mesh)
    if rows % shards:
        raise UserError(
            f"a batch of {rows} rows does not split over mesh.data * mesh.fsdp = {shards}: change the mesh, "
            "train.global_batch or train.micro_batches"
        )
    slices = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in slices]))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """NumPy leaves → global arrays split by rows.

    In several processes each gives the rows that `local_rows` names; in one process these are all rows.
    """
    sharding = batch_sharding(mesh)

    def place(x: np.ndarray) -> jax.Array:
        if jax.process_count() == 1:
            local_rows(len(x), mesh)
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(place, batch)


def place_params(params: Any, abstract: Any) -> Any:
    """Every leaf (NumPy, a device's, or still on the disk) in the sharding of `abstract`, one by one; dtypes stay."""

    def place(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), like.sharding)

    return jax.tree.map(place, params, abstract)


def on_mesh(abstract: Any) -> Any:
    """`abstract` with the current mesh's own shardings: `eval_shape` gives abstract ones, a restore wants devices."""
    return jax.tree.map(_with_sharding, abstract)


def _with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Under an explicit mesh `eval_shape` carries abstract shardings; scalars come back without one."""
    mesh = jax.sharding.get_mesh()
    spec = leaf.sharding.spec if leaf.sharding is not None else PartitionSpec()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
