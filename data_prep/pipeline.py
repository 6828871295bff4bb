"""From a source's own files to prepared datasets: one folder a split, with a report of what was kept and skipped."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.sources import SOURCES
from data_prep.sources.files import read_json
from data_prep.sources.source import Source, check_split, with_options
from infimed_jax.data.images import ImageError, decode_image
from infimed_jax.data.sample import Sample, Skipped
from infimed_jax.data.storage import MANIFEST, open_samples, write_samples
from infimed_jax.errors import UserError
from infimed_jax.files import write_json

VERSION = 2
"""Of what adapters make of the same files; raise it when that changes, so that datasets are prepared again."""
_CHECK_SIZE = 32
"""Side to which an image is decoded to see whether it can be; the pixels are thrown away."""

Progress = Callable[[str, int], None]
"""Called with the split and the number of records read so far, after each."""


def ingest(
    source: str,
    input: str | Path,
    output: str | Path,
    splits: Sequence[str] = (),
    *,
    options: Mapping[str, str] | None = None,
    on_progress: Progress | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Prepare `output/SPLIT` (a dataset) and `output/SPLIT.json` (its report) for each split; no splits are all.

    A split whose inputs have not changed is left as it is; `limit` keeps the first samples only; `options` are the
    source's own, as text. Returns the reports by split. UserError: no such source, split or option, an unusable input
    folder, or not one usable record.
    """
    adapter, recorded = with_options(_adapter(source), options or {})
    for split in splits:
        check_split(adapter, split)
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, not {limit}")
    input, output = Path(input), Path(output)
    if not input.is_dir():
        raise UserError(f"{input} is not a folder: {source} wants {adapter.layout}, from {adapter.obtain}")
    inputs = _fingerprint(input)
    return {
        split: _ingest_split(adapter, input, output, split, inputs, recorded, on_progress, limit)
        for split in splits or adapter.splits
    }


def _adapter(source: str) -> Source:
    if source not in SOURCES:
        near = difflib.get_close_matches(source, SOURCES, 1)
        raise UserError(f"no data source {source!r}{f', perhaps {near[0]}' if near else ''}: `data sources` lists them")
    return SOURCES[source]


def _fingerprint(folder: Path) -> str:
    """SHA-256 of the names, sizes and times of all files: reading terabytes to skip work would be no gain."""
    digest = hashlib.sha256()
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            state = os.stat(os.path.join(parent, name))
            relative = os.path.relpath(os.path.join(parent, name), folder)
            digest.update(f"{relative}\0{state.st_size}\0{state.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _ingest_split(
    adapter: Source,
    input: Path,
    output: Path,
    split: str,
    inputs: str,
    options: dict[str, str],
    on_progress: Progress | None,
    limit: int | None,
) -> dict[str, Any]:
    recipe = {"version": VERSION, "source": adapter.name, "split": split, "inputs": inputs, "limit": limit}
    recipe |= {"options": options}
    folder, report_file = output / split, output / f"{split}.json"
    finished = _finished_report(folder, report_file, recipe)
    if finished is not None:
        return finished
    skipped: list[Skipped] = []
    samples = _kept(adapter, input, split, skipped, on_progress, limit)
    try:
        terms = {"licence": adapter.licence, "training_allowed": adapter.training_allowed}
        manifest = replace_dataset(folder, samples, adapter.name, recipe | terms)
    except NoSamples as error:
        counted = ", ".join(f"{reason}: {n:,}" for reason, n in _by_reason(skipped).items())
        raise UserError(
            f"{adapter.name}/{split}: no record of {input} can be used ({counted or 'it has none'})"
        ) from error
    report = {
        "source": adapter.name,
        "split": split,
        "title": adapter.title,
        "licence": adapter.licence,
        "commercial_use": adapter.commercial_use,
        "allow_external_api": adapter.allow_external_api,
        "training_allowed": adapter.training_allowed,
        "options": options,
        "limit": limit,
        "samples": manifest["samples"],
        "kinds": manifest["kinds"],
        "fingerprint": manifest["fingerprint"],
        "skipped": _by_reason(skipped),
        "skipped_records": [vars(record) for record in skipped],
    }
    write_json(report_file, report)
    return report


def _finished_report(folder: Path, report_file: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a split that is done already; None where the dataset or its report is missing, old or broken."""
    if not prepared_by(folder, recipe):
        return None
    try:
        report = read_json(report_file, dict)
    except UserError:
        return None
    return report if report.get("fingerprint") == open_samples(folder).fingerprint else None


def _by_reason(skipped: Iterable[Skipped]) -> dict[str, int]:
    return dict(sorted(Counter(record.reason for record in skipped).items()))


def _kept(
    adapter: Source,
    input: Path,
    split: str,
    skipped: list[Skipped],
    on_progress: Progress | None,
    limit: int | None,
) -> Iterator[Sample]:
    """The usable samples; the others go to `skipped`. Each distinct image is decoded once."""
    verdicts: dict[bytes, str] = {}
    kept = 0
    for number, record in enumerate(adapter.read(input, split), start=1):
        if isinstance(record, Sample):
            reason = next(filter(None, (_image_fault(image, verdicts) for image in record.images)), "")
            record = Skipped(record.id, reason, record.meta.get("image_id", "")) if reason else record
        if on_progress is not None:
            on_progress(split, number)
        if isinstance(record, Skipped):
            skipped.append(record)
            continue
        yield record
        kept += 1
        if kept == limit:
            return


def _image_fault(image: bytes, verdicts: dict[bytes, str]) -> str:
    """Why the image cannot be decoded, or the empty string."""
    key = hashlib.blake2b(image, digest_size=16).digest()
    if key not in verdicts:
        try:
            decode_image(image, _CHECK_SIZE)
            verdicts[key] = ""
        except ImageError as error:
            verdicts[key] = error.reason
    return verdicts[key]


class NoSamples(UserError):
    """There was nothing to write."""


def prepared_by(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether `folder` is a whole dataset that was made by exactly this recipe."""
    try:
        info = open_samples(folder).manifest["info"]
    except UserError:  # absent, or damaged: either way it is to be made
        return False
    return {key: info.get(key) for key in recipe} == recipe


def replace_dataset(folder: Path, samples: Iterator[Sample], name: str, info: dict[str, Any]) -> dict[str, Any]:
    """Write a dataset where there may be an older one, which stays until the new one is whole. Returns the manifest.

    UserError: the folder holds something that is no prepared dataset. NoSamples: there is nothing to write.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} holds other files than a prepared dataset: choose another folder")
    first = next(samples, None)
    if first is None:
        raise NoSamples(f"no samples for {folder}")
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed between writing and renaming
    manifest = write_samples(fresh, itertools.chain((first,), samples), name=name, info=info)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(fresh, folder)
    return manifest
