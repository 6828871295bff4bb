"""The paper's packed format: rows of samples as JSON, `{"data": [sample, …], "lengths": [tokens, …]}` each.

A file is JSON Lines, a row a line: a row of 24 images is megabytes, and a whole set as one value would have to be in
memory. Samples carry every field, images in Base64, so that reading gives back what was written.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.engine import HERE, Progress
from data_prep.steps import make_dataset, write_stream
from infimed_jax.data.packing import PackingIndex
from infimed_jax.data.sample import Sample, Turn
from infimed_jax.data.storage import Samples
from infimed_jax.errors import UserError

VERSION = 1
_LONGEST = 2**30
"""Bytes of a line; a longer one is no row of samples, and is not read into memory."""


def export_json(samples: Samples, index: PackingIndex, file: Path, on_progress: Progress | None = None) -> int:
    """Write a packed dataset's rows, and return their number. The file appears whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    with part.open("w", encoding="utf-8") as out:
        for row in range(index.rows):
            numbers, lengths = index.row(row)
            data = [_to_json(samples[int(number)]) for number in numbers]
            out.write(json.dumps({"data": data, "lengths": lengths.tolist()}, ensure_ascii=False) + "\n")
            if on_progress is not None:
                on_progress(row + 1, index.rows)
    part.replace(file)
    return index.rows


def import_json(file: Path, output: Path, name: str) -> dict[str, Any]:
    """Prepare the dataset `output` of such a file, and return its report.

    The rows are not kept: packing is an index that `data pack` makes in seconds. UserError names a broken line.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist: give a file of packed rows, as `data export-json` writes it")
    state = file.stat()
    recipe = {"version": VERSION, "file": str(file.resolve()), "size": state.st_size, "time": state.st_mtime_ns}
    return make_dataset(
        output,
        name=name,
        recipe=recipe,
        info={},
        work=_import_piece,
        pieces=[file],
        report=partial(_report, file),
        engine=HERE,
    )


def _import_piece(file: Path, folder: Path, name: str) -> dict[str, Any]:
    write_stream(folder, name, (sample for row in read_rows(file) for sample in row))
    return {}


def _report(file: Path, manifest: dict[str, Any], _: list[dict[str, Any]]) -> dict[str, Any]:
    return {"input": str(file), "samples": manifest["samples"], "fingerprint": manifest["fingerprint"]}


def read_rows(file: Path) -> Iterator[list[Sample]]:
    """The samples of each row. A file that is one JSON value with many samples is one row, as the paper has it."""
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(_LONGEST + 1):
            number += 1
            if len(line) > _LONGEST:
                raise UserError(f"{file}, line {number} is longer than {_LONGEST:,} bytes: write one row a line")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                data, lengths = row["data"], row["lengths"]
                if len(data) != len(lengths):
                    raise ValueError(f"{len(data)} samples, but {len(lengths)} lengths")
                yield [_from_json(value) for value in data]
            except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
                what = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{file}, line {number} is no packed row ({what}): export it again") from error


def _to_json(sample: Sample) -> dict[str, Any]:
    """The paper's keys, `image` and `text`, do not tell where images stand: `turns` does."""
    return vars(sample) | {
        "images": [base64.b64encode(image).decode("ascii") for image in sample.images],
        "turns": [vars(turn) for turn in sample.turns],
    }


def _from_json(value: dict[str, Any]) -> Sample:
    turns = tuple(Turn(turn["role"], tuple(turn["content"]), turn.get("reasoning", "")) for turn in value["turns"])
    images = tuple(base64.b64decode(image, validate=True) for image in value["images"])
    return Sample(**value | {"turns": turns, "images": images, "options": tuple(value.get("options", ()))})
