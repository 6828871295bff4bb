"""Prepared datasets: Samples in ArrayRecord shards that TFDS reads too, written and read without TensorFlow.

A folder holds the shards, TFDS's own `dataset_info.json` and `features.json`, and `manifest.json`, which carries the
counts and the fingerprint. It appears whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from infimed_jax.data.records import (
    FORMAT,
    JSON_FIELDS,
    TEXT_FIELDS,
    Tally,
    check_sample,
    from_record,
    sum_facts,
    to_record,
)
from infimed_jax.data.sample import Sample
from infimed_jax.errors import UserError, one_line
from infimed_jax.files import whole_file, whole_folder, write_json

MANIFEST = "manifest.json"
INDICES = "indices.npz"
"""A view's `base` and `number`, i64[N] each, and `meta`, JSON by sample, where a step added to it."""
DIGEST = "indices_sha256"
"""Where a view's manifest holds the digest of its indices."""
TFDS_SPLIT = "samples"
"""The one TFDS split; a sample's own split is its field."""
_KEYS = {"name": str, "kinds": dict, "origins": dict, "fingerprint": str, "info": dict}
"""What readers take from a manifest, with its JSON type."""
SHARD_SIZE = 4096
"""Samples a shard: about 200 MB at the usual 50 KB an image."""

_DESCRIPTION = (
    "Samples of images and text; `chunks`, `turns` and `meta` are JSON, `images` are encoded files as in their source."
)


UNREADABLE = "unreadable record"
"""What reports call a record that cannot be read back."""


class CorruptRecord(ValueError):
    """A record that cannot be read back; the message names the dataset and the record's number."""


