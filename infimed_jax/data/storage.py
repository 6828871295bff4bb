"""Prepared datasets: Samples in ArrayRecord shards that TFDS reads too, written and read without TensorFlow.

A folder holds the shards, TFDS's own `dataset_info.json` and `features.json`, and `manifest.json`, which carries the
counts and the fingerprint. It appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from infimed_jax.data.sample import Sample, Turn
from infimed_jax.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1
"""Layout of a prepared dataset; another number in a manifest is refused."""
TFDS_SPLIT = "samples"
"""The one TFDS split; a sample's own split is its field."""
SHARD_SIZE = 4096
"""Samples a shard: about 200 MB at the usual 50 KB an image."""

_TEXT_FIELDS = ("id", "source", "split", "kind", "question", "answer")
_DESCRIPTION = (
    "Samples of images and text; `turns` and `meta` are JSON, `images` are encoded files as their source had them."
)


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
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"dataset name {name!r} must be lower-case letters, digits and underscores")
    if shard_size < 1:
        raise UserError(f"shard_size must be positive, not {shard_size}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already: remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        manifest = _write(part, samples, name, shard_size, info or {})
        part.chmod(0o755)  # mkdtemp's 0700 would keep colleagues out
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return manifest


def _write(part: Path, samples: Iterable[Sample], name: str, shard_size: int, info: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256()
    seen: set[str] = set()
    kinds: Counter[str] = Counter()
    origins: Counter[str] = Counter()
    shard_lengths: list[int] = []
    images = size = 0
    writer = None
    for sample in samples:
        check_sample(sample)
        if sample.id in seen:
            raise UserError(f"sample id {sample.id!r} occurs twice: ids must be unique in a dataset")
        seen.add(sample.id)
        if writer is None:
            shard_lengths.append(0)
            # group_size 1: each record is found and decompressed alone, as random access wants
            writer = ArrayRecordWriter(str(part / f"shard-{len(shard_lengths) - 1}"), "group_size:1")
        record = _to_record(sample)
        writer.write(record)
        digest.update(len(record).to_bytes(8, "little"))
        digest.update(record)
        kinds[sample.kind] += 1
        origins[f"{sample.source}/{sample.split}"] += 1
        images += len(sample.images)
        size += len(record)
        shard_lengths[-1] += 1
        if shard_lengths[-1] == shard_size:
            writer.close()
            writer = None
    if writer is not None:
        writer.close()
    if not shard_lengths:
        raise UserError(f"dataset {name}: no samples to write")
    template = tfds.core.ShardedFileTemplate(
        data_dir=part, dataset_name=name, split=TFDS_SPLIT, filetype_suffix="array_record"
    )
    files = [template.sharded_filepath(shard_index=i, num_shards=len(shard_lengths)) for i in range(len(shard_lengths))]
    for i, file in enumerate(files):
        os.rename(part / f"shard-{i}", file)
    _write_tfds_metadata(part, name, template, shard_lengths, size)
    manifest = {
        "format": FORMAT,
        "name": name,
        "samples": sum(shard_lengths),
        "images": images,
        "bytes": size,
        "kinds": dict(sorted(kinds.items())),
        "origins": dict(sorted(origins.items())),
        "shards": [{"file": Path(f).name, "samples": n} for f, n in zip(files, shard_lengths, strict=True)],
        "fingerprint": digest.hexdigest(),
        "info": info,
    }
    (part / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _write_tfds_metadata(
    part: Path, name: str, template: tfds.core.ShardedFileTemplate, lengths: list[int], size: int
) -> None:
    """What `tfds.builder_from_directory` wants. Images are bytes to it: decoding hostile files is ours, not TFDS's."""
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict(
        {field: text for field in (*_TEXT_FIELDS, "turns", "meta")}
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


def check_sample(sample: Sample) -> None:
    """UserError where a sample contradicts itself: no id or turns, an image index without an image, misplaced roles."""
    if not sample.id:
        raise UserError(f"a sample of source {sample.source!r} has no id")
    if not sample.turns:
        raise UserError(f"sample {sample.id}: no turns")
    for turn in sample.turns:
        if (turn.role == "document") != (sample.kind == "document"):
            raise UserError(f"sample {sample.id}: a {sample.kind} sample cannot have a turn of role {turn.role}")
        if turn.reasoning and turn.role != "assistant":
            raise UserError(f"sample {sample.id}: only assistant turns may have reasoning")
        for piece in turn.content:
            if not isinstance(piece, str) and not 0 <= piece < len(sample.images):
                raise UserError(f"sample {sample.id}: image index {piece}, but it has {len(sample.images)} images")


def _to_record(sample: Sample) -> bytes:
    values = {field: [getattr(sample, field)] for field in _TEXT_FIELDS}
    values["turns"] = [_json([dataclasses.asdict(turn) for turn in sample.turns])]
    values["meta"] = [_json(sample.meta)]
    values["options"] = list(sample.options)
    try:
        encoded = {key: [value.encode() for value in strings] for key, strings in values.items()}
    except UnicodeEncodeError as error:
        raise UserError(f"sample {sample.id!r} holds text that is not Unicode: {error.reason}") from error
    encoded["images"] = list(sample.images)
    features = {
        key: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=value)) for key, value in encoded.items()
    }
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
    return example.SerializeToString(deterministic=True)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _from_record(record: bytes) -> Sample:
    features = tf_example_pb2.Example.FromString(record).features.feature

    def one(key: str) -> str:
        (value,) = features[key].bytes_list.value
        return value.decode()

    turns = tuple(Turn(t["role"], tuple(t["content"]), t["reasoning"]) for t in json.loads(one("turns")))
    return Sample(
        **{field: one(field) for field in _TEXT_FIELDS},
        images=tuple(features["images"].bytes_list.value),
        turns=turns,
        options=tuple(option.decode() for option in features["options"].bytes_list.value),
        meta=json.loads(one("meta")),
    )


class Samples(Sequence[Sample]):
    """Random access to a prepared dataset; thread-safe, picklable, and a Grain data source. Opens shards when read."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        # the lengths in brackets spare opening every shard just to count
        self._records = ArrayRecordDataSource([f"{folder / s['file']}[0:{s['samples']}]" for s in manifest["shards"]])

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all records in order."""
        return self.manifest["fingerprint"]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Sample:
        """One sample; CorruptRecord where its bytes cannot be read."""
        number = index.__index__()
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        try:
            return _from_record(self._records[number])
        except Exception as error:  # the reader, protobuf and JSON each have their own, and all mean the same here
            raise CorruptRecord(f"record {number} of {self.folder} cannot be read: {_one_line(error)}") from error

    def __repr__(self) -> str:
        return f"Samples({self.name!r}, {len(self)} samples, {self.fingerprint[:12]})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def open_samples(folder: str | Path) -> Samples:
    """Open what `write_samples` wrote. UserError: no prepared dataset there, a shard is missing, or another format."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, shards = manifest["format"], manifest["shards"]
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no prepared dataset (no {MANIFEST}): run `data ingest` first") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: prepare the dataset again") from error
    if version != FORMAT:
        raise UserError(f"{folder} is in format {version}, this version reads {FORMAT}: prepare the dataset again")
    for shard in shards:
        if not (folder / shard["file"]).is_file():
            raise UserError(f"{folder} lacks its shard {shard['file']}: copy it again or prepare the dataset again")
    return Samples(folder, manifest)
