"""Which samples share a row: First-Fit-Decreasing under two budgets, kept as an index beside the dataset.

No image or text is written again, so another context or number of visual tokens costs seconds. The rendered lengths,
the one slow part, are kept apart and depend on the dataset and the tokenizer alone.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infimed_jax import config
from infimed_jax.data.bins import first_fit_decreasing, least_bins, minimum_bin_slack
from infimed_jax.data.chat import RENDERING, Tokenizer, render
from infimed_jax.data.images import visual_tokens
from infimed_jax.data.prompts import as_turns
from infimed_jax.data.storage import UNREADABLE, CorruptRecord, Samples, record_name
from infimed_jax.errors import UserError
from infimed_jax.files import to_json, write_bytes
from infimed_jax.progress import Report

TOO_LONG = "too long"
TOO_MANY_IMAGES = "too many images"
NO_LOSS = "nothing to learn"

VERSION = 2
"""Version of the rows that the same settings give, and of the index's files."""
_REASONS = ("", UNREADABLE, NO_LOSS, TOO_LONG, TOO_MANY_IMAGES)
_SHAPE_STEPS = 8
"""Unpacked rows have a multiple of context/8 tokens: 512 of 4096, which kernels and loss chunks divide."""


@dataclass(frozen=True)
class PackingIndex:
    """R rows of N samples in all, each in one of at most four row shapes."""

    offsets: np.ndarray
    """i64[R+1]; row r holds the places offsets[r] to offsets[r+1]."""
    samples: np.ndarray
    """i64[N]; numbers in the dataset."""
    lengths: np.ndarray
    """i32[N]; tokens, visual ones included."""
    row_bucket: np.ndarray
    """i8[R]; index into `buckets`."""
    buckets: tuple[tuple[int, int], ...]
    """(tokens, images) of a row."""
    fingerprint: str
    """Digest of the dataset, the tokenizer and every setting that shapes the rows."""
    dropped: tuple[tuple[str, str], ...]
    """(sample id, reason) of each sample that is in no row."""
    fill_bound: float
    """What no packing of these samples into rows of the whole context can pass."""

    @property
    def rows(self) -> int:
        return len(self.row_bucket)

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold a token."""
        shapes = np.array([tokens for tokens, _ in self.buckets], np.int64)
        return float(self.lengths.sum(dtype=np.int64) / shapes[self.row_bucket].sum())

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(sample numbers, lengths) of one row."""
        places = slice(self.offsets[number], self.offsets[number + 1])
        return self.samples[places], self.lengths[places]

    def dropped_by_reason(self) -> dict[str, int]:
        return dict(Counter(reason for _, reason in self.dropped))


