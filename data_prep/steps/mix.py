"""Mixing prepared datasets into one before packing: how much of each, shuffled, and a table of what came from where."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_prep.engine import HERE, Engine
from data_prep.sources import SOURCES
from data_prep.steps.step import (
    MAX_BAD_RECORDS,
    Step,
    make_dataset,
    read_whole,
    unreadable_report,
)
from infimed_jax.data.storage import MANIFEST, SHARD_SIZE, Samples, open_samples
from infimed_jax.data.training import held_out, licences, open_for_training
from infimed_jax.data.views import Choice, write_choice
from infimed_jax.errors import UserError
from infimed_jax.progress import Report

VERSION = 3
"""Version of the way in which samples are drawn and ordered, and of the report."""


@dataclass(frozen=True)
class Part:
    """How much of one prepared dataset goes into the mixture."""

    folder: Path
    share: float = 1.0
    """Share of its samples, drawn at random; more than all of them is a matter of epochs."""
    cap: int = 0
    """Samples at most; 0 is no bound."""
    group: str = ""
    """What the mixture's balance calls it: `general`, `medical`."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"the share of {self.folder} must lie in (0, 1], not {self.share}")
        if self.cap < 0:
            raise UserError(f"the cap of {self.folder} must not be negative, not {self.cap}")

    def taken(self, samples: int) -> int:
        """How many of so many samples."""
        wanted = max(1, round(self.share * samples))
        return min(wanted, self.cap) if self.cap else wanted


@dataclass(frozen=True)
class Mixture:
    """A stage's mixture, as its YAML file has it."""

    parts: tuple[Part, ...]
    balance: Mapping[str, float] = field(default_factory=dict)
    """Weight of each group; where there is one too many of a group's samples, all its parts shrink alike."""


