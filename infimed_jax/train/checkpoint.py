"""The checkpoints of a training run: written in the background, restored exactly, verified leaf by leaf."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from infimed_jax.errors import UserError
from infimed_jax.train.checksum import checksums
from infimed_jax.train.state import abstract_like
from infimed_jax.train.stored import (
    Metadata,
    complete_steps,
    custom_metadata,
    disk_errors,
    groups,
    load_leaves,
    read_index,
    read_leaves,
    user_metadata,
)
from infimed_jax.trees import flatten


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
