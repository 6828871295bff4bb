"""From a packing index to the stream of global batches, a pure function of (seed, step).

Each epoch shuffles the rows within their shape, cuts them into global batches, and shuffles the batches. To resume is
to start at another step; a checkpoint holds no reader state, and the number of processes and threads may change.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from infimed_jax import config as settings
from infimed_jax.data.batch import Batch, Segment, build_row, stack_rows, unmask
from infimed_jax.data.chat import Tokenizer, render
from infimed_jax.data.images import ImageCache, ImageError, visual_tokens
from infimed_jax.data.packing import PackingIndex, build_index
from infimed_jax.data.storage import UNREADABLE, CorruptRecord, Samples, record_name
from infimed_jax.errors import UserError
from infimed_jax.processes import process_prefix
from infimed_jax.sharding import local_rows, place_batch

EMPTY = -1
"""In a plan: a row of padding, where an epoch's last batch of a shape is not full."""
_PATIENCE = 1000
"""Records read before the share of bad ones is taken as it stands."""


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The batches of one epoch."""

    rows: np.ndarray
    """i64[steps, global batch]; rows of the index, or EMPTY."""
    buckets: np.ndarray
    """i8[steps]; the shape of each batch."""


def plan_epoch(row_bucket: np.ndarray, global_batch: int, seed: int, epoch: int) -> Plan:
    """Every row once, in batches of one shape; a pure function of its arguments, on any machine."""
    rows, buckets = [], []
    for bucket in np.unique(row_bucket):
        members = np.flatnonzero(row_bucket == bucket)
        members = members[_order(len(members), seed, epoch, int(bucket))]
        padded = np.pad(members, (0, -len(members) % global_batch), constant_values=EMPTY)
        rows.append(padded.reshape(-1, global_batch))
        buckets.append(np.full(len(rows[-1]), bucket, np.int8))
    order = _order(sum(map(len, rows)), seed, epoch, -1)
    return Plan(np.concatenate(rows)[order], np.concatenate(buckets)[order])


def _order(n: int, *key: int) -> np.ndarray:
    """A permutation of n numbers: they are sorted by a hash (SplitMix64) of key and number.

    NumPy's generators may change their streams between releases; a resumed run must not.
    """
    start = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        z = np.uint64(start) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


@dataclass(frozen=True)
class LoadedRow:
    batch: Batch
    """One row, without the B axis."""
    ids: tuple[str, ...]
    """Ids of the samples in it, in order."""
    bad: tuple[tuple[str, str], ...]
    """(id, reason) of each sample that was left out."""


class RowReader:
    """Reads, decodes and lays out one row of the index; called by many threads."""

    def __init__(self, samples: Samples, tokenizer: Tokenizer, index: PackingIndex, model: settings.Model) -> None:
        self.samples = samples
        self.tokenizer = tokenizer
        self.index = index
        self.model = model
        # Decoding is the loader's main cost, and VQA-RAD asks about each image ten times: with the cache an epoch of it
        # at 384 pixels took 9 s on two cores, without it 46.
        self._images = ImageCache()

    def __call__(self, row: int, bucket: int) -> LoadedRow:
        """Row `row`, or padding for EMPTY. What cannot be read is left out and reported: no other row moves."""
        context, images = self.index.buckets[bucket]
        segments: list[Segment] = []
        ids: list[str] = []
        bad: list[tuple[str, str]] = []
        pixels: dict[bytes, Any] = {}  # one array per image, so that a row's slots do not depend on the cache
        numbers, lengths = self.index.row(row) if row != EMPTY else ((), ())
        for number, length in zip(map(int, numbers), lengths, strict=True):
            name = record_name(self.samples, number)
            try:
                sample = self.samples[number]
                name = sample.id
                for data in sample.images:
                    if data not in pixels:
                        pixels[data] = self._images.prepare(data, self.model)
            except CorruptRecord:
                bad.append((name, UNREADABLE))
                continue
            except ImageError as error:
                bad.append((name, error.reason))
                continue
            places = visual_tokens(sample.images, self.model)
            segment = render(sample, self.tokenizer, places, [pixels[data] for data in sample.images])
            if len(segment) != length:
                raise UserError(
                    f"sample {name} has {len(segment)} tokens, its packing index says {length}: "
                    f"remove {index_folder(self.samples)}, and it is built again"
                )
            segments.append(segment)
            ids.append(name)
        batch = build_row(segments, context=context, images=images, model=self.model)
        return LoadedRow(batch, tuple(ids), tuple(bad))


def index_folder(samples: Samples) -> Path:
    """Where a dataset's packing indices are kept."""
    return samples.folder / "packing"


@dataclass(frozen=True)
class _Stream:
    """The rows of this process from `start_step` on, one after the other, as a Grain data source."""

    read: Callable[[int, int], LoadedRow]
    plan: Callable[[int], Plan]
    steps_per_epoch: int
    local: np.ndarray
    """Places in a global batch that this process loads."""
    start_step: int
    steps: int

    def __len__(self) -> int:
        return (self.steps - self.start_step) * len(self.local)

    def __getitem__(self, item: int) -> LoadedRow:
        step, place = divmod(int(item), len(self.local))
        epoch, step = divmod(self.start_step + step, self.steps_per_epoch)
        plan = self.plan(epoch)
        return self.read(int(plan.rows[step, self.local[place]]), int(plan.buckets[step]))


