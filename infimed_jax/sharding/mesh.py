"""The mesh: its axes, and the sizes that the settings and the number of devices give them.

The mesh is always `("data", "fsdp", "tensor")` with explicit axes: shardings are part of an array's type, an
ambiguous matmul is an error at trace time, and gradients and moments inherit their parameter's placement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from infimed_jax import config
from infimed_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


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
