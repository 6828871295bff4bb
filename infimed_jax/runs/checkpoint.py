"""A checkpoint: written in the background, found, described, restored exactly, verified leaf by leaf.

It is a flat dictionary of arrays named by their path in the state (`trainable.text.norm.scale`, `opt.1.mu.text…`,
`step`), so that parameters alone can be read without knowing the optimizer. Its metadata carries the caller's JSON
(configuration, fingerprint, stage history) and a checksum a leaf.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from infimed_jax.data.chat import TOKENIZER_FILES, Tokenizer
from infimed_jax.errors import UserError, disk_refusal, one_line
from infimed_jax.files import to_json
from infimed_jax.runs.checksum import checksums
from infimed_jax.trees import flatten

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds its checkpoints, one folder a step."""
TOKENIZER = "tokenizer"
"""Folder, in a run's or in a checkpoint that belongs to no run, with a copy of its tokenizer."""
READ_BYTES = 1 << 30
"""Leaves are read, and cast, in groups of at most so much."""

_CHECKSUMS, _USER = "checksums", "metadata"
_OLDER = "remove it, and the one before it is used"
_OTHER = "give the configuration it was trained with (its run's config.yaml), or another checkpoint"

Metadata = dict[str, Any]


def custom_metadata(metadata: Metadata, sums: Mapping[str, int]) -> dict[str, Any]:
    """What Orbax keeps beside the leaves: the caller's JSON, and a checksum a leaf."""
    return {_USER: metadata, _CHECKSUMS: dict(sums)}


def user_metadata(path: Path, stored: Any) -> Metadata:
    """The caller's JSON, of what `read_index` gives for `path`.

    Its `data.tokenizer` is the copy that lies with the checkpoint, if there is one: where the run found it may be gone.
    """
    metadata = stored.custom_metadata[_USER]
    places = [path, path.parent.parent] if path.parent.name == CHECKPOINTS else [path]
    kept = next((place / TOKENIZER for place in places if (place / TOKENIZER / "tokenizer.json").is_file()), None)
    if kept is None or "config" not in metadata:
        return metadata
    config = metadata["config"]
    return metadata | {"config": config | {"data": config["data"] | {"tokenizer": str(kept)}}}


def leaves_sha256(stored: Any) -> str:
    """Of the names and checksums of a checkpoint's leaves, from its index: the same wherever it lies."""
    sums = stored.custom_metadata[_CHECKSUMS]
    return hashlib.sha256(to_json(sums, sort_keys=True).encode()).hexdigest()


def find_checkpoint(folder: str | Path) -> Path:
    """The checkpoint meant by a run's folder (its latest), a folder of checkpoints, or a checkpoint itself."""
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


def read_metadata(folder: str | Path) -> Metadata:
    """The JSON given to `save`, of the checkpoint that `load_params` would read."""
    path = find_checkpoint(folder)
    return user_metadata(path, read_index(path))


def complete_steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit() and _is_checkpoint(path)]


def _is_checkpoint(folder: Path) -> bool:
    """Orbax writes beside the final name and renames when all is there. (Its own test accepts any folder.)"""
    return (folder / "_CHECKPOINT_METADATA").is_file()


def read_index(path: Path) -> Any:
    try:
        stored = ocp.metadata(path)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"checkpoint {path} cannot be read ({one_line(error, 300)}): {_OLDER}") from error
    if stored.metadata is None:
        raise UserError(f"checkpoint {path} is damaged (its index cannot be read): {_OLDER}")
    if _CHECKSUMS not in (stored.custom_metadata or {}):
        raise UserError(f"checkpoint {path} was not written by this project: it has no checksums")
    return stored


