"""Mixing prepared datasets into one before packing: how much of each, shuffled, and a table of what came from where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.pipeline import prepared_by, replace_dataset
from data_prep.sources import SOURCES
from infimed_jax.data.sample import Sample
from infimed_jax.data.storage import CorruptRecord, Samples, open_samples
from infimed_jax.errors import UserError
from infimed_jax.files import write_json

VERSION = 1
"""Of the way in which samples are drawn and ordered."""


@dataclass(frozen=True)
class Part:
    """How much of one prepared dataset goes into the mixture."""

    folder: Path
    share: float = 1.0
    """Of its samples, drawn at random; more than all of them is a matter of epochs."""
    cap: int = 0
    """Samples at most; 0 is no bound."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"the share of {self.folder} must lie in (0, 1], not {self.share}")
        if self.cap < 0:
            raise UserError(f"the cap of {self.folder} must not be negative, not {self.cap}")

    def taken(self, samples: int) -> int:
        """How many of so many samples."""
        wanted = max(1, round(self.share * samples))
        return min(wanted, self.cap) if self.cap else wanted


def mix(parts: Sequence[Part], output: str | Path, seed: int) -> dict[str, Any]:
    """Write the mixture to `output` and return its report, which is also `output.json` beside it.

    A pure function of the datasets and the seed; a mixture that was made so before is left as it is. UserError: no
    parts, a part is no prepared dataset or has an unreadable record, or an id occurs twice.
    """
    if not parts:
        raise UserError("a mixture needs at least one part")
    output = Path(output)
    datasets = [open_samples(part.folder) for part in parts]
    chosen = [_draw(part, len(dataset), seed, k) for k, (part, dataset) in enumerate(zip(parts, datasets, strict=True))]
    rows = [_row(part, dataset, len(numbers)) for part, dataset, numbers in zip(parts, datasets, chosen, strict=True)]
    recipe = {
        "version": VERSION,
        "seed": seed,
        "parts": [{key: row[key] for key in ("fingerprint", "share", "cap")} for row in rows],
    }
    report_file = output.with_name(f"{output.name}.json")
    report = {"seed": seed, "samples": sum(map(len, chosen)), "licences": _licences(rows), "parts": rows}
    if not prepared_by(output, recipe):
        order = [(k, int(i)) for k, numbers in enumerate(chosen) for i in numbers]
        order = [order[i] for i in np.random.default_rng([seed, len(parts)]).permutation(len(order))]
        replace_dataset(output, _read(datasets, order), "mixture", recipe | {"licences": report["licences"]})
    write_json(report_file, report)
    return report


def _draw(part: Part, samples: int, seed: int, number: int) -> np.ndarray:
    """Numbers of the samples taken from a part; a larger share keeps those of a smaller one."""
    return np.random.default_rng([seed, number]).permutation(samples)[: part.taken(samples)]


def _read(datasets: Sequence[Samples], order: Sequence[tuple[int, int]]) -> Iterator[Sample]:
    for part, number in order:
        try:
            yield datasets[part][number]
        except CorruptRecord as error:
            raise UserError(f"{error}: prepare that dataset again") from error


def _row(part: Part, dataset: Samples, taken: int) -> dict[str, Any]:
    return {
        "folder": str(part.folder),
        "origins": dataset.manifest["origins"],
        "fingerprint": dataset.fingerprint,
        "samples": len(dataset),
        "share": part.share,
        "cap": part.cap,
        "taken": taken,
    }


def _licences(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Of every source in the mixture, by name."""
    names = sorted({origin.partition("/")[0] for row in rows for origin in row["origins"]})
    return {name: SOURCES[name].licence if name in SOURCES else "unknown" for name in names}
