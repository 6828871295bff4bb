"""Checkpoints through Orbax: written in the background, compared with what is asked for, verified leaf by leaf.

A checkpoint is a flat dictionary of arrays named by their path in the state (`trainable.text.norm.scale`,
`opt.1.mu.text…`, `step`), so that parameters alone can be read without knowing the optimizer. Its metadata carries
the caller's JSON (configuration, fingerprint, stage history) and a checksum a leaf.
"""

from __future__ import annotations

import contextlib
import glob
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from infimed_jax.errors import UserError
from infimed_jax.models import lora
from infimed_jax.train.checksum import checksums, numpy_checksum

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds its checkpoints, one folder a step."""

_PARAMETERS = ("trainable", "frozen", "params")
"""First names under which a checkpoint holds parameters."""
_CHECKSUMS, _USER = "checksums", "metadata"
READ_BYTES = 1 << 30
"""Parameters are read, and cast, in groups of at most so much."""
_DISK_ERRORS = ("no space left", "file too large", "resource_exhausted", "disk quota", "permission denied")

Metadata = dict[str, Any]


class _EverySave:
    """Orbax's default policy silently skips a save while another runs; `Checkpoints.save` waits instead."""

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        return True


class Checkpoints:
    """The checkpoints of one run, the latest `keep` of them. All processes call every method together."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._pending: tuple[int, Any] | None = None
        self._orbax = self._open()

    def _open(self) -> ocp.training.Checkpointer:
        return ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=_EverySave(),
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
            cleanup_tmp_directories=True,  # what a killed save left behind
        )

    def save(self, step: int, state: Any, metadata: Metadata) -> None:
        """Start writing `state`; it may be donated as soon as this returns. A step that exists is left as it is.

        UserError where the previous save failed for the disk's sake: its checkpoint does not exist, older ones do.
        """
        self.wait()
        if self.latest_step() == step:
            return
        flat = _flatten(state)
        custom = {_USER: metadata, _CHECKSUMS: checksums(flat)}
        with _disk_errors(self._describe(step)):
            self._pending = step, self._orbax.save_async(step, flat, custom_metadata=custom)

    def wait(self) -> None:
        """Until the save under way is complete; its errors surface here."""
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        try:
            with _disk_errors(self._describe(step)):
                response.result()
        except Exception:
            # Orbax would count the torn step as complete and raise this error again at the next save.
            with contextlib.suppress(Exception):
                self._orbax.close()
            self._orbax = self._open()
            raise

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; a save under way does not count."""
        return max(_steps(self.folder), default=None)

    def metadata(self, step: int) -> Metadata:
        """The JSON given to `save`."""
        return _read_metadata(self.folder / str(step)).custom_metadata[_USER]

    def restore(self, abstract: Any, step: int) -> Any:
        """The state of `step` in the shapes, dtypes and shardings of `abstract`; UserError where they differ."""
        flat = _flatten(abstract)
        return jax.tree.unflatten(jax.tree.structure(abstract), _load(self.folder / str(step), flat).values())

    def close(self) -> None:
        """Wait for the save under way and let go of the folder."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _describe(self, step: int) -> str:
        latest = self.latest_step()
        kept = "no checkpoint is complete yet" if latest is None else f"step {latest} is the latest complete one"
        return f"checkpoint of step {step} in {self.folder} was not written ({kept})"


@dataclass(frozen=True)
class StoredLeaf:
    """A parameter on the disk: its shape and type are known, its numbers are read, and verified, by `np.asarray`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    checkpoint: Path
    name: str

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        leaf = _read(self.checkpoint, _read_metadata(self.checkpoint), {self.name: np.empty(self.shape, self.dtype)})
        return np.asarray(leaf[self.name], dtype)


@dataclass(frozen=True)
class MergedLeaf:
    """A kernel on the disk with its adapters: float32, added when `np.asarray` asks for it."""

    stored: Mapping[str, Any]
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


