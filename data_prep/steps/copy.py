"""`copy`: a prepared dataset, such as a view, as one that stands alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from data_prep.engine import HERE, Engine
from data_prep.steps.step import MAX_BAD_RECORDS, Slice, Step, derived, make_dataset, slices, unreadable_report
from infimed_jax.data.storage import open_samples, write_shard
from infimed_jax.progress import Report


def copy_dataset(
    input: Path,
    output: Path,
    *,
    engine: Engine = HERE,
    max_bad_records: float = MAX_BAD_RECORDS,
    on_progress: Report | None = None,
) -> dict[str, Any]:
    """Write the samples of `input`, in order, to shards of `output`, and return the report `output.json`.

    The fingerprint is the same, so that training on the one resumes on the other, unless damaged records were left out.
    """
    samples = open_samples(input)
    step = Step(
        output,
        samples.name,
        {"step": "copy", "from": samples.fingerprint},
        _copy_slice,
        slices(samples),
        partial(_report, str(input)),
        derived(samples),
        [base.folder for base in samples.bases],
        len(samples),
        max_bad_records,
    )
    return make_dataset(step, engine, on_progress)


def _copy_slice(piece: Slice, folder: Path, name: str) -> dict[str, Any]:
    unreadable: list[str] = []
    write_shard(folder, name, piece.read(unreadable))
    return {"unreadable": unreadable}


def _report(input: str, _: dict[str, Any], facts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"input": input} | unreadable_report(facts)