class Loader:
    """Iterates `(Batch, bad records, ids of this process's samples in it)` from `start_step` to `steps`.

    The batch is on the devices, and so are the bad records: i32[B], how many of each row were left out.
    """

    def __init__(
        self, config: settings.Config, reader: RowReader, mesh: jax.sharding.Mesh, start_step: int, steps: int | None
    ) -> None:
        self._config = config
        self._reader = reader
        self._mesh = mesh
        index, train = reader.index, config.train
        # Two epochs: reader threads run ahead into the next one.
        self._plan = functools.lru_cache(maxsize=2)(
            functools.partial(plan_epoch, index.row_bucket, train.global_batch, train.seed)
        )
        self.start_step = start_step
        self.steps_per_epoch = len(self._plan(0).buckets)
        self.steps: int = steps if steps is not None else train.steps or train.epochs * self.steps_per_epoch
        """Steps of the whole run, not of what is left."""
        self.shapes = index.buckets
        """(tokens, images) of every batch there may be."""
        self.fingerprint = hashlib.sha256(f"{index.fingerprint} {train.seed} {train.global_batch}".encode()).hexdigest()
        """Digest of the stream: a resume under another one would repeat and miss samples."""
        self._read = 0
        self._bad: dict[str, str] = {}

    def samples(self, step: int) -> int:
        """Samples planned for step `step` (from 0), over all processes, bad records included."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rows = self._plan(epoch).rows[place]
        offsets = self._reader.index.offsets
        rows = rows[rows != EMPTY]
        return int((offsets[rows + 1] - offsets[rows]).sum())

    def __iter__(self) -> Iterator[tuple[Batch, jax.Array, list[str]]]:
        config = self._config
        local = local_rows(config.train.global_batch, self._mesh)
        if self.start_step >= self.steps:
            return
        stream = _Stream(self._reader, self._plan, self.steps_per_epoch, local, self.start_step, self.steps)
        _mark_flags_as_parsed()
        options = grain.ReadOptions(
            num_threads=config.data.threads, prefetch_buffer_size=config.data.prefetch * len(local)
        )
        rows = iter(grain.MapDataset.source(stream).to_iter_dataset(options))
        for _ in range(self.start_step, self.steps):
            loaded = [next(rows) for _ in local]
            self._count(loaded)
            batch = stack_rows([row.batch for row in loaded])
            if not config.data.mask_segments:
                batch = unmask(batch)
            bad = np.array([len(row.bad) for row in loaded], np.int32)
            yield *place_batch((batch, bad), self._mesh), [name for row in loaded for name in row.ids]

    def last_rows(self) -> Iterator[Batch]:
        """Rows of the shape with most places for images, of the first epoch, the last one first; on every process."""
        plan, shapes = self._plan(0), self.shapes
        bucket = max(range(len(shapes)), key=lambda number: shapes[number][1])
        for step in reversed(range(self.steps_per_epoch)):
            for row in plan.rows[step][::-1] if plan.buckets[step] == bucket else ():
                if row != EMPTY:
                    yield self._reader(int(row), bucket).batch

    def _count(self, loaded: list[LoadedRow]) -> None:
        bad = [entry for row in loaded for entry in row.bad]
        for name, reason in bad:
            if name not in self._bad:
                log.warning("%sleft out: %s (%s)", process_prefix(), name, reason)
        self._read += sum(len(row.ids) for row in loaded) + len(bad)
        self._bad.update(bad)

    def check_bad_records(self, bad: int, read: int) -> None:
        """UserError where `bad` of `read` records pass the limit, early for data that is bad throughout.

        Both count the whole run so far over all processes, so that all of them stop at the same step.
        """
        limit = self._config.data.max_bad_records
        if bad > limit * max(read, min(_PATIENCE, len(self._reader.index.samples))):
            raise UserError(
                f"{bad} of {read} records read of {self._reader.samples.folder} were bad (each is named above as left "
                f"out, on the host that read it), more than data.max_bad_records={limit} allows: repair the dataset or "
                "raise the limit"
            )

    def report(self) -> dict[str, Any]:
        """What was packed, left out and read so far; bad records by id, for this process."""
        index = self._reader.index
        return {
            "rows": index.rows,
            "samples": len(index.samples),
            "shapes": [list(shape) for shape in index.buckets],
            "fill": round(index.fill, 4),
            "dropped": index.dropped_by_reason(),
            "records_read": self._read,
            "bad_records": dict(sorted(Counter(self._bad.values()).items())),
            "bad_record_ids": dict(sorted(self._bad.items())),
        }


def make_loader(
    config: settings.Config,
    *,
    samples: Samples,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    start_step: int = 0,
    steps: int | None = None,
) -> Loader:
    """Pack the samples of a dataset (or load their index), and return the stream from `start_step`.

    `steps` is the length of the whole run; None takes `train.steps`, or as many as `train.epochs` need. UserError: a
    vocabulary too small for it, or rows that do not split over the mesh.
    """
    if len(tokenizer) > config.model.vocab_size:
        raise UserError(
            f"the model's vocab_size={config.model.vocab_size} has no room for the {len(tokenizer)} tokens of "
            f"{tokenizer.folder}: raise it, or give the model's own tokenizer"
        )
    local_rows(config.train.global_batch, mesh)
    index = build_index(samples, tokenizer, config.data, config.model, index_folder(samples))
    return Loader(config, RowReader(samples, tokenizer, index, config.model), mesh, start_step, steps)


def _mark_flags_as_parsed() -> None:
    """Grain and ArrayRecord read absl flags, which a plain script never parses."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
