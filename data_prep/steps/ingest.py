"""From a source's own files to prepared datasets: one folder a split, with a report of what was kept and skipped."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.engine import HERE, Engine
from data_prep.reading.files import NoFiles, walk
from data_prep.reading.image_bytes import Kept, keep_image
from data_prep.reading.rows import read_json
from data_prep.sources import find_source, named
from data_prep.sources.source import ODDITIES, Source, check_split, with_options
from data_prep.steps.step import NoSamples, Step, finished_report, forget, make_dataset
from infimed_jax.data.sample import Sample, Skipped
from infimed_jax.data.storage import SHARD_SIZE, write_shard
from infimed_jax.errors import UserError
from infimed_jax.files import write_json
from infimed_jax.progress import Report

VERSION = 7
"""Version of what adapters make of the same files; raise it when that changes, so that datasets are prepared again."""
_REMEMBERED = 100_000
"""Images whose verdict is kept, in case they come again."""


def ingest(
    source: str,
    input: str | Path,
    output: str | Path,
    splits: Sequence[str] = (),
    *,
    options: Mapping[str, str] | None = None,
    on_progress: Report | None = None,
    limit: int | None = None,
    engine: Engine = HERE,
) -> dict[str, Any]:
    """Prepare `output/SPLIT` (a dataset) and `output/SPLIT.json` (its report) for each split; no splits are all those
    that `input` has files of.

    A split whose inputs have not changed is left as it is; `limit` keeps the first samples only; `options` are the
    source's own, as text, and `name`, by which the samples call their source (`sources.named`); `source` is a name for
    `find_source`. Returns the reports by split. UserError: no such
    source, split or option, an unusable input folder, or not one usable record.
    """
    options = dict(options or {})
    adapter, _ = _open(source, options)
    for split in splits:
        check_split(adapter, split)
    for option in adapter.options:
        if option.names_split and option.name in options and len(splits) != 1:
            raise UserError(f"option {option.name} names the data of one split: say which it is by --split")
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, not {limit}")
    input, output = Path(input), Path(output)
    if not input.is_dir():
        raise UserError(f"{input} is not a folder: {adapter.name} wants {adapter.layout}, from {adapter.obtain}")
    files = _Files(adapter.address, options, input, limit)
    inputs = _fingerprint(input)
    reports: dict[str, Any] = {}
    absent: list[NoFiles] = []
    for split in splits or adapter.splits:
        try:
            reports[split] = _ingest_split(files, output / split, inputs, engine, on_progress)
        except NoFiles as error:
            if splits:
                raise
            forget(output / split)
            absent.append(error)
    if not reports:
        raise absent[0]
    return reports


def _fingerprint(folder: Path) -> str:
    """SHA-256 of the names, sizes and times of all files: reading terabytes to skip work would be no gain.

    A link to nothing has neither; whoever reads it finds the image missing.
    """
    digest = hashlib.sha256()
    prefix = len(os.path.join(folder, ""))
    for file in walk(folder):
        try:
            state = os.stat(file)
            line = f"{file[prefix:]}\0{state.st_size}\0{state.st_mtime_ns}\n"
        except OSError:
            line = f"{file[prefix:]}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


@dataclass(frozen=True)
class _Files:
    """A source's own files in a folder, and how they are read; another process opens the source by its address."""

    source: str
    options: dict[str, str]
    folder: Path
    limit: int | None

    def open(self) -> tuple[Source, dict[str, str]]:
        """The source with its options bound, and what to record of them."""
        return _open(self.source, self.options)


NAME = "name"
"""An option of every source."""


def _open(source: str, options: Mapping[str, str]) -> tuple[Source, dict[str, str]]:
    adapter, recorded = with_options(find_source(source), {key: v for key, v in options.items() if key != NAME})
    if NAME in options:
        return named(adapter, options[NAME]), recorded | {NAME: options[NAME]}
    return adapter, recorded


def _ingest_split(
    files: _Files, output: Path, inputs: str, engine: Engine, on_progress: Report | None
) -> dict[str, Any]:
    """Prepare the split `output.name`; `inputs` is the fingerprint of the files."""
    adapter, recorded = files.open()
    split, limit = output.name, files.limit
    recipe = {
        "version": VERSION,
        "source": adapter.label or adapter.name,
        "split": split,
        "inputs": inputs,
        "limit": limit,
    }
    recipe |= {"options": recorded} | ({"code": adapter.code} if adapter.code else {})
    if (finished := finished_report(output, recipe)) is not None:
        return finished  # before a long file is cut
    # Without shards of its own a source is one stream, in this process; a limit counts along the stream, too.
    shards = [] if limit or adapter.shards is None else adapter.shards(files.folder, split)
    pieces = [(shard,) for shard in shards] or [()]
    alone = len(pieces) == 1
    step = Step(
        output,
        name=adapter.label or adapter.name,
        recipe=recipe,
        info={
            "adapter": adapter.name,
            "licence": adapter.licence,
            "commercial_use": adapter.commercial_use,
            "training_allowed": adapter.training_allowed,
        },
        work=partial(_ingest_piece, files, split, on_progress if alone else None),
        pieces=pieces,
        report=partial(_report, adapter, recorded, split, limit),
        inputs=[files.folder],
    )
    try:
        return make_dataset(step, HERE if alone else engine, None if alone else on_progress)
    except NoSamples as error:
        skipped = [record for facts in error.facts for record in facts["skipped"]]
        counted = ", ".join(f"{reason}: {n:,}" for reason, n in _by_reason(skipped).items())
        first = "".join(f"{reason} first at {place}; " for reason, place in _first(skipped).items())
        raise UserError(
            f"{adapter.name}/{split}: no record of {files.folder} can be used ({counted or 'it has none'}); {first}"
            f"{output.with_name(f'{split}.json')} lists them"
        ) from error