def save_params(folder: str | Path, leaves: Iterable[tuple[str, np.ndarray]], metadata: Metadata) -> None:
    """Write parameters alone, as (`text.norm.scale`, array), a leaf at a time: only one is in memory.

    The folder appears when it is complete; what a stopped call leaves beside it is cleared away by the next. Runs in
    one process. UserError where the folder exists already, or the disk ends.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise UserError(f"{folder} exists already: remove it or choose another folder")
    _clear_partial(folder)
    try:
        with _disk_errors(f"parameters in {folder} were not written"), _chunked():
            for name, leaf in leaves:
                custom = {_USER: metadata, _CHECKSUMS: {f"params.{name}": numpy_checksum(leaf)}}
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


def open_params(folder: str | Path) -> tuple[dict[str, Any], Metadata]:
    """As `load_params`, but a leaf is read when `np.asarray` asks: for models that are larger than the memory."""
    params, metadata = open_stored(folder)
    return _merged_when_read(params, metadata), metadata


def open_stored(folder: str | Path) -> tuple[dict[str, Any], Metadata]:
    """(parameters as StoredLeaf, metadata); a LoRA run's adapters are leaves beside the kernels that they adapt."""
    path = find_checkpoint(folder)
    stored = _read_metadata(path)
    leaves = {
        name: StoredLeaf(tuple(stored.metadata[name].shape), np.dtype(stored.metadata[name].dtype), path, name)
        for name in _parameter_names(stored)
    }
    return _nest({_short(name): leaf for name, leaf in leaves.items()}), stored.custom_metadata[_USER]


def _merged_when_read(params: Mapping[str, Any], metadata: Metadata) -> dict[str, Any]:
    if lora.A in params:
        return {"kernel": MergedLeaf(params, _lora_scale(metadata))}
    return {
        name: _merged_when_read(branch, metadata) if isinstance(branch, Mapping) else branch
        for name, branch in params.items()
    }


def _lora_scale(metadata: Metadata) -> float:
    settings = metadata["config"]["train"]["lora"]
    return settings["alpha"] / settings["rank"]


def load_params(folder: str | Path, abstract: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Metadata]:
    """(parameters, metadata) from a run's folder (its latest checkpoint), a checkpoint, or `save_params`' folder.

    With `abstract` (as `infimed.abstract_params` gives) they come in its shardings and dtypes, a group of leaves at a
    time; each process reads a part of its own, and they exchange what they need. Without, they are NumPy arrays as
    stored.
    The adapters of a LoRA run come merged into their kernels, which are then float32. UserError where there is none,
    or names or shapes differ.
    """
    path = find_checkpoint(folder)
    stored = _read_metadata(path)
    names = _parameter_names(stored)
    adapters = [name for name in names if _is_adapter(name)]
    on_host = names if abstract is None else adapters
    wanted = {name: np.empty(stored.metadata[name].shape, stored.metadata[name].dtype) for name in on_host}
    final: dict[str, Any] = {_short(name): leaf for name, leaf in wanted.items()}
    if abstract is not None:
        kept = {_short(name): name for name in names if name not in adapters}
        wanted |= _as_stored(path, kept, stored.metadata, abstract)
        final |= _flatten(abstract)
    flat: dict[str, Any] = {}
    for group in _groups(wanted):
        for name, leaf in _read(path, stored, group).items():
            flat[_short(name)] = _settle(leaf, final[_short(name)])
    metadata = stored.custom_metadata[_USER]
    params = _nest(flat)
    if adapters:
        params = lora.merge_lora(params, _lora_scale(metadata))
    return params, metadata


def _is_adapter(name: str) -> bool:
    return name.endswith((f".{lora.A}", f".{lora.B}"))


def read_metadata(folder: str | Path) -> Metadata:
    """The JSON given to `save`, of the checkpoint that `load_params` would read."""
    return _read_metadata(find_checkpoint(folder)).custom_metadata[_USER]


def find_checkpoint(folder: str | Path) -> Path:
    """The checkpoint meant by a run's folder (its latest), a folder of checkpoints, or a checkpoint itself."""
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {folder}: the folder does not exist")
    if _is_checkpoint(folder):
        return folder
    for parent in (folder / CHECKPOINTS, folder):
        if steps := _steps(parent):
            return parent / str(max(steps))
    raise UserError(f"no complete checkpoint in {folder}: give a run's folder, or one of its checkpoints")


def _steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit() and _is_checkpoint(path)]


def _is_checkpoint(folder: Path) -> bool:
    """Orbax writes beside the final name and renames when all is there. (Its own test accepts any folder.)"""
    return (folder / "_CHECKPOINT_METADATA").is_file()


def _read_metadata(path: Path) -> Any:
    try:
        stored = ocp.metadata(path)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"checkpoint {path} cannot be read, use an older one: {_one_line(error)}") from error
    if stored.metadata is None:
        raise UserError(f"checkpoint {path} is damaged (its index cannot be read): use an older one")
    if _CHECKSUMS not in (stored.custom_metadata or {}):
        raise UserError(f"checkpoint {path} was not written by this project: it has no checksums")
    return stored


