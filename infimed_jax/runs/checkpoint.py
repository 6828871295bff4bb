"""Checkpoints: written in the background, found again, compared, restored exactly and verified leaf by leaf.

A checkpoint is a flat dictionary of arrays named by their path in the state (`trainable.text.norm.scale`,
`opt.1.mu.text…`, `step`), so that parameters alone can be read without knowing the optimizer. Its metadata carries the
caller's JSON (configuration, fingerprints, stage history) and a checksum for each leaf.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from infimed_jax.data.chat import TOKENIZER_FILES, Tokenizer
from infimed_jax.errors import UserError, disk_refusal, one_line
from infimed_jax.files import to_json, whole_folder
from infimed_jax.runs.checksum import checksums
from infimed_jax.trees import flatten

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds its checkpoints, one folder a step."""
TOKENIZER = "tokenizer"
"""Folder with a copy of the tokenizer, in a run's folder or in a checkpoint that belongs to no run."""
READ_BYTES = 1 << 30
"""A read takes at most this much at once, or one leaf."""

_CHECKSUMS, _USER = "checksums", "metadata"
_DELETE_HINT = "remove it, and the one before it is used"
_WRONG_CONFIG_HINT = "give the configuration it was trained with (its run's config.yaml), or another checkpoint"

log = logging.getLogger(__name__)

Metadata = dict[str, Any]
"""The JSON that a checkpoint carries: `config`, `content`, `history`, `step`, …"""


