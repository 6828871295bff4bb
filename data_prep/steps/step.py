"""The one shape of every step that makes a dataset: pieces → shards → a folder that appears whole, with its report.

A step is a pure function of its recipe: where the same recipe made the dataset that is there, nothing is done; a run
that was stopped leaves its finished pieces in `.NAME.new`, and goes on from them if the recipe is still the same.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from data_prep.engine import HERE, Engine, Work, run_pieces
from infimed_jax.config import Data
from infimed_jax.data.sample import Sample
from infimed_jax.data.storage import (
    INDICES,
    MANIFEST,
    SHARD_SIZE,
    UNREADABLE,
    CorruptRecord,
    Samples,
    join_shards,
    open_samples,
    record_name,
    write_shard,
)
from infimed_jax.data.training import training_allowed
from infimed_jax.data.views import Choice, join_view, write_choice
from infimed_jax.errors import UserError
from infimed_jax.files import lock, to_json, write_json
from infimed_jax.progress import Report

T = TypeVar("T")
MAX_BAD_RECORDS = Data.max_bad_records
"""Share of the records that may be damaged, as in packing: with more the disk or the copy is at fault."""
UNREADABLE_RECORDS = "unreadable_records"
"""Key of a report under which damaged records are named."""
_RECIPE = "recipe.json"
_TFDS_FILES = ("dataset_info.json", "features.json")


class NoSamples(UserError):
    """There was nothing to write; `facts` are those of the pieces."""

    def __init__(self, message: str, facts: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(message)
        self.facts = facts


@dataclass(frozen=True)
class Slice:
    """Samples `start` to `stop` of a prepared dataset: as a rule, one shard of it."""

    folder: Path
    start: int
    stop: int

    @property
    def numbers(self) -> range:
        """Numbers of its samples in the dataset."""
        return range(self.start, self.stop)

    def read(self, unreadable: list[str]) -> Iterator[Sample]:
        """Its samples; the names of damaged records join `unreadable`."""
        return (sample for _, sample in readable(open_samples(self.folder), self.numbers, unreadable))


def slices(samples: Samples) -> list[Slice]:
    """A dataset's shards; of a view, as many samples as a shard has."""
    if "shards" in samples.manifest:
        ends = list(itertools.accumulate(shard["samples"] for shard in samples.manifest["shards"]))
    else:
        ends = [*range(SHARD_SIZE, len(samples), SHARD_SIZE), len(samples)]
    return [Slice(samples.folder, start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


def readable(samples: Samples, numbers: Iterable[int], unreadable: list[str]) -> Iterator[tuple[int, Sample]]:
    """Samples that may be damaged: (number, sample), and into `unreadable` the others' names."""
    return ((number, sample) for number, sample, _ in read_whole(samples, numbers, unreadable))


def read_whole(samples: Samples, numbers: Iterable[int], unreadable: list[str]) -> Iterator[tuple[int, Sample, bytes]]:
    """As `readable`, with each sample's record."""
    for number in numbers:
        try:
            sample, record = samples.read(number)
        except CorruptRecord:
            unreadable.append(record_name(samples, number))
            continue
        yield number, sample, record


def refuse_damage(
    unreadable: Sequence[str], records: int, allowed: float = MAX_BAD_RECORDS, option: str = "--max-bad-records "
) -> None:
    """UserError where more than a share of `allowed` of the records is damaged: what is left is no longer the dataset
    that was asked for, and nobody reads that in a report."""
    if not 0 <= allowed <= 1:
        raise UserError(f"the share of bad records must lie in [0, 1], not {allowed}")
    if len(unreadable) > allowed * records:
        raise UserError(
            f"{len(unreadable):,} of {records:,} records cannot be read ({unreadable[0]} first), more than "
            f"{option}{allowed} allows: copy or prepare the dataset again, or allow more"
        )


def unreadable_report(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a report says of the damaged records that the pieces' facts name."""
    return {UNREADABLE_RECORDS: [name for piece in facts for name in piece["unreadable"]]}


def counted(reasons: dict[str, int], unreadable: Sequence[str]) -> dict[str, int]:
    """The counts by reason that are not 0, with that of the damaged records among them."""
    return {reason: n for reason, n in (reasons | {UNREADABLE: len(unreadable)}).items() if n}


def write_stream(folder: Path, name: str, samples: Iterable[Sample]) -> int:
    """Write a piece that is one stream as shards of the usual size; return its samples."""
    rest, written = iter(samples), 0
    for number in itertools.count():
        shard = write_shard(folder, f"{name}-{number:06d}", itertools.islice(rest, SHARD_SIZE))
        written += shard
        if shard < SHARD_SIZE:
            return written


@dataclass(frozen=True)
class Step(Generic[T]):
    """What makes one dataset."""

    output: Path
    name: str
    recipe: dict[str, Any]
    """All that the result depends on, as JSON values; it is kept in the manifest, with `info`."""
    work: Work[T]
    """Writes shards (or choices) whose names begin with the piece's."""
    pieces: Sequence[T]
    report: Callable[[dict[str, Any], list[dict[str, Any]]], dict[str, Any]]
    """(manifest, facts of the pieces) → what `output.json` says."""
    info: dict[str, Any] = field(default_factory=dict)
    inputs: Sequence[Path] = ()
    """Folders that `work` reads beside those of the pieces."""
    records: int = 0
    """Records that the pieces read; a share of `max_bad_records` may be damaged."""
    max_bad_records: float = MAX_BAD_RECORDS
    view_of: Sequence[Samples] = ()
    """The datasets that the pieces choose from, as a `Choice` counts them; none where the pieces write shards."""


def derived(samples: Samples) -> dict[str, Any]:
    """The `info` of a dataset whose samples come from another one."""
    return {"derived_from": samples.manifest["info"], "training_allowed": training_allowed(samples)}


def make_dataset(step: Step[T], engine: Engine, on_progress: Report | None = None) -> dict[str, Any]:
    """Make the step's dataset, and `output.json`, which is returned: samples, fingerprint, and the step's report.

    UserError: see `refuse_other_files`. NoSamples: no piece gave a sample; the report alone is written, for what was
    left out is all that there is to see.
    """
    output, recipe = step.output, step.recipe
    bases = [base.folder for samples in step.view_of for base in samples.bases]
    read = {piece.folder for piece in step.pieces if isinstance(piece, Slice)}
    refuse_other_files(output, [*step.inputs, *bases, *read])
    finished = finished_report(output, recipe)
    if finished is not None:
        return finished
    file = _report_file(output)
    with _alone(output) as fresh:
        _clear_other_work(fresh, recipe)
        # there, where a run was killed after writing the report and before the folder was renamed
        whole = _report_of(fresh, file) if (fresh / MANIFEST).is_file() else None
        if whole is None:
            facts = run_pieces(step.work, step.pieces, fresh, engine, on_progress)
            try:
                refuse_damage(
                    [name for piece in facts for name in piece.get("unreadable", ())],
                    step.records,
                    step.max_bad_records,
                )
            except UserError:
                forget(output)  # by the next run the damaged shard may have been copied again
                raise
            if not (fresh / MANIFEST).is_file():
                shards = sorted(f.stem for f in fresh.glob("*.json") if f.stem[0].isdigit())
                if not any(json.loads((fresh / f"{shard}.json").read_text())["samples"] for shard in shards):
                    shutil.rmtree(fresh)
                    empty = {"samples": 0, "fingerprint": ""}
                    write_json(file, empty | step.report(empty | {"images": 0, "kinds": {}, "origins": {}}, facts))
                    raise NoSamples(f"{output}: nothing is left to write; {file} lists why", facts)
                info = recipe | step.info
                if step.view_of:
                    join_view(fresh, shards, step.view_of, name=step.name, info=info)
                else:
                    join_shards(fresh, shards, name=step.name, info=info)
            manifest = open_samples(fresh).manifest
            whole = {key: manifest[key] for key in ("samples", "fingerprint")} | step.report(manifest, facts)
            write_json(file, whole)
        manifest = open_samples(fresh).manifest
        kept = {MANIFEST, INDICES, *_TFDS_FILES, *(shard["file"] for shard in manifest.get("shards", ()))}
        for leftover in fresh.iterdir():  # facts, and what a worker that was taken for dead had begun
            if leftover.name not in kept:
                leftover.unlink()
        shutil.rmtree(output, ignore_errors=True)
        os.rename(fresh, output)
        return whole


def make_at_once(
    output: Path,
    name: str,
    recipe: dict[str, Any],
    origin: Samples,
    samples: Iterable[Sample] | Iterable[Choice],
    report: dict[str, Any],
    view: bool = False,
) -> dict[str, Any]:
    """`make_dataset` of one stream, in this process, for steps whose work is done before they write: of samples, or
    for a `view` of choices from `origin`."""

    def write(_: None, folder: Path, piece: str) -> dict[str, Any]:
        write_choice(folder, piece, samples) if view else write_stream(folder, piece, samples)
        return {}

    step = Step(
        output,
        name,
        recipe,
        write,
        [None],
        lambda *_: report,
        derived(origin),
        [origin.folder],
        view_of=[origin] * view,
    )
    return make_dataset(step, HERE)


def choose_kept(piece: Slice, folder: Path, name: str, why_not: Callable[[Sample], str]) -> dict[str, Any]:
    """Choose the samples against which `why_not` has no reason; the facts name the others by reason, and the damaged
    records."""
    removed: dict[str, list[str]] = {}
    unreadable: list[str] = []

    def kept() -> Iterator[Choice]:
        for number, sample, record in read_whole(open_samples(piece.folder), piece.numbers, unreadable):
            if reason := why_not(sample):
                removed.setdefault(reason, []).append(sample.id)
            else:
                yield Choice(0, number, sample, record)

    write_choice(folder, name, kept())
    return {"read": len(piece.numbers), "removed": removed, "unreadable": unreadable}


def removed_report(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the shards of `choose_kept` left out, counted and by id; records that are damaged by their number."""
    removed: dict[str, list[str]] = {}
    for piece in facts:
        for reason, ids in piece["removed"].items():
            removed.setdefault(reason, []).extend(ids)
    removed = dict(sorted(removed.items()))
    damaged = unreadable_report(facts)
    counts = counted({reason: len(ids) for reason, ids in removed.items()}, damaged[UNREADABLE_RECORDS])
    return {"read": sum(piece["read"] for piece in facts), "removed": counts, "removed_ids": removed} | damaged


def refuse_other_files(output: Path, inputs: Sequence[Path] = ()) -> None:
    """For steps that spend much before they write. UserError where a dataset may not be written: at, in or around one
    of its `inputs`, which it would replace; over other files; or where another file has its report's name."""
    if output.name in ("", ".."):
        raise UserError(f"the output {str(output)!r} has no name of its own: give a new folder")
    place = output.resolve()
    if output.is_symlink():  # a folder cannot be renamed to its place, which would be found out last
        raise UserError(f"the output {output} is a link: give the folder itself, such as {place}")
    for folder in inputs:
        read = folder.resolve()
        if place == read or place in read.parents or read in place.parents:
            raise UserError(f"{output} would be written over what is read, {folder}: choose another output folder")
    if output.exists() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise UserError(f"{output} holds other files than a prepared dataset: choose another folder")
    file = _report_file(output)
    if not (output / MANIFEST).is_file() and file.exists() and not _begins_as_report(file):
        raise UserError(f"{file}, where the report would be written, is another file: choose another output folder")


def _begins_as_report(file: Path) -> bool:
    """By its first bytes: a source's own annotations may be of any size."""
    with file.open("rb") as start:
        return re.match(rb'\{\s*"samples":', start.read(64)) is not None


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[Path]:
    """`.NAME.new`, held against other runs of this machine while the block runs; a kill lets it go. UserError: one of
    them has it. (Two at once took each other's unfinished shards for leftovers.)"""
    fresh = _begun(output)
    while True:
        fresh.mkdir(parents=True, exist_ok=True)
        handle = lock(fresh, output)
        if fresh.is_dir() and os.path.samestat(os.fstat(handle), fresh.stat()):
            break
        os.close(handle)  # the other run was done meanwhile, and has renamed it
    try:
        yield fresh
    finally:
        os.close(handle)


def _clear_other_work(fresh: Path, recipe: dict[str, Any]) -> None:
    """Empty the folder where another recipe left it, and remove what a killed worker had begun."""
    text = to_json(recipe, sort_keys=True)
    try:
        same = (fresh / _RECIPE).read_text(encoding="utf-8") == text
    except OSError:
        same = False
    if not same and not prepared_by(fresh, recipe):
        for entry in fresh.iterdir():  # itself it stays: it is held
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        (fresh / _RECIPE).write_text(text, encoding="utf-8")
    for part in fresh.glob(".*.part"):
        part.unlink(missing_ok=True)


def _begun(output: Path) -> Path:
    return output.with_name(f".{output.name}.new")


def forget(output: Path) -> None:
    """Remove what was begun for a dataset that will not be made."""
    shutil.rmtree(_begun(output), ignore_errors=True)


def finished_report(output: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a dataset that is done already; None where it or its report is missing, old or broken.

    Also where records could not be read: by now their shard may have been copied again.
    """
    report = _report_of(output, _report_file(output)) if prepared_by(output, recipe) else None
    return None if report is None or report.get(UNREADABLE_RECORDS) else report


def _report_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.json")


def _report_of(folder: Path, file: Path) -> dict[str, Any] | None:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(report, dict) and report.get("fingerprint") == open_samples(folder).fingerprint
    return report if same else None


def prepared_by(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether `folder` is a whole dataset that was made by exactly this recipe."""
    try:
        info = open_samples(folder).manifest["info"]
    except UserError:  # absent, or damaged: either way it is to be made
        return False
    return {key: info.get(key) for key in recipe} == recipe