def load_leaves(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """All leaves of a checkpoint (abstract, by name), compared before reading and verified after it."""
    stored = read_index(path)
    compare(path, wanted, stored.metadata)
    return read_leaves(path, stored, wanted)


def read_leaves(path: Path, stored: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves `wanted` (abstract, by name) and no other, verified."""
    abstract = {name: wanted.get(name, ocp.PLACEHOLDER) for name in stored.metadata}
    try:
        loaded = ocp.load(path, abstract)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"checkpoint {path} cannot be read ({one_line(error, 300)}): {_OLDER}") from error
    leaves = {name: loaded[name] for name in wanted}
    expected = stored.custom_metadata[_CHECKSUMS]
    for name, checksum in checksums(leaves).items():
        if checksum != expected[name]:
            raise UserError(f"checkpoint {path} is damaged at {name} (its checksum differs): {_OLDER}")
    return leaves


def groups(wanted: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
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


def compare(path: Path, wanted: dict[str, Any], stored: Mapping[str, Any]) -> None:
    """UserError in one line for the first difference; Orbax would cast dtypes silently and call the rest a handler."""
    missing, extra = wanted.keys() - stored.keys(), stored.keys() - wanted.keys()
    if missing or extra:
        parts = [f"{len(missing)} missing, first {min(missing)}"] if missing else []
        parts += [f"{len(extra)} unexpected, first {min(extra)}"] if extra else []
        raise UserError(f"checkpoint {path} is of another model or optimizer ({'; '.join(parts)}): {_OTHER}")
    for name, leaf in wanted.items():
        ours, theirs = (f"{np.dtype(x.dtype)}{list(x.shape)}" for x in (leaf, stored[name]))
        if ours != theirs:
            raise UserError(f"checkpoint {path} holds {name} as {theirs}, the configuration asks for {ours}: {_OTHER}")


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns what the file system refuses into one line for the user; anything else passes."""
    try:
        yield
    except Exception as error:
        refusal = disk_refusal(error)
        if refusal is None:
            raise
        raise UserError(f"{what}: {refusal}, and run the same command") from error


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the tokenizer's files into `folder`/tokenizer, which appears whole; a copy of the same tokenizer stays.

    `folder` is a run's, or a checkpoint that belongs to no run. A run with its own copy can be moved, and read from any
    working folder; `user_metadata` finds the copy.
    """
    kept, part = folder / TOKENIZER, folder / f".{TOKENIZER}.part"
    file = kept / "tokenizer.json"
    if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == tokenizer.fingerprint:
        return
    for old in (part, kept):  # of a run that was killed; of a run that ended before its first checkpoint
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir()
    for name in TOKENIZER_FILES:
        if (tokenizer.folder / name).is_file():
            shutil.copyfile(tokenizer.folder / name, part / name)
    part.rename(kept)


def abstract_like(tree: Any) -> Any:
    """Shapes, dtypes and shardings of existing arrays: what `Checkpoints.restore` wants."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


class _EverySave:
    """Orbax's default policy silently skips a save while another runs; `Checkpoints.save` waits instead."""

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        return True


class Checkpoints:
    """The checkpoints of one run, the latest `keep` of them. All processes call every method together."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder).absolute()
        found = {int(path.name) for path in self.folder.glob("*") if path.name.isdigit()}
        torn = sorted(found - {*complete_steps(self.folder)})
        if torn:  # not a kill's work, a half-made copy's; Orbax counts it, and would refuse that step's save
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

        UserError where the save before failed for the disk's sake: its checkpoint does not exist, older ones do.
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
        """Until the save under way is complete, or for `seconds`; its errors surface here."""
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
        """The JSON given to `save`."""
        path = self.folder / str(step)
        return user_metadata(path, read_index(path))

    def restore(self, abstract: Any, step: int) -> Any:
        """The state of `step` in the shapes, dtypes and shardings of `abstract`; UserError where they differ."""
        flat = flatten(abstract)
        return jax.tree.unflatten(jax.tree.structure(abstract), load_leaves(self.folder / str(step), flat).values())

    def verify(self, step: int, state: Any) -> None:
        """Read the checkpoint of `state` back, a group of leaves at a time; UserError where it is damaged."""
        path = self.folder / str(step)
        stored = read_index(path)
        for group in groups(flatten(abstract_like(state))):
            read_leaves(path, stored, group)

    def elsewhere(self) -> str:
        """What to give a run that cannot go on in its folder: another one, and the latest checkpoint to start from."""
        self.wait()
        latest = self.latest_step()
        return "another train.output" + (f" and --init-from {self.folder / str(latest)}" if latest else "")

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
