"""Checkpoints through Orbax: written in the background, compared with what is asked for, verified leaf by leaf.

A checkpoint is a flat dictionary of arrays named by their path in the state (`trainable.text.norm.scale`,
`opt.1.mu.text…`, `step`), so that parameters alone can be read without knowing the optimizer. Its metadata carries
the caller's JSON (configuration, fingerprint, stage history) and a checksum a leaf.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from infimed_jax.errors import UserError
from infimed_jax.models import lora

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds its checkpoints, one folder a step."""

_PARAMETERS = ("trainable", "frozen", "params")
"""First names under which a checkpoint holds parameters."""
_CHECKSUMS, _USER = "checksums", "metadata"
_MIX = 0x9E3779B1
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
        custom = {_USER: metadata, _CHECKSUMS: _checksums(flat)}
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


def save_params(folder: str | Path, params: Mapping[str, Any], metadata: Metadata) -> None:
    """Write parameters alone; an earlier folder of that name is replaced once the new one is complete."""
    folder = Path(folder).absolute()
    if folder.exists() and not _is_checkpoint(folder) and any(folder.iterdir()):
        raise UserError(f"parameters cannot be written to {folder}: it holds something else; name another folder")
    flat = _flatten({"params": params})
    beside = folder.with_name(folder.name + ".new")
    with _disk_errors(f"parameters in {folder} were not written"):
        ocp.save(beside, flat, custom_metadata={_USER: metadata, _CHECKSUMS: _checksums(flat)}, overwrite=True)
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    if jax.process_count() > 1:
        jax.experimental.multihost_utils.sync_global_devices(f"save_params {folder}")


def load_params(folder: str | Path, abstract: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Metadata]:
    """(parameters, metadata) from a run's folder (its latest checkpoint), a checkpoint, or `save_params`' folder.

    With `abstract` (as `infimed.abstract_params` gives) they come straight into its shardings and are cast to its
    dtypes; without, they are NumPy arrays as stored. The adapters of a LoRA run come merged into their kernels, which
    are then float32. UserError where there is none, or names or shapes differ.
    """
    path = find_checkpoint(folder)
    stored = _read_metadata(path)
    names = [name for name in stored.metadata if name.split(".")[0] in _PARAMETERS]
    adapters = [name for name in names if name.endswith((f".{lora.A}", f".{lora.B}"))]
    on_host = names if abstract is None else adapters
    wanted = {name: np.empty(stored.metadata[name].shape, stored.metadata[name].dtype) for name in on_host}
    if abstract is not None:
        kept = {name.split(".", 1)[1]: name for name in names if name not in adapters}
        wanted |= _as_stored(path, kept, stored.metadata, abstract)
    flat = {name.split(".", 1)[1]: leaf for name, leaf in _load(path, wanted, partial=True).items()}
    if abstract is not None:
        flat |= {name: flat[name].astype(leaf.dtype) for name, leaf in _flatten(abstract).items()}
    metadata = stored.custom_metadata[_USER]
    params = _nest(flat)
    if adapters:
        settings = metadata["config"]["train"]["lora"]
        params = lora.merge_lora(params, settings["alpha"] / settings["rank"])
    return params, metadata


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


def _load(path: Path, wanted: dict[str, Any], partial: bool = False) -> dict[str, Any]:
    """The leaves `wanted` (abstract, by name), compared before reading and verified after it."""
    stored = _read_metadata(path)
    shapes = stored.metadata
    _compare(path, wanted, shapes if not partial else {name: shapes[name] for name in wanted})
    abstract = {name: wanted.get(name, ocp.PLACEHOLDER) for name in shapes}
    try:
        loaded = ocp.load(path, abstract)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"checkpoint {path} cannot be read, use an older one: {_one_line(error)}") from error
    leaves = {name: loaded[name] for name in wanted}
    expected = stored.custom_metadata[_CHECKSUMS]
    for name, checksum in _checksums(leaves).items():
        if checksum != expected[name]:
            raise UserError(f"checkpoint {path} is damaged at {name} (its checksum differs): use an older one")
    return leaves


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
    """Abstract leaves by stored name: shape and sharding asked for, dtype stored (Orbax's own cast is silent)."""
    flat = _flatten(abstract)
    short = {ours: stored[theirs] for ours, theirs in names.items()}
    as_stored = {
        ours: jax.ShapeDtypeStruct(
            leaf.shape, short[ours].dtype if ours in short else leaf.dtype, sharding=leaf.sharding
        )
        for ours, leaf in flat.items()
    }
    _compare(path, as_stored, short)
    return {names[ours]: leaf for ours, leaf in as_stored.items()}


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


def _checksums(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Sum of every element's bits times an odd number drawn from its index, modulo 2^32.

    An odd factor never loses a bit, so any single flip shows; integer sums do not depend on the order, so the value
    is the same under every sharding, and each device reads only its own part.
    """
    on_device = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    sums = jax.device_get(_device_checksums(on_device))
    return {name: int(sums[name] if name in sums else numpy_checksum(leaf)) for name, leaf in leaves.items()}


@jax.jit
def _device_checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _device_checksum(leaf) for name, leaf in leaves.items()}


def _device_checksum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, _unsigned(x.dtype)).astype(jnp.uint32)
    placed = jax.typeof(x).sharding
    placed = None if placed.mesh.empty else placed  # each device numbers its own part

    def add_axis(index: jax.Array, axis: int) -> jax.Array:
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=placed)
        return index * jnp.uint32(x.shape[axis]) + iota

    index = functools.reduce(add_axis, range(x.ndim), jnp.uint32(0))
    return jnp.sum(bits * (index * jnp.uint32(_MIX) | jnp.uint32(1)), dtype=jnp.uint32)


def numpy_checksum(x: np.ndarray) -> int:
    """The same number on the host, a slab of at most 2^22 elements at a time."""
    flat = np.ascontiguousarray(x).reshape(-1).view(_unsigned(x.dtype))
    total = 0
    for start in range(0, flat.size, 1 << 22):
        slab = flat[start : start + (1 << 22)].astype(np.uint32)
        index = np.arange(start, start + slab.size, dtype=np.uint64).astype(np.uint32)
        total += int(np.sum(slab * (index * np.uint32(_MIX) | np.uint32(1)), dtype=np.uint64))
    return total % (1 << 32)


def _unsigned(dtype: Any) -> np.dtype:
    return np.dtype({1: np.uint8, 2: np.uint16, 4: np.uint32}[np.dtype(dtype).itemsize])


@contextlib.contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    """Turns what the file system refuses into one line for the user; anything else passes."""
    try:
        yield
    except Exception as error:  # tensorstore has no class for a full disk: its ValueErrors differ in their text alone
        if not any(text in str(error).lower() for text in _DISK_ERRORS):
            raise
        raise UserError(f"{what}: {_one_line(error)}; free some space and run the same command") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
