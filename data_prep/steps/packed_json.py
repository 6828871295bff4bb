"""The paper's packed format: rows of samples as JSON, `{"data": [sample, …], "lengths": [tokens, …]}` each.

Written as JSON Lines, a row a line; read from those, from a JSON list of rows, indented or not, a row at a time, and
from one row alone, as the paper has it. Samples carry every field, images in Base64, so that reading gives back what
was written.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from data_prep.engine import HERE, Engine
from data_prep.reading.faults import NOT_JSON, Unusable
from data_prep.reading.rows import json_rows, read_json
from data_prep.steps.step import MAX_BAD_RECORDS, Step, make_dataset, readable, refuse_damage, write_stream
from infimed_jax.data.packing import PackingIndex
from infimed_jax.data.records import LIST_FIELDS, TEXT_FIELDS, from_values
from infimed_jax.data.sample import Chat, Kind, Sample
from infimed_jax.data.storage import Samples
from infimed_jax.errors import UserError
from infimed_jax.files import open_whole, to_json
from infimed_jax.progress import Report

VERSION = 2
_LONGEST = 2**30
"""Characters of a row; a longer one is no row of samples, and is not kept in memory."""


def export_json(
    samples: Samples,
    index: PackingIndex,
    file: Path,
    on_progress: Report | None = None,
    max_bad_records: float = MAX_BAD_RECORDS,
) -> list[str]:
    """Write a packed dataset's rows; the file appears whole or not at all.

    Returns the names of records that were damaged after packing: their rows stand without them. UserError: more than a
    share of `max_bad_records` are.
    """
    unreadable: list[str] = []
    file.parent.mkdir(parents=True, exist_ok=True)
    with open_whole(file) as out:
        for row in range(index.rows):
            length_of = dict(zip(*(values.tolist() for values in index.row(row)), strict=True))
            found = list(readable(samples, length_of, unreadable))
            value = {"data": [_to_json(sample) for _, sample in found], "lengths": [length_of[n] for n, _ in found]}
            out.write(to_json(value, ensure_ascii=False) + "\n")
            if on_progress is not None:
                on_progress(row + 1, index.rows, "")
        refuse_damage(unreadable, len(index.samples), max_bad_records, "data.max_bad_records=")
    return unreadable


def import_json(
    files: Sequence[Path], output: Path, name: str, *, engine: Engine = HERE, on_progress: Report | None = None
) -> dict[str, Any]:
    """Prepare the dataset `output` of such files, and return its report. One file is one stream, in this process.

    The rows are not kept: packing is an index that `data pack` makes in seconds. UserError names a broken row.
    """
    states = []
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} does not exist: give a file of packed rows, as `data export-json` writes it")
        state = file.stat()
        states.append([str(file.resolve()), state.st_size, state.st_mtime_ns])
    alone = len(files) == 1
    return make_dataset(
        Step(
            output,
            name=name,
            recipe={"version": VERSION, "files": states},
            info={},
            work=partial(_import_piece, on_progress if alone else None),
            pieces=list(files),
            report=lambda *_: {"input": list(map(str, files))},
        ),
        HERE if alone else engine,
        None if alone else on_progress,
    )


def _import_piece(on_progress: Report | None, file: Path, folder: Path, name: str) -> dict[str, Any]:
    def samples() -> Iterator[Sample]:
        for number, row in enumerate(read_rows(file), start=1):
            yield from row
            if on_progress is not None:
                on_progress(number, 0, "")

    write_stream(folder, name, samples())
    return {}


def read_rows(file: Path) -> Iterator[list[Sample]]:
    """The samples of each row. UserError: one that is no packed row."""
    for number, row in enumerate(json_rows(file, limit=_LONGEST), start=1):
        if isinstance(row, Unusable) and row.reason == NOT_JSON and number == 1:
            yield _samples(read_json(file, dict), f"{file}")  # one row on many lines
            return
        if isinstance(row, Unusable):
            raise UserError(f"{file}: {row.detail} is no packed row ({row.reason}): export it again")
        yield _samples(row, f"{file}: row {number}")


def _samples(row: dict[str, Any], where: str) -> list[Sample]:
    try:
        data, lengths = row["data"], row["lengths"]
        if len(data) != len(lengths):
            raise ValueError(f"{len(data)} samples, but {len(lengths)} lengths")
        return [_from_json(value) for value in data]
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        if isinstance(
            error, KeyError
        ):  # as in rows of other programs, whose text does not say who speaks to which image
            fix = "give what `data export-json` writes; what other programs wrote enters by a source of `data ingest`"
            raise UserError(f"{where} is no packed row (no {error}): {fix}") from error
        raise UserError(f"{where} is no packed row ({error}): export it again") from error


def _to_json(sample: Sample) -> dict[str, Any]:
    """The paper's keys, `image` and `text`, do not tell where images stand: `turns` and `chunks` do."""
    values = {"kind": sample.kind} | vars(sample)
    values["images"] = [base64.b64encode(image).decode("ascii") for image in sample.images]
    return values | ({"turns": list(map(vars, sample.turns))} if isinstance(sample, Chat) else {})


def _from_json(value: dict[str, Any]) -> Sample:
    if value["kind"] not in get_args(Kind):
        raise TypeError(f"a kind that is none of {', '.join(get_args(Kind))}")
    contents = value.get("chunks", []) + [turn["content"] for turn in value.get("turns", [])]
    lists = [value["images"], *(value.get(field, []) for field in LIST_FIELDS), *contents]
    if not all(isinstance(part, list) for part in lists):
        raise TypeError("a value that must be a list is none")
    if not all(type(piece) in (str, int) for content in contents for piece in content):
        raise TypeError("content that is neither text nor the number of an image")
    sample = from_values(value | {"images": [base64.b64decode(image, validate=True) for image in value["images"]]})
    if unknown := value.keys() - vars(sample).keys() - {"kind"}:
        raise TypeError(f"unknown {', '.join(sorted(unknown))}")
    # Another type than the field's would be found by whoever reads it, long after.
    texts = [getattr(sample, field, "") for field in TEXT_FIELDS]
    texts += [text for field in LIST_FIELDS for text in getattr(sample, field, ())]
    texts += [*(text for pair in sample.meta.items() for text in pair)]
    texts += [text for turn in getattr(sample, "turns", ()) for text in (turn.role, turn.reasoning)]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a value that must be text is none")
    return sample
