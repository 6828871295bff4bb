"""Parameters alone: read from any checkpoint, merged with its adapters, or written without a training state."""

from __future__ import annotations

import glob
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from infimed_jax.errors import UserError
from infimed_jax.files import make_folder
from infimed_jax.models import lora
from infimed_jax.runs.checkpoint import Metadata, Stored, custom_metadata, disk_errors, open_checkpoint
from infimed_jax.runs.checksum import numpy_checksum
from infimed_jax.trees import flatten, nest

_PARAMETERS = ("trainable", "frozen", "params")
"""Top-level names under which a checkpoint holds parameters."""


@dataclass(frozen=True)
class StoredLeaf:
    """A parameter on the disk: shape and dtype are known, `np.asarray` reads and verifies the numbers."""

    stored: Stored
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.leaves[self.name].shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(self.stored.leaves[self.name].dtype)
        return dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        leaf = self.stored.read({self.name: np.empty(self.shape, self.dtype)})
        return np.asarray(leaf[self.name], dtype)


@dataclass(frozen=True)
class MergedLeaf:
    """A kernel on the disk with its adapters; `np.asarray` reads and merges them in float32."""

    stored: Mapping[str, StoredLeaf]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored["kernel"].shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        leaves = {name: np.asarray(leaf) for name, leaf in self.stored.items()}
        return np.asarray(lora.merge_lora(leaves, self.scale)["kernel"], dtype)


def load_params(folder: str | Path, abstract: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Metadata]:
    """(parameters, metadata) from a run's folder (its latest checkpoint), a checkpoint, or `save_params`' folder.

    With `abstract` (see `models.params.abstract_params`) they come in its shardings and dtypes, a group of leaves at a
    time; each process reads a part of its own, and they exchange what they need. Without it they are NumPy arrays as
    stored. The adapters of a LoRA run come merged into their kernels, which are then float32. The metadata is that
    given to `save`, and `leaves_sha256`, the fingerprint of the stored leaves. UserError where there is no checkpoint,
    or names or shapes differ.
    """
    stored = open_checkpoint(folder)
    names = _parameter_names(stored)
    adapters = [name for name in names if _is_adapter(name)]
    on_host = names if abstract is None else adapters
    wanted: dict[str, Any] = {name: _empty(stored.leaves[name]) for name in on_host}
    final: dict[str, Any] = {_short(name): leaf for name, leaf in wanted.items()}
    if abstract is not None:
        wanted |= _as_stored(stored, {_short(name): name for name in names if name not in adapters}, abstract)
        final |= flatten(abstract)
    params = nest({_short(name): _settle(leaf, final[_short(name)]) for name, leaf in stored.read_in_groups(wanted)})
    metadata = _metadata(stored)
    if adapters:
        params = lora.merge_lora(params, _lora_scale(metadata))
    return params, metadata


def open_params(folder: str | Path) -> tuple[dict[str, Any], Metadata]:
    """As `load_params`, but `np.asarray` reads each leaf: for models that are larger than the memory."""
    params, metadata = open_stored(folder)
    return _merged_when_read(params, metadata), metadata


def open_stored(folder: str | Path) -> tuple[dict[str, Any], Metadata]:
    """(parameters as StoredLeaf, metadata); a LoRA run's adapters are leaves beside the kernels that they adapt."""
    stored = open_checkpoint(folder)
    return nest({_short(name): StoredLeaf(stored, name) for name in _parameter_names(stored)}), _metadata(stored)


def _metadata(stored: Stored) -> Metadata:
    return stored.metadata | {"leaves_sha256": stored.sha256}


def _merged_when_read(params: Mapping[str, Any], metadata: Metadata) -> dict[str, Any]:
    if lora.A in params:
        return {"kernel": MergedLeaf(params, _lora_scale(metadata))}
    return {
        name: _merged_when_read(branch, metadata) if isinstance(branch, Mapping) else branch
        for name, branch in params.items()
    }


def _lora_scale(metadata: Metadata) -> float:
    settings = metadata["config"]["train"]["lora"]
    return float(settings["alpha"]) / int(settings["rank"])


def _is_adapter(name: str) -> bool:
    return name.endswith((f".{lora.A}", f".{lora.B}"))