def _report(
    adapter: Source,
    options: dict[str, str],
    split: str,
    limit: int | None,
    manifest: dict[str, Any],
    facts: list[dict[str, Any]],
) -> dict[str, Any]:
    skipped = [record for piece in facts for record in piece["skipped"]]
    kept_metadata: Counter[str] = Counter()
    oddities: Counter[str] = Counter()
    for piece in facts:
        kept_metadata.update(piece["images_with_metadata"])
        oddities.update(piece["kept_although"])
    return {
        "source": adapter.label or adapter.name,
        "adapter": adapter.name,
        "split": split,
        "title": adapter.title,
        "licence": adapter.licence,
        "commercial_use": adapter.commercial_use,
        "allow_external_api": adapter.allow_external_api,
        "training_allowed": adapter.training_allowed,
        "options": options,
        "limit": limit,
        "kinds": manifest["kinds"],
        "skipped": _by_reason(skipped),
        "skipped_first": _first(skipped),
        "kept_although": dict(sorted(oddities.items())),
        "images_with_metadata": dict(sorted(kept_metadata.items())),
        "skipped_records": skipped,
    }


def _by_reason(skipped: Iterable[dict[str, Any]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for fault in skipped:
        counts[fault["reason"]] += fault["records"]
    return dict(sorted(counts.items()))


def _first(skipped: Iterable[dict[str, Any]]) -> dict[str, str]:
    """For each reason, the record that it struck first, and what is known of it, such as a path; in one line."""
    first: dict[str, str] = {}
    for fault in skipped:
        first.setdefault(fault["reason"], ", ".join(filter(None, (fault["id"], fault["detail"]))))
    return {reason: "".join(c if c.isprintable() else "?" for c in place) for reason, place in first.items()}


def _ingest_piece(
    files: _Files, split: str, on_progress: Report | None, shard: tuple[Any, ...], folder: Path, name: str
) -> dict[str, Any]:
    """Write the piece's shards, each with the place where it ended, so that a stopped run goes on behind the last.

    `shard` is one of the source's; empty, the piece is the whole split.
    """
    adapter, _ = files.open()
    places = [read_json(file, dict) for file in sorted(folder.glob(f"at-{name}-*.json"))]
    read = places[-1]["read"] if places else 0
    records = enumerate(itertools.islice(adapter.samples(files.folder, split, *shard), read, None), start=read + 1)
    kept = sum(place["kept"] for place in places)
    seen: dict[bytes, Kept] = {}
    while not places or places[-1]["kept"] == SHARD_SIZE:
        place: dict[str, Any] = {"read": read, "skipped": [], "images_with_metadata": {}, "kept_although": {}}
        room = SHARD_SIZE if files.limit is None else min(SHARD_SIZE, files.limit - kept)
        samples = itertools.islice(_kept(records, place, seen, split, on_progress), room)
        shard = f"{name}-{len(places):06d}"
        place["kept"] = write_shard(folder, shard, samples)
        read, kept = place["read"], kept + place["kept"]
        write_json(folder / f"at-{shard}.json", place)
        places.append(place)
    counts: dict[str, Counter[str]] = {"images_with_metadata": Counter(), "kept_although": Counter()}
    for place in places:
        for key, count in counts.items():
            count.update(place[key])
    return {"skipped": [record for place in places for record in place["skipped"]]} | counts


def _kept(
    records: Iterator[tuple[int, Sample | Skipped]],
    place: dict[str, Any],
    seen: dict[bytes, Kept],
    split: str,
    on_progress: Report | None,
) -> Iterator[Sample]:
    """The usable samples, their images without metadata; `place` counts along."""
    metadata = place["images_with_metadata"]
    for number, record in records:
        if isinstance(record, Sample):
            images = [_keep(image, seen) for image in record.images]
            fault = next((image.fault for image in images if image.fault), "")
            if fault:
                record = Skipped(record.id, fault, record.meta.get("image_id") or record.meta.get("source_id", ""))
            else:
                if any(image.data is not given for image, given in zip(images, record.images, strict=True)):
                    record = replace(record, images=tuple(image.data for image in images))
                for image in images:
                    if image.metadata:
                        metadata[image.metadata] = metadata.get(image.metadata, 0) + 1
        place["read"] = number
        if on_progress is not None:
            on_progress(number, 0, f"{split}: {number:,} records")
        if isinstance(record, Skipped):
            place["skipped"].append(vars(record))
        else:
            for oddity in ODDITIES & record.meta.keys():
                place["kept_although"][oddity] = place["kept_although"].get(oddity, 0) + 1
            yield record


def _keep(image: bytes, seen: dict[bytes, Kept]) -> Kept:
    """A JPEG is judged faster than it is looked up; other formats are decoded, each distinct image once."""
    if image.startswith(b"\xff\xd8"):
        return keep_image(image)
    key = hashlib.blake2b(image, digest_size=16).digest()
    if key not in seen:
        if len(seen) >= _REMEMBERED:
            seen.clear()
        kept = keep_image(image)
        seen[key] = replace(kept, data=b"") if kept.data is image else kept  # what was stripped is held, and is rare
    return replace(seen[key], data=seen[key].data or image)