def _load(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """All leaves of a checkpoint (abstract, by name), compared before reading and verified after it."""
    stored = _read_metadata(path)
    _compare(path, wanted, stored.metadata)
    return _read(path, stored, wanted)


def _read(path: Path, stored: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves `wanted` (abstract, by name) and no other, verified."""
    abstract = {name: wanted.get(name, ocp.PLACEHOLDER) for name in stored.metadata}
    try:
        loaded = ocp.load(path, abstract)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"checkpoint {path} cannot be read, use an older one: {_one_line(error)}") from error
    leaves = {name: loaded[name] for name in wanted}
    expected = stored.custom_metadata[_CHECKSUMS]
    for name, checksum in checksums(leaves).items():
        if checksum != expected[name]:
            raise UserError(f"checkpoint {path} is damaged at {name} (its checksum differs): use an older one")
    return leaves


def _groups(wanted: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The leaves in order, so many at once that a read has at most READ_BYTES, or one leaf."""
    group: dict[str, Any] = {}
    size = 0
    for name, leaf in wanted.items():
        bytes_ = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if group and size + bytes_ > READ_BYTES:
            yield group
            group, size = {}, 0
        group[name] = leaf
        size += bytes_
    if group:
        yield group


def _parameter_names(stored: Any) -> list[str]:
    return [name for name in stored.metadata if name.split(".")[0] in _PARAMETERS]


def _short(name: str) -> str:
    """`trainable.text.norm.scale` as the model's own `text.norm.scale`."""
    return name.split(".", 1)[1]


def _compare(path: Path, wanted: dict[str, Any], stored: Mapping[str, Any]) -> None:
    """UserError in one line for the first difference; Orbax would cast dtypes silently and call the rest a handler."""
    missing, extra = wanted.keys() - stored.keys(), stored.keys() - wanted.keys()
    if missing or extra:
        parts = [f"{len(missing)} missing, first {min(missing)}"] if missing else []
        parts += [f"{len(extra)} unexpected, first {min(extra)}"] if extra else []
        raise UserError(f"checkpoint {path} is of another model or optimizer: {'; '.join(parts)}")
    for name, leaf in wanted.items():
        ours, theirs = (f"{np.dtype(x.dtype)}{list(x.shape)}" for x in (leaf, stored[name]))
        if ours != theirs:
            raise UserError(f"checkpoint {path} holds {name} as {theirs}, the configuration asks for {ours}")


def _as_stored(
    path: Path, names: dict[str, str], stored: Mapping[str, Any], abstract: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract leaves by stored name: shape asked for, dtype stored (Orbax's own cast is silent), split for reading."""
    flat = _flatten(abstract)
    short = {ours: stored[theirs] for ours, theirs in names.items()}
    as_stored = {
        ours: jax.ShapeDtypeStruct(
            leaf.shape, short[ours].dtype if ours in short else leaf.dtype, sharding=leaf.sharding
        )
        for ours, leaf in flat.items()
    }
    _compare(path, as_stored, short)
    return {names[ours]: _split_for_reading(leaf, stored[names[ours]]) for ours, leaf in as_stored.items()}


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
    """How much of a leaf its first part needs, in whole chunks."""
    return math.prod(min(n, -(-p // c) * c) / n for n, p, c in zip(shape, part, chunk, strict=True) if n)


def _settle(leaf: Any, wanted: Any) -> Any:
    """`leaf` in the sharding (where it has one) and the dtype of `wanted`."""
    if isinstance(leaf, jax.Array) and leaf.sharding != wanted.sharding:
        leaf = jax.device_put(leaf, wanted.sharding)
    return leaf if leaf.dtype == wanted.dtype else leaf.astype(wanted.dtype)


def _chunked() -> Any:
    """Leaves in chunks of at most 16 MiB: as one chunk, every process would read all to get at its own part."""
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = 16 << 20
    return context


def _flatten(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


@contextlib.contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    """Turns what the file system refuses into one line for the user; anything else passes."""
    try:
        yield
    except Exception as error:  # tensorstore has no class for a full disk: its ValueErrors differ in their text alone
        reason = next((text for text in _DISK_ERRORS if text in str(error).lower()), None)
        if reason is None:
            raise
        raise UserError(f"{what}: {reason}; free some space and run the same command") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