def row_shapes(lengths: np.ndarray, context: int, count: int) -> list[int]:
    """Ascending row lengths, at most `count`, that hold unpacked `lengths` with the least padding."""
    sizes = sorted({-(-context * k // _SHAPE_STEPS) for k in range(1, _SHAPE_STEPS + 1)})
    needed = np.bincount(np.searchsorted(sizes, lengths), minlength=len(sizes))
    used = [i for i in range(len(sizes)) if needed[i]]

    def tokens(chosen: tuple[int, ...]) -> int:
        return sum(int(needed[i]) * sizes[next(c for c in chosen if c >= i)] for i in used)

    largest = used[-1]
    choices = (
        (*smaller, largest) for k in range(min(count, len(used))) for smaller in itertools.combinations(used[:-1], k)
    )
    return [sizes[i] for i in min(choices, key=tokens)]


def build_index(
    samples: Samples,
    tokenizer: Tokenizer,
    data: config.Data,
    model: config.Model,
    folder: str | Path,
    on_progress: Report | None = None,
) -> PackingIndex:
    """The packing of a dataset under the given settings; loaded from `folder` where it was built before.

    `on_progress` follows the rendering. UserError: nothing is left to train on, or more records are
    unreadable than `data.max_bad_records` allows.
    """
    folder = Path(folder)
    settings = {
        "dataset": samples.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "rendering": RENDERING,
        "visual_tokens": config.to_dict(model) if model.sized else model.visual_tokens,
        "context": data.context,
        "images_per_row": data.images_per_row,
        "packing": data.packing,
        "version": VERSION,
        "buckets": data.buckets if data.packing == "none" else 1,
    }
    fingerprint = _fingerprint(settings)
    if (folder / f"{fingerprint[:16]}.json").is_file():
        return load_index(folder, fingerprint)
    index = _build(samples, _rendered(samples, tokenizer, model, folder, on_progress), data, model, fingerprint)
    _save(index, settings, folder)
    return index


def _build(
    samples: Samples, rendered: dict[str, np.ndarray], data: config.Data, model: config.Model, fingerprint: str
) -> PackingIndex:
    a_span = 1 if model.sized else model.visual_tokens
    lengths = rendered["text"].astype(np.int64) + rendered["spans"].astype(np.int64) * a_span
    images = rendered["images"].astype(np.int64)
    reason = rendered["status"].copy()
    unreadable = int((reason == _REASONS.index(UNREADABLE)).sum())
    if unreadable > data.max_bad_records * len(samples):
        raise UserError(
            f"{unreadable} of {len(samples)} records of {samples.folder} cannot be read, more than "
            f"data.max_bad_records={data.max_bad_records} allows: prepare the dataset again"
        )
    reason[(reason == 0) & (lengths > data.context)] = _REASONS.index(TOO_LONG)
    reason[(reason == 0) & (images > data.images_per_row)] = _REASONS.index(TOO_MANY_IMAGES)
    kept = np.flatnonzero(reason == 0)
    dropped = tuple((_name(samples, number), _REASONS[reason[number]]) for number in np.flatnonzero(reason).tolist())
    if not len(kept):
        counts = ", ".join(f"{n} {why}" for why, n in Counter(why for _, why in dropped).items())
        raise UserError(f"{samples.folder}: no sample fits a row ({counts}): raise data.context or data.images_per_row")
    if data.packing == "none":
        offsets, items = np.arange(len(kept) + 1, dtype=np.int64), np.arange(len(kept))
    else:
        pack = first_fit_decreasing if data.packing == "first_fit_decreasing" else minimum_bin_slack
        offsets, items = pack(lengths[kept], images[kept], data.context, data.images_per_row)
    placed = kept[items]
    row_tokens = np.add.reduceat(lengths[placed], offsets[:-1])
    row_images = np.add.reduceat(images[placed], offsets[:-1])
    shapes = row_shapes(row_tokens, data.context, data.buckets) if data.packing == "none" else [data.context]
    row_bucket = np.searchsorted(shapes, row_tokens)
    most = [int(row_images[row_bucket == b].max()) for b in range(len(shapes))]
    return PackingIndex(
        offsets=offsets,
        samples=placed,
        lengths=lengths[placed].astype(np.int32),
        row_bucket=row_bucket.astype(np.int8),
        buckets=tuple((size, _round_images(m, data.images_per_row)) for size, m in zip(shapes, most, strict=True)),
        fingerprint=fingerprint,
        dropped=dropped,
        fill_bound=int(lengths[kept].sum())
        / (data.context * least_bins(lengths[kept], images[kept], data.context, data.images_per_row)),
    )


def _round_images(most: int, budget: int) -> int:
    """Above four, a multiple of four: datasets of one kind then share a compiled step."""
    return min(-(-most // 4) * 4, budget) if most > 4 else most


def _name(samples: Samples, number: int) -> str:
    try:
        return samples[number].id
    except CorruptRecord:
        return record_name(samples, number)


def _rendered(
    samples: Samples, tokenizer: Tokenizer, model: config.Model, folder: Path, on_progress: Report | None
) -> dict[str, np.ndarray]:
    """Per sample: text tokens, image spans, distinct images, status; kept in `folder`, one rendering of everything.

    In place of the spans, their visual tokens where these depend on an image's size.
    """
    key = {"dataset": samples.fingerprint, "tokenizer": tokenizer.fingerprint, "rendering": RENDERING}
    key |= {"model": config.to_dict(model)} if model.sized else {}
    file = folder / f"lengths-{_fingerprint(key)[:16]}.npz"
    if file.is_file():
        return _read_arrays(file)
    table = np.zeros((len(samples), 4), np.int32)
    for number in range(len(samples)):
        if on_progress is not None:
            on_progress(number, len(samples), "")
        try:
            sample = samples[number]
        except CorruptRecord:
            table[number, 3] = _REASONS.index(UNREADABLE)
            continue
        segment = render(sample, tokenizer, visual_tokens(sample.images, model) if model.sized else 1)
        spans = int(segment.visual.sum())
        images = len({piece for turn in as_turns(sample) for piece in turn.content if not isinstance(piece, str)})
        status = 0 if segment.targets.any() else _REASONS.index(NO_LOSS)
        table[number] = len(segment) - spans, spans, images, status
    arrays = dict(zip(("text", "spans", "images", "status"), table.T.copy(), strict=True))
    _write_arrays(file, arrays)
    return arrays


def load_index(folder: str | Path, fingerprint: str) -> PackingIndex:
    """Read the index with this fingerprint; UserError where its files are damaged."""
    file = Path(folder) / f"{fingerprint[:16]}.json"
    try:
        text = json.loads(file.read_text(encoding="utf-8"))
        arrays = _read_arrays(file.with_suffix(".npz"))
        if text["fingerprint"] != fingerprint:
            raise ValueError("another fingerprint")
        return PackingIndex(
            **{key: arrays[key] for key in ("offsets", "samples", "lengths", "row_bucket")},
            buckets=tuple((tokens, images) for tokens, images in text["buckets"]),
            fingerprint=fingerprint,
            dropped=tuple((name, reason) for name, reason in text["dropped"]),
            fill_bound=text["fill_bound"],
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"packing index {file} is damaged: remove it, and it is built again") from error


def _save(index: PackingIndex, settings: dict[str, Any], folder: Path) -> None:
    file = folder / f"{index.fingerprint[:16]}.json"
    keys = ("offsets", "samples", "lengths", "row_bucket")
    _write_arrays(file.with_suffix(".npz"), {key: getattr(index, key) for key in keys})
    text = {
        "fingerprint": index.fingerprint,
        "settings": settings,
        "buckets": index.buckets,
        "rows": index.rows,
        "samples": len(index.samples),
        "tokens": int(index.lengths.sum(dtype=np.int64)),
        "fill": round(index.fill, 4),
        "fill_bound": index.fill_bound,
        "dropped_by_reason": index.dropped_by_reason(),
        "dropped": index.dropped,
    }
    _replace(file, to_json(text, indent=1, ensure_ascii=False).encode())  # last: its presence says that all is there


def _fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.sha256(to_json(settings, sort_keys=True).encode()).hexdigest()


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _write_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    _replace(file, buffer.getvalue())


def _replace(file: Path, content: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, content)
    except OSError as error:
        raise UserError(f"cannot write the packing index {file}: {error.strerror or error}") from error