def _parameter_names(stored: Stored) -> list[str]:
    return [name for name in stored.leaves if name.split(".")[0] in _PARAMETERS]


def _empty(leaf: Any) -> np.ndarray:
    """An array of the leaf's shape and dtype."""
    return np.empty(leaf.shape, leaf.dtype)


def _short(name: str) -> str:
    """`trainable.text.norm.scale` as the model's own `text.norm.scale`."""
    return name.split(".", 1)[1]


def _as_stored(
    stored: Stored, names: Mapping[str, str], abstract: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract leaves by stored name: shape asked for, dtype stored (Orbax's own cast is silent), split for reading.

    `names` maps the model's names to the stored ones.
    """
    ours = {name: stored.leaves[theirs] for name, theirs in names.items()}
    as_stored = {
        name: jax.ShapeDtypeStruct(leaf.shape, ours.get(name, leaf).dtype, sharding=leaf.sharding)
        for name, leaf in flatten(abstract).items()
    }
    stored.compare(as_stored, ours)
    return {names[name]: _split_for_reading(leaf, ours[name]) for name, leaf in as_stored.items()}


def _split_for_reading(leaf: jax.ShapeDtypeStruct, stored: Any) -> jax.ShapeDtypeStruct:
    """`leaf` split over all devices along the axis of which each then reads the least, where that beats its own split.

    What is read comes in whole chunks. An import's are cut along a leaf's longest axis, where `fsdp` splits another:
    in the leaf's own sharding every process would read everything.
    """
    mesh, chunk = leaf.sharding.mesh, stored.storage_metadata.chunk_shape
    own = leaf.sharding.shard_shape(leaf.shape)
    best, share = leaf.sharding, _share_read(leaf.shape, own, chunk)
    for axis, size in enumerate(leaf.shape):
        if size % mesh.size == 0:
            part = (*leaf.shape[:axis], size // mesh.size, *leaf.shape[axis + 1 :])
            if _share_read(leaf.shape, part, chunk) < share:
                share = _share_read(leaf.shape, part, chunk)
                best = NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=best)


def _share_read(shape: tuple[int, ...], part: tuple[int, ...], chunk: tuple[int, ...]) -> float:
    """Share of a leaf that is read for its first part, in whole chunks."""
    return math.prod(min(n, -(-p // c) * c) / n for n, p, c in zip(shape, part, chunk, strict=True) if n)


def _settle(leaf: Any, wanted: Any) -> Any:
    """`leaf` in the sharding (where it has one) and the dtype of `wanted`."""
    if isinstance(leaf, jax.Array) and leaf.sharding != wanted.sharding:
        leaf = jax.device_put(leaf, wanted.sharding)
    return leaf if leaf.dtype == wanted.dtype else leaf.astype(wanted.dtype)


def save_params(folder: str | Path, leaves: Iterable[tuple[str, np.ndarray]], metadata: Metadata) -> None:
    """Write parameters alone, as (`text.norm.scale`, array), a leaf at a time: only one is in memory.

    The folder appears when it is complete; what a stopped call leaves beside it is removed by the next. Runs in one
    process. UserError where the folder exists already, its parent cannot be written, or the disk is full.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise UserError(f"{folder} exists already: remove it or choose another folder")
    make_folder(folder.parent)
    _clear_partial(folder)
    try:
        with disk_errors(f"parameters in {folder} were not written"), _chunked():
            for name, leaf in leaves:
                custom = custom_metadata(metadata, {f"params.{name}": numpy_checksum(leaf)})
                ocp.partial.save(folder, {f"params.{name}": leaf}, custom_metadata=custom)
                del leaf  # before the next one is made
            ocp.partial.finalize(folder)
    except BaseException:
        _clear_partial(folder)
        raise


def _clear_partial(folder: Path) -> None:
    """Remove the folders in which Orbax gathers leaves until `finalize`."""
    name = f"{folder.name}.partial_save"
    for partial in (folder.with_name(name), *folder.parent.glob(f"{glob.escape(name)}.orbax-checkpoint-tmp*")):
        shutil.rmtree(partial, ignore_errors=True)


def _chunked() -> Any:
    """Store leaves in chunks of at most 16 MiB: with one chunk, every process would read all of a leaf for its part."""
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = 16 << 20
    return context
