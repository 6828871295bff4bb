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
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from infimed_jax.data.records import JSON_FIELDS, TEXT_FIELDS, Tally, check_sample, from_record, to_record
from infimed_jax.data.sample import Sample
from infimed_jax.errors import UserError, one_line
from infimed_jax.files import whole_file, whole_folder, write_json

MANIFEST = "manifest.json"
INDICES = "indices.npz"
"""A view's `base` and `number`, i64[N] each, and `meta`, JSON by sample, where a step added to it."""
DIGEST = "indices_sha256"
"""Where a view's manifest holds the digest of its indices."""
FORMAT = 2
"""Layout of a prepared dataset; another number in a manifest is refused."""
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
    files_of = [{"file": Path(f).name, "samples": n} for f, n in zip(files, lengths.values(), strict=True)]
    manifest = summed | {"shards": files_of, "info": info or {}}
    write_json(folder / MANIFEST, manifest)
    for shard in shards:
        (folder / f"{shard}.json").unlink()
    return manifest


def sum_facts(folder: Path, shards: Sequence[str], name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The manifest of all shards but for where their samples lie, and the samples of each shard that has any.

    UserError: there are no samples, or an id occurs twice.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"dataset name {name!r} must be lower-case letters, digits and underscores")
    digest = hashlib.sha256()
    sums: dict[str, Counter[str]] = {"kinds": Counter(), "origins": Counter(), "counts": Counter()}
    hashed: list[np.ndarray] = []
    lengths: dict[str, int] = {}
    for shard in shards:
        facts = json.loads((folder / f"{shard}.json").read_text(encoding="utf-8"))
        digest.update(bytes.fromhex(facts["digests"]))
        sums["kinds"].update(facts["kinds"])
        sums["origins"].update(facts["origins"])
        sums["counts"].update({key: facts[key] for key in ("samples", "images", "bytes")})
        hashed.append(np.array([_short_hash(id) for id in facts["ids"]], np.uint64))
        if facts["samples"]:
            lengths[shard] = facts["samples"]
    if not lengths:
        raise UserError(f"dataset {name}: no samples to write")
    _refuse_repeated_ids(folder, shards, np.concatenate(hashed))
    summed = {
        "format": FORMAT,
        "name": name,
        **sums["counts"],
        "kinds": dict(sorted(sums["kinds"].items())),
        "origins": dict(sorted(sums["origins"].items())),
        "fingerprint": digest.hexdigest(),
    }
    return summed, lengths


def _refuse_repeated_ids(folder: Path, shards: Sequence[str], hashed: np.ndarray) -> None:
    """Hashes are compared (8 bytes an id, where a set of names would need a hundred), then the names of equal ones."""
    ordered = np.sort(hashed)
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not repeated:
        return
    seen: set[str] = set()
    for shard in shards:
        for id in json.loads((folder / f"{shard}.json").read_text(encoding="utf-8"))["ids"]:
            if _short_hash(id) not in repeated:
                continue
            if id in seen:
                raise UserError(f"sample id {id!r} occurs twice: ids must be unique in a dataset")
            seen.add(id)


def _short_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _write_tfds_metadata(
    part: Path, name: str, template: tfds.core.ShardedFileTemplate, lengths: list[int], size: int
) -> None:
    """What `tfds.builder_from_directory` wants. Images are bytes to it: decoding hostile files is ours, not TFDS's."""
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict(
        {field: text for field in (*TEXT_FIELDS, *JSON_FIELDS)}
        | {"options": tfds.features.Sequence(text), "images": tfds.features.Sequence(text)}
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
        if digest(arrays) != self.manifest.get(DIGEST):
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


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of a view's indices."""
    summed = hashlib.sha256()
    for name in sorted(arrays):
        summed.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode() + arrays[name].tobytes())
    return summed.hexdigest()


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
    place = (folder / base["folder"]).resolve()
    if not (place / MANIFEST).is_file():
        raise UserError(
            f"{folder} is a view of {place}, which is not there: put it back at that place, or make the view again"
        )
    opened = open_samples(place)
    if isinstance(opened, View) or opened.fingerprint != base["fingerprint"]:
        raise UserError(f"{folder} is a view of {place}, which holds other samples by now: make the view again")
    return opened


def record_name(samples: Samples, number: int) -> str:
    """What stands for the id of a record that cannot be read."""
    return f"{samples.name} record {number}"


def _one_line(error: Exception) -> str:
    return one_line(error, 200) or type(error).__name__


def open_samples(folder: str | Path) -> Samples:
    """Open what `write_samples` wrote. UserError: no prepared dataset there, a shard is missing, or another format."""
    folder = Path(folder)
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
    if isinstance(manifest.get("bases"), list):
        return View(folder, manifest)
    shards = manifest.get("shards")
    if not isinstance(shards, list):
        raise UserError(f"{folder / MANIFEST} is incomplete (shards): prepare the dataset again")
    if not shards or not all(_is_shard(shard) for shard in shards):
        raise UserError(f"{folder / MANIFEST} lists no usable shards: prepare the dataset again")
    for shard in shards:
        if not (folder / shard["file"]).is_file():
            raise UserError(f"{folder} lacks its shard {shard['file']}: copy it again or prepare the dataset again")
    return Samples(folder, manifest)


def _is_shard(entry: Any) -> bool:
    """A file of this folder, and how many samples it holds."""
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str) or type(entry.get("samples")) is not int:
        return False
    return entry["samples"] > 0 and Path(entry["file"]).name == entry["file"]