def load_mixture(file: Path, data: Path, skip_missing: bool = False) -> tuple[Mixture, list[str]]:
    """A mixture file with `data` before its datasets' names; and the names that were skipped since they are missing.

    UserError: not YAML, an unknown or missing key, a value of another type, or a dataset that is not there.
    """
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the mixture {file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the mixture {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict) or not isinstance(value.get("parts"), list) or set(value) - {"parts", "balance"}:
        raise UserError(f"the mixture {file} must hold `parts`, a list, and may hold `balance`, nothing else")
    balance = value.get("balance") or {}
    if not isinstance(balance, dict) or not all(_is_number(weight) and weight > 0 for weight in balance.values()):
        raise UserError(f"the mixture {file}: `balance` gives each group a weight above 0")
    parts, missing = [], []
    for entry in value["parts"]:
        part = _part(file, entry, data)
        there = (part.folder / MANIFEST).is_file()
        (parts if there or not skip_missing else missing).append(part)
    return Mixture(tuple(parts), balance), [str(part.folder) for part in missing]


_TYPES = {"dataset": str, "share": float, "cap": int, "group": str}


def _part(file: Path, entry: Any, data: Path) -> Part:
    if not isinstance(entry, dict) or not isinstance(entry.get("dataset"), str):
        raise UserError(f"the mixture {file}: each part names its `dataset`, not {entry!r}")
    for key, value in entry.items():
        if key not in _TYPES:
            raise UserError(f"the mixture {file}: unknown key {key!r} of {entry['dataset']}: {', '.join(_TYPES)}")
        if not (_is_number(value) if _TYPES[key] is float else type(value) is _TYPES[key]):
            raise UserError(f"the mixture {file}: {key} of {entry['dataset']} cannot be {value!r}")
    return Part(data / entry["dataset"], **{key: value for key, value in entry.items() if key != "dataset"})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def mix(
    parts: Sequence[Part],
    output: str | Path,
    seed: int,
    *,
    balance: Mapping[str, float] | None = None,
    engine: Engine = HERE,
    max_bad_records: float = MAX_BAD_RECORDS,
    on_progress: Report | None = None,
) -> dict[str, Any]:
    """Write the mixture, a view, to `output` and return its report, which is also `output.json` beside it.

    A pure function of the datasets and the seed; a mixture that was made so before is left as it is. Damaged records
    are left out by name, and nothing is drawn in their place. The log warns of a
    test or validation split among the parts, and the report names it. UserError: no parts, a part is no
    prepared dataset or may not be trained on, or an id occurs twice.
    """
    if not parts:
        raise UserError("a mixture needs at least one part")
    if seed < 0:
        raise UserError(f"the seed must not be negative, not {seed}")
    datasets = [open_for_training(part.folder) for part in parts]
    counts = _balanced(
        parts, [part.taken(len(dataset)) for part, dataset in zip(parts, datasets, strict=True)], balance
    )
    rows = [_row(part, dataset, count) for part, dataset, count in zip(parts, datasets, counts, strict=True)]
    recipe = {
        "version": VERSION,
        "seed": seed,
        "parts": [{key: row[key] for key in ("fingerprint", "taken")} for row in rows],
    }
    given = _licences(rows)
    order = _order(datasets, counts, seed)
    known = {"seed": seed, "balance": dict(balance or {}), "licences": given, "parts": rows}
    return make_dataset(
        Step(
            Path(output),
            name="mixture",
            recipe=recipe,
            info={"licences": given},
            view_of=datasets,
            work=partial(_choose_slice, [part.folder for part in parts]),
            pieces=[order[start : start + SHARD_SIZE] for start in range(0, len(order), SHARD_SIZE)],
            report=lambda manifest, facts: (
                {key: manifest[key] for key in ("images", "origins")} | known | unreadable_report(facts)
            ),
            records=len(order),
            max_bad_records=max_bad_records,
            inputs=[part.folder for part in parts],
        ),
        engine,
        on_progress,
    )


def _balanced(parts: Sequence[Part], counts: list[int], balance: Mapping[str, float] | None) -> list[int]:
    """Counts that hold the weights of the groups: the group that is scarcest for its weight stays whole."""
    if not balance:
        return counts
    totals: dict[str, int] = defaultdict(int)
    for part, count in zip(parts, counts, strict=True):
        if part.group not in balance:
            raise UserError(f"{part.folder} is of group {part.group!r}, which the balance gives no weight")
        totals[part.group] += count
    for group in balance:
        if group not in totals:
            raise UserError(f"the balance gives {group!r} a weight, but no part is of that group")
    scale = min(totals[group] / weight for group, weight in balance.items())
    return [
        max(1, round(count * scale * balance[part.group] / totals[part.group]))
        for part, count in zip(parts, counts, strict=True)
    ]


def _order(datasets: Sequence[Samples], counts: Sequence[int], seed: int) -> np.ndarray:
    """i64[N, 2]: (part, number) of each sample of the mixture."""
    chosen = [
        _draw(count, len(dataset), seed, k) for k, (count, dataset) in enumerate(zip(counts, datasets, strict=True))
    ]
    order = np.concatenate([np.stack([np.full(len(n), k), n], axis=1) for k, n in enumerate(chosen)])
    return order[np.random.default_rng([seed, len(datasets)]).permutation(len(order))]


def _draw(count: int, samples: int, seed: int, number: int) -> np.ndarray:
    """Numbers of the samples taken from a part; a larger count keeps those of a smaller one."""
    return np.random.default_rng([seed, number]).permutation(samples)[:count]


def _choose_slice(folders: Sequence[Path], order: np.ndarray, folder: Path, name: str) -> dict[str, Any]:
    datasets = [open_samples(part) for part in folders]
    unreadable: list[str] = []
    chosen = (
        Choice(part, *found)
        for part, number in order.tolist()
        for found in read_whole(datasets[part], [number], unreadable)
    )
    write_choice(folder, name, chosen)
    return {"unreadable": unreadable}


def _row(part: Part, dataset: Samples, taken: int) -> dict[str, Any]:
    return {
        "folder": str(part.folder),
        "origins": dataset.manifest["origins"],
        "held_out": held_out(dataset.manifest["origins"]),
        "fingerprint": dataset.fingerprint,
        "group": part.group,
        "samples": len(dataset),
        "share": part.share,
        "cap": part.cap,
        "taken": taken,
    }


def _licences(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Licence of every source in the mixture: as its manifest states it, otherwise as the source's adapter does."""
    stated: dict[str, str] = {}
    for row in rows:
        stated |= licences(Path(row["folder"]))
    names = sorted({origin.partition("/")[0] for row in rows for origin in row["origins"]})
    known = {name: SOURCES[name].licence for name in names if name in SOURCES}
    return {name: stated.get(name) or known.get(name, "unknown") for name in names}