def write_samples(
    folder: str | Path,
    samples: Iterable[Sample],
    *,
    name: str,
    shard_size: int = SHARD_SIZE,
    info: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a prepared dataset and return its manifest; `info` (licences, origin, …) is kept in it as given.

    The folder is written beside its place and renamed, so a stopped run leaves nothing that looks finished.
    UserError: the folder is in use, there are no samples, an id occurs twice, or a sample contradicts itself.
    """
    folder = Path(folder)
    if shard_size < 1:
        raise UserError(f"shard_size must be positive, not {shard_size}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already: remove it or choose another folder")
    with whole_folder(folder) as part:
        shards: list[str] = []
        rest = iter(samples)
        while batch := list(itertools.islice(rest, 1)):  # a look ahead, so that no shard is empty
            shards.append(f"{len(shards):06d}")
            write_shard(part, shards[-1], itertools.chain(batch, itertools.islice(rest, shard_size - 1)))
        return join_shards(part, shards, name=name, info=info)


def write_shard(folder: Path, shard: str, samples: Iterable[Sample]) -> int:
    """Write one shard of a dataset in the making, and its facts, which appear last and whole; return its samples.

    Shards may be written by many processes at once and in any order. Two or three samples are in memory, not all.
    UserError: an id occurs twice, or a sample contradicts itself. OSError: the disk is full, or fails.
    """
    tally = Tally()
    with whole_file(folder / shard) as part:
        # group_size 1: each record is found and read alone, as random access wants. snappy: images do not compress, and
        # zstd, the default, took four times as long on VQA-RAD's for 2 % less; without any it is hardly faster.
        writer = ArrayRecordWriter(str(part), "group_size:1,snappy")
        try:
            for sample in samples:
                check_sample(sample)
                record = to_record(sample)
                tally.add(sample, record)
                with _disk_errors():
                    writer.write(record)
            with _disk_errors():
                writer.close()
        except BaseException:  # the file is removed next, so it must be closed
            with suppress(RuntimeError):
                writer.close()
            raise
    if not tally.ids:
        (folder / shard).unlink()
    write_json(folder / f"{shard}.json", tally.facts())
    return len(tally.ids)


@contextmanager
def _disk_errors() -> Iterator[None]:
    """The writer's error as what it is: a disk that is full, or fails."""
    try:
        yield
    except RuntimeError as error:
        code = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(code, f"{os.strerror(code)}: {_one_line(error)}") from error


def join_shards(
    folder: Path, shards: Sequence[str], *, name: str, info: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Make the shards in `folder`, in the order given, a prepared dataset and return its manifest; empty ones vanish.

    UserError: there are no samples, or an id occurs twice. May be repeated after a kill.
    """
    summed, lengths = sum_facts(folder, shards, name)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split=TFDS_SPLIT, filetype_suffix="array_record"
    )
    files = [template.sharded_filepath(shard_index=i, num_shards=len(lengths)) for i in range(len(lengths))]
    for shard, file in zip(lengths, files, strict=True):
        if (folder / shard).is_file():  # else renamed before a kill
            os.rename(folder / shard, file)
    _write_tfds_metadata(folder, name, template, list(lengths.values()), summed["bytes"])
    files_of = [
        {"file": Path(file).name, "samples": samples, "bytes": os.path.getsize(file)}
        for file, samples in zip(files, lengths.values(), strict=True)
    ]
    manifest = summed | {"shards": files_of, "info": info or {}}
    write_json(folder / MANIFEST, manifest)
    for shard in shards:
        (folder / f"{shard}.json").unlink()
    return manifest


def _write_tfds_metadata(
    part: Path, name: str, template: tfds.core.ShardedFileTemplate, lengths: list[int], size: int
) -> None:
    """What `tfds.builder_from_directory` wants. Images are bytes to it: decoding hostile files is ours, not TFDS's."""
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict(
        {field: text for field in (*TEXT_FIELDS, *JSON_FIELDS)}
        | {field: tfds.features.Sequence(text) for field in ("options", "images")}  # no alternatives: few have any
    )
    split = tfds.core.SplitInfo(name=TFDS_SPLIT, shard_lengths=lengths, num_bytes=size, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=part,
        features=features,
        split_infos=[split],
        filename_template=template,
        check_data=False,  # its check builds a tf.data pipeline
        description=_DESCRIPTION,
    )


class Samples(Sequence[Sample]):
    """Random access to a prepared dataset; thread-safe, picklable, and a Grain data source. Opens shards when read."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._open()

    def _open(self) -> None:
        folder, manifest = self.folder, self.manifest
        # the lengths in brackets spare opening every shard just to count
        self._records = ArrayRecordDataSource([f"{folder / s['file']}[0:{s['samples']}]" for s in manifest["shards"]])

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the SHA-256s of all records in order, however they are sharded."""
        return self.manifest["fingerprint"]

    @property
    def bases(self) -> tuple[Samples, ...]:
        """The datasets whose shards hold the samples: itself, unless it is a view."""
        return (self,)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Sample:
        """One sample; CorruptRecord where its bytes cannot be read."""
        return self.read(index)[0]

    def read(self, index: SupportsIndex) -> tuple[Sample, bytes]:
        """One sample, and its record, of which the fingerprint is made; CorruptRecord as above."""
        number = index.__index__()
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self._read(number)

    def _read(self, number: int) -> tuple[Sample, bytes]:
        try:
            record = self._records[number]
            return from_record(record), record
        except Exception as error:  # the reader, protobuf and JSON each have their own, and all mean the same here
            raise CorruptRecord(f"record {number} of {self.folder} cannot be read: {_one_line(error)}") from error

    def __repr__(self) -> str:
        return f"Samples({self.name!r}, {len(self)} samples, {self.fingerprint[:12]})"


class View(Samples):
    """Samples chosen from other datasets: their shards stay where they are, and only indices into them are kept."""

    def _open(self) -> None:
        self._bases = tuple(_open_base(self.folder, base) for base in self.manifest["bases"])
        try:
            with np.load(self.folder / INDICES, allow_pickle=False) as file:
                arrays = dict(file)
            self.base, self.number = arrays["base"], arrays["number"]
            self.meta: np.ndarray | None = arrays.get("meta")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.folder / INDICES} cannot be read: make the view again") from error
        lengths = np.array([len(base) for base in self._bases])
        whole = len(self.base) == len(self.number) == self.manifest["samples"] > 0
        whole &= self.base.dtype == self.number.dtype == np.int64 and (self.meta is None or len(self.meta) == len(self))
        if not whole or (self.base < 0).any() or (self.base >= len(lengths)).any() or (self.number < 0).any():
            raise UserError(f"{self.folder / INDICES} does not fit its {MANIFEST}: make the view again")
        if (self.number >= lengths[self.base]).any():
            raise UserError(f"{self.folder / INDICES} names samples that its bases lack: make the view again")
        if digest(self.folder / INDICES) != self.manifest.get(DIGEST):
            raise UserError(f"{self.folder / INDICES} was changed after its {MANIFEST}: make the view again")

    def __reduce__(self) -> tuple[Any, ...]:
        return open_samples, (self.folder,)  # not the arrays: a worker reads them itself

    @property
    def bases(self) -> tuple[Samples, ...]:
        """In the order in which `base` counts them; none is a view."""
        return self._bases

    def __len__(self) -> int:
        return len(self.base)

    def _read(self, number: int) -> tuple[Sample, bytes]:
        sample, record = self._bases[self.base[number]].read(self.number[number])
        added = json.loads(str(self.meta[number]) or "{}") if self.meta is not None else {}
        return with_meta(sample, record, added)


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def with_meta(sample: Sample, record: bytes, added: Mapping[str, str]) -> tuple[Sample, bytes]:
    """The sample with `added` joined to its `meta`, and its record."""
    if not added:
        return sample, record
    sample = replace(sample, meta=sample.meta | added)
    return sample, to_record(sample)


def _open_base(folder: Path, base: Any) -> Samples:
    """A view's base; UserError where it is gone, or no longer what the view was made of."""
    if not isinstance(base, dict) or not all(isinstance(base.get(key), str) for key in ("folder", "fingerprint")):
        raise UserError(f"{folder / MANIFEST} lists no usable bases: make the view again")
    place = (folder / base["folder"].replace("\0", "")).resolve()
    if not (place / MANIFEST).is_file():
        raise UserError(
            f"{folder} is a view of {place}, which is not there: put it back at that place, or make the view again"
        )
    manifest = _read_manifest(place)
    if "bases" in manifest or manifest["fingerprint"] != base["fingerprint"]:
        raise UserError(f"{folder} is a view of {place}, which holds other samples by now: make the view again")
    return Samples(place, manifest)


def record_name(samples: Samples, number: int) -> str:
    """What stands for the id of a record that cannot be read."""
    return f"{samples.name} record {number}"


def _one_line(error: Exception) -> str:
    return one_line(error, 200) or type(error).__name__


def open_samples(folder: str | Path) -> Samples:
    """Open what `write_samples` wrote. UserError: no prepared dataset there, a shard is missing, or another format."""
    manifest = _read_manifest(Path(folder))
    return (View if "bases" in manifest else Samples)(Path(folder), manifest)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """UserError as `open_samples`."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format"]
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no prepared dataset (no {MANIFEST}): run `data ingest` first") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: prepare the dataset again") from error
    if version != FORMAT:
        raise UserError(f"{folder} is in format {version}, this version reads {FORMAT}: prepare the dataset again")
    if lost := [key for key, kind in _KEYS.items() if not isinstance(manifest.get(key), kind)]:
        raise UserError(f"{folder / MANIFEST} is incomplete ({', '.join(lost)}): prepare the dataset again")
    info = manifest["info"]
    while isinstance(info, dict) and "derived_from" in info:
        info = info["derived_from"]
    if not isinstance(info, dict):
        raise UserError(f"{folder / MANIFEST} is damaged (info.derived_from): prepare the dataset again")
    if "bases" in manifest:
        if not isinstance(manifest["bases"], list):
            raise UserError(f"{folder / MANIFEST} lists no usable bases: make the view again")
        return manifest
    shards = manifest.get("shards")
    if not isinstance(shards, list):
        raise UserError(f"{folder / MANIFEST} is incomplete (shards): prepare the dataset again")
    if not shards or not all(_is_shard(shard) for shard in shards):
        raise UserError(f"{folder / MANIFEST} lists no usable shards: prepare the dataset again")
    for shard in shards:
        file = folder / shard["file"]
        if not file.is_file():
            raise UserError(f"{folder} lacks its shard {file.name}: copy it again or prepare the dataset again")
        if file.stat().st_size != shard["bytes"]:
            raise UserError(
                f"{file} has {file.stat().st_size:,} bytes, and its {MANIFEST} says {shard['bytes']:,}: "
                "copy it again or prepare the dataset again"
            )
    return manifest


def _is_shard(entry: Any) -> bool:
    """A file of this folder, how many samples it holds, and its size."""
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        return False
    if type(entry.get("samples")) is not int or type(entry.get("bytes")) is not int:
        return False
    return entry["samples"] > 0 and Path(entry["file"]).name == entry["file"] and "\0" not in entry["file"]
