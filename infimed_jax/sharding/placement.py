"""The rule from a weight's logical axes to mesh axes, and the placing of global batches and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infimed_jax.errors import UserError
from infimed_jax.sharding.mesh import row_shards

BATCH = ("data", "fsdp")
"""Rows of a batch are split over both: fully sharded parameters are data parallelism with thrifty storage."""

LogicalAxes = tuple[str | None, ...]

_RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor", None: None}
"""A weight's logical axis → the mesh axis that stores it. `fsdp` is gathered before use, `tensor` never is."""


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