@dataclass(frozen=True)
class Stored:
    """A checkpoint on the disk, as its index describes it."""

    path: Path
    leaves: Mapping[str, Any]
    """Shape, dtype and storage of each leaf, by name."""
    checksums: Mapping[str, int]
    saved: Metadata
    """As it was given to `save`."""

    @property
    def metadata(self) -> Metadata:
        """`saved`, with the copy of the tokenizer that lies with the checkpoint: the original may be gone."""
        run = self.path.parent.parent if self.path.parent.name == CHECKPOINTS else self.path
        kept = next((p for p in (self.path / TOKENIZER, run / TOKENIZER) if (p / "tokenizer.json").is_file()), None)
        if kept is None or "config" not in self.saved:
            return self.saved
        config = self.saved["config"]
        return self.saved | {"config": config | {"data": config["data"] | {"tokenizer": str(kept)}}}

    @property
    def sha256(self) -> str:
        """Fingerprint of the leaves' names and checksums: the same wherever the checkpoint lies."""
        return hashlib.sha256(to_json(self.checksums, sort_keys=True).encode()).hexdigest()

    def read(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """The leaves `wanted` (abstract, by name) and no other; UserError where one is damaged."""
        abstract = {name: wanted.get(name, ocp.PLACEHOLDER) for name in self.leaves}
        try:
            loaded = ocp.load(self.path, abstract)
        except (ValueError, OSError, KeyError) as error:
            raise _unreadable(self.path, error) from error
        leaves = {name: loaded[name] for name in wanted}
        for name, checksum in checksums(leaves).items():
            if checksum != self.checksums[name]:
                raise UserError(f"checkpoint {self.path} is damaged at {name} (its checksum differs): {_DELETE_HINT}")
        return leaves

    def read_in_groups(self, wanted: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """(name, leaf) of all that `read` gives, at most READ_BYTES at a time."""
        group: dict[str, Any] = {}
        size = 0
        for name, leaf in wanted.items():
            leaf_bytes = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            if group and size + leaf_bytes > READ_BYTES:
                yield from self.read(group).items()
                group, size = {}, 0
            group[name] = leaf
            size += leaf_bytes
        if group:
            yield from self.read(group).items()

    def compare(self, wanted: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
        """UserError in one line for the first difference between `wanted` and the stored `leaves`, by name.

        Orbax would cast dtypes silently and report the rest as an incompatible handler.
        """
        missing, extra = wanted.keys() - leaves.keys(), leaves.keys() - wanted.keys()
        if missing or extra:
            parts = [f"{len(missing)} missing, first {min(missing)}"] if missing else []
            parts += [f"{len(extra)} unexpected, first {min(extra)}"] if extra else []
            what = f"is of another model or optimizer ({'; '.join(parts)})"
            raise UserError(f"checkpoint {self.path} {what}: {_WRONG_CONFIG_HINT}")
        for name, leaf in wanted.items():
            ours, theirs = (f"{np.dtype(x.dtype)}{list(x.shape)}" for x in (leaf, leaves[name]))
            if ours != theirs:
                what = f"holds {name} as {theirs}, the configuration asks for {ours}"
                raise UserError(f"checkpoint {self.path} {what}: {_WRONG_CONFIG_HINT}")


def custom_metadata(metadata: Metadata, sums: Mapping[str, int]) -> dict[str, Any]:
    """What Orbax keeps beside the leaves."""
    return {_USER: metadata, _CHECKSUMS: dict(sums)}


def open_checkpoint(folder: str | Path) -> Stored:
    """The index of the checkpoint that `find_checkpoint` finds; UserError where it cannot be read."""
    path = find_checkpoint(folder)
    try:
        stored = ocp.metadata(path)
    except Exception as error:  # whatever damage makes Orbax raise
        raise _unreadable(path, error) from error
    if stored.metadata is None:
        raise UserError(f"checkpoint {path} is damaged (its index cannot be read): {_DELETE_HINT}")
    custom = stored.custom_metadata
    if not isinstance(custom, dict) or not all(isinstance(custom.get(key), dict) for key in (_CHECKSUMS, _USER)):
        raise UserError(f"checkpoint {path} is damaged, or was not written by this project: it has no checksums")
    return Stored(path, stored.metadata, custom[_CHECKSUMS], custom[_USER])


def _unreadable(path: Path, error: Exception) -> UserError:
    if not _is_checkpoint(path):
        return UserError(
            f"checkpoint {path} was deleted while it was read, as its run does: run the same command again"
        )
    return UserError(f"checkpoint {path} cannot be read ({one_line(error, 300)}): {_DELETE_HINT}")


def find_checkpoint(folder: str | Path) -> Path:
    """The latest checkpoint in a run's folder or in a folder of checkpoints, or `folder` itself if it is one."""
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {folder}: the folder does not exist")
    if _is_checkpoint(folder):
        return folder
    for parent in (folder / CHECKPOINTS, folder):
        if steps := complete_steps(parent):
            return parent / str(max(steps))
    raise UserError(
        f"no complete checkpoint in {folder}: give a run's folder, or one of its checkpoints "
        "(`convert from-hf` makes one of a Hugging Face folder)"
    )


def complete_steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit() and _is_checkpoint(path)]


def _torn_steps(folder: Path) -> list[int]:
    """Steps, ascending, whose folders are no whole checkpoints."""
    return sorted({int(path.name) for path in folder.glob("*") if path.name.isdigit()} - {*complete_steps(folder)})


def _remove_half_deleted(folder: Path) -> None:
    """Finish what a kill interrupted: a checkpoint older than the newest whole one was being deleted."""
    newest = max(complete_steps(folder), default=-1)
    for step in (step for step in _torn_steps(folder) if step < newest):
        log.warning("checkpoint %s was being deleted when its run was killed: its rest is removed", folder / str(step))
        shutil.rmtree(folder / str(step))


def _is_checkpoint(folder: Path) -> bool:
    """Orbax writes beside the final name and renames when all is there. (Its own test accepts any folder.)"""
    return (folder / "_CHECKPOINT_METADATA").is_file()


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Raise one line for the user where the file system refuses a write; other errors pass."""
    try:
        yield
    except Exception as error:
        refusal = disk_refusal(error)
        if refusal is None:
            raise
        raise UserError(f"{what}: {refusal}, and run the same command") from error


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the tokenizer's files into `folder`/tokenizer, which appears whole; a copy of the same tokenizer stays.

    `folder` is a run's, or a checkpoint that belongs to no run. With its own copy a run can be moved and read from any
    working folder; `Stored.metadata` names the copy.
    """
    kept = folder / TOKENIZER
    file = kept / "tokenizer.json"
    if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == tokenizer.fingerprint:
        return
    shutil.rmtree(kept, ignore_errors=True)  # left by a run that ended before its first checkpoint
    with whole_folder(kept) as part:
        for name in TOKENIZER_FILES:
            if (tokenizer.folder / name).is_file():
                shutil.copyfile(tokenizer.folder / name, part / name)


def abstract_like(tree: Any) -> Any:
    """Shapes, dtypes and shardings of existing arrays: the target of `Checkpoints.restore`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


class _EverySave:
    """Orbax's default policy silently skips a save while another runs; `Checkpoints.save` waits instead."""

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        return True


class Checkpoints:
    """The checkpoints of one run, the latest `keep` of them. All processes call every method together."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder).absolute()
        if jax.process_index() == 0:
            _remove_half_deleted(self.folder)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("half-deleted checkpoints")
        if torn := _torn_steps(self.folder):  # an unfinished copy; Orbax counts it and would refuse that step's save
            raise UserError(f"checkpoint {self.folder / str(torn[0])} is not complete: remove it, or copy it again")
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

        UserError where the disk refused the save before: its checkpoint does not exist, older ones do.
        """
        self.wait()
        if self.latest_step() == step:
            return
        flat = flatten(state)
        custom = custom_metadata(metadata, checksums(flat))
        with disk_errors(self._describe(step)):
            # Where Orbax cannot make its folder, its threads wait ten minutes for it and hold the process's end.
            tempfile.TemporaryFile(dir=self.folder).close()
            self._pending = step, self._orbax.save_async(step, flat, custom_metadata=custom)

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the save under way, or for `seconds`; its errors are raised here."""
        if self._pending is None:
            return
        step, response = self._pending
        try:
            with disk_errors(self._describe(step)):
                response.result(seconds)
        except Exception as error:
            if isinstance(error, TimeoutError) and seconds is not None:
                return
            self._pending = None
            # Orbax would count the torn step as complete and raise this error again at the next save.
            with contextlib.suppress(Exception):
                self._orbax.close()
            self._orbax = self._open()
            raise
        self._pending = None

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; a save under way does not count."""
        return max(complete_steps(self.folder), default=None)

    def metadata(self, step: int) -> Metadata:
        """The JSON given to `save` (see `Stored.metadata`)."""
        return open_checkpoint(self.folder / str(step)).metadata

    def restore(self, abstract: Any, step: int) -> Any:
        """The state of `step` in the shapes, dtypes and shardings of `abstract`; UserError where they differ."""
        stored, flat = open_checkpoint(self.folder / str(step)), flatten(abstract)
        stored.compare(flat, stored.leaves)
        return jax.tree.unflatten(jax.tree.structure(abstract), stored.read(flat).values())

    def verify(self, step: int, state: Any) -> None:
        """Read the checkpoint of `state` back, a group of leaves at a time; UserError where it is damaged."""
        for _ in open_checkpoint(self.folder / str(step)).read_in_groups(flatten(abstract_like(state))):
            pass

    def elsewhere(self) -> str:
        """The advice for a run that cannot continue in its folder: another folder, from the latest checkpoint."""
        self.wait()
        latest = self.latest_step()
        return "another train.output" + (f" and --init-from {self.folder / str(latest)}" if latest else "")

    def close(self) -> None:
        """Wait for the save under way and release the folder."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _describe(self, step: int) -> str:
        latest = self.latest_step()
        kept = "no checkpoint is complete yet" if latest is None else f"step {latest} is the latest complete one"
        return f"checkpoint of step {step} in {self.folder} was not written ({kept})"
