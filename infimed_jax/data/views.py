"""Views: datasets that choose samples of others. They hold a manifest and indices, and no image is copied."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infimed_jax.data.records import Tally, sum_facts
from infimed_jax.data.sample import Sample
from infimed_jax.data.storage import DIGEST, INDICES, MANIFEST, Samples, View, digest, with_meta
from infimed_jax.files import to_json, whole_file, write_json


class Choice(NamedTuple):
    """One chosen sample."""

    dataset: int
    """Which of the step's datasets."""
    number: int
    """Its place there."""
    sample: Sample
    record: bytes
    """Both as `Samples.read` gives them."""
    added: Mapping[str, str] = {}
    """What joins its `meta`."""


def write_choice(folder: Path, shard: str, chosen: Iterable[Choice]) -> int:
    """Write the indices of one piece of a view in the making, then its facts; return its samples."""
    tally = Tally()
    rows: list[tuple[int, int]] = []
    meta: list[str] = []
    for choice in chosen:
        sample, record = with_meta(choice.sample, choice.record, choice.added)
        tally.add(sample, record)
        rows.append((choice.dataset, choice.number))
        meta.append(to_json(dict(choice.added), ensure_ascii=False) if choice.added else "")
    dataset, number = np.array(rows, np.int64).reshape(-1, 2).T
    _save(folder / f"{shard}.npz", {"dataset": dataset, "number": number, "meta": np.array(meta, str)})
    write_json(folder / f"{shard}.json", tally.facts())
    return len(rows)


def join_view(
    folder: Path, shards: Sequence[str], datasets: Sequence[Samples], *, name: str, info: dict[str, Any]
) -> dict[str, Any]:
    """Make the pieces that `write_choice` wrote a view, and return its manifest. A view of a view points to its bases.

    UserError: there are no samples, or an id occurs twice. May be repeated after a kill.
    """
    summed, lengths = sum_facts(folder, shards, name)
    pieces = []
    for shard in lengths:
        with np.load(folder / f"{shard}.npz", allow_pickle=False) as arrays:
            pieces.append({key: arrays[key] for key in ("dataset", "number", "meta")})
    dataset, number, meta = (np.concatenate([piece[key] for piece in pieces]) for key in ("dataset", "number", "meta"))
    base = np.empty_like(dataset)
    bases: dict[Path, int] = {}
    opened: list[Samples] = []
    for k, samples in enumerate(datasets):
        for source in samples.bases:
            if bases.setdefault(source.folder.resolve(), len(bases)) == len(opened):
                opened.append(source)
        places = np.array([bases[source.folder.resolve()] for source in samples.bases])
        rows = np.flatnonzero(dataset == k)
        if not isinstance(samples, View):
            base[rows] = places[0]
            continue
        base[rows] = places[samples.base[number[rows]]]
        if samples.meta is not None:
            meta = _merged(meta, rows, samples.meta[number[rows]])
        number[rows] = samples.number[number[rows]]
    used, base = np.unique(base, return_inverse=True)
    arrays = {"base": base.astype(np.int64), "number": number}
    if (meta != "").any():
        arrays["meta"] = meta
    _save(folder / INDICES, arrays)
    here = folder.resolve()
    listed = [
        {"folder": os.path.relpath(opened[k].folder.resolve(), here), "fingerprint": opened[k].fingerprint}
        for k in used
    ]
    manifest = summed | {"bases": listed, DIGEST: digest(folder / INDICES), "info": info}
    write_json(folder / MANIFEST, manifest)
    return manifest


def _merged(meta: np.ndarray, rows: np.ndarray, before: np.ndarray) -> np.ndarray:
    """`meta` with what an earlier choice had added to `rows`; a key that was added twice has the later value."""
    values = meta.astype(object)
    for row, old in zip(rows, before, strict=True):
        if old:
            values[row] = to_json(json.loads(str(old)) | json.loads(values[row] or "{}"), ensure_ascii=False)
    return values.astype(str)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with whole_file(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)
