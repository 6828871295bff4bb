"""Rows of Parquet files, a few at a time, as the readers of `rows` give theirs.

A group of rows that cannot be read does not affect the others: one `Unusable` stands for its rows, which keep their
numbers. So a row's number is its place in the file, however the file is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.reading.archives import is_bomb
from data_prep.reading.faults import DAMAGED_FILE, NOT_UNICODE, PARQUET_BOMB, Unusable
from data_prep.reading.rows import WHOLE, Part, Row, check_state
from infimed_jax.errors import UserError

_BATCH = 16
"""Rows held at once: an image has megabytes."""
_BUFFER = 2**20
"""Bytes read at once; without a buffer Arrow reads a column of a whole group of rows, which may be the whole file."""


def parquet_rows(
    file: Path, columns: Sequence[str], part: Part = WHOLE, batch: int = _BATCH
) -> Iterator[Row | Unusable]:
    """The rows of one Parquet file; an image column gives `{"bytes": …, "path": …}` or bytes.

    UserError: a column is absent. A damaged group gives its rows before the damage, then an `Unusable` for the others.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    check_state(file, part)
    try:
        with parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER) as table:
            names = table.schema_arrow.names
            if missing := [column for column in columns if column not in names]:
                raise UserError(f"{file} lacks {', '.join(missing)}: its columns are {', '.join(names)[:300]}")
            begin = 0
            for group in range(table.num_row_groups):
                end = begin + table.metadata.row_group(group).num_rows
                first, stop = max(begin, part.first), end if part.stop is None else min(end, part.stop)
                if first < stop:
                    yield from _group_rows(table, group, columns, batch, file.name, begin, first, stop)
                begin = end
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist: check the input folder and its layout") from error
    except (arrow.ArrowException, OSError):
        yield Unusable(DAMAGED_FILE, file.name, 1 if part.stop is None else part.stop - part.first)
    check_state(file, part)


def _group_rows(
    table: Any, group: int, columns: Sequence[str], batch: int, name: str, begin: int, first: int, stop: int
) -> Iterator[Row | Unusable]:
    """Rows `first` to `stop` of the file, all of them in the group, which begins with row `begin`."""
    import pyarrow as arrow

    if _is_bomb(table.metadata.row_group(group), columns):
        yield _unusable(PARQUET_BOMB, name, first, stop)
        return
    at = begin
    try:
        for rows in table.iter_batches(batch_size=batch, row_groups=[group], columns=list(columns)):
            number, at = max(first, at), at + len(rows)
            if at <= first:
                continue
            taken = rows.slice(number - (at - len(rows)), stop - number)
            try:
                yield from _plain(taken).to_pylist()
            except UnicodeDecodeError:  # Arrow does not check that text is UTF-8
                yield from [_row(taken, k, f"{name} row {number + k}") for k in range(len(taken))]
            if at >= stop:
                return
    except (arrow.ArrowException, OSError):
        pass
    yield _unusable(DAMAGED_FILE, name, max(first, at), stop)  # also if the file promises more rows than it has


def _plain(rows: Any) -> Any:
    """The rows with short floats as the doubles that are written alike: 2.3 would otherwise be 2.299999952316284."""
    import pyarrow as arrow

    for number, field in enumerate(rows.schema):
        if field.type in (arrow.float16(), arrow.float32()):
            doubles = [float(str(value)) for value in rows.column(number).to_numpy(False)]  # NaN where there is none
            rows = rows.set_column(number, field.name, arrow.array(doubles, arrow.float64()))
    return rows


def _unusable(reason: str, name: str, first: int, stop: int) -> Unusable:
    return Unusable(reason, f"{name} rows {first} to {stop - 1}", stop - first)


def _is_bomb(group: Any, columns: Sequence[str]) -> bool:
    """Judged by the sizes that the file's own directory gives for a group's columns: 7 KB may unpack to gigabytes."""
    read = [group.column(number) for number in range(group.num_columns)]
    read = [column for column in read if column.path_in_schema.partition(".")[0] in columns]
    return any(is_bomb(column.total_uncompressed_size, column.total_compressed_size) for column in read)


def _row(rows: Any, at: int, where: str) -> Row | Unusable:
    try:
        return rows.slice(at, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return Unusable(NOT_UNICODE, where)


def group_sizes(file: Path) -> list[int] | None:
    """Rows of each group; None where the file is damaged, which its reader reports."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(file) as table:
            return [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    except (arrow.ArrowException, OSError):
        return None
