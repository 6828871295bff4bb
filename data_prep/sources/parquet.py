"""Rows of Parquet files, a few at a time, as the readers of `files` give theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.archives import is_bomb
from data_prep.faults import DAMAGED_FILE, NOT_UNICODE, PARQUET_BOMB, Unusable
from data_prep.sources.source import Row
from infimed_jax.errors import UserError


def parquet_rows(file: Path, columns: Sequence[str], batch: int = 16) -> Iterator[Row | Unusable]:
    """The rows of one Parquet file; an image column gives `{"bytes": …, "path": …}` or bytes.

    UserError: a column is absent. A damaged file gives the rows before the damage, then an `Unusable`.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(file, pre_buffer=False) as table:
            names = table.schema_arrow.names
            if missing := [column for column in columns if column not in names]:
                raise UserError(f"{file} lacks {', '.join(missing)}: its columns are {', '.join(names)[:300]}")
            number, groups = 0, []
            for group in range(table.num_row_groups):
                if _is_bomb(table.metadata.row_group(group), columns):
                    rows = table.metadata.row_group(group).num_rows
                    yield Unusable(PARQUET_BOMB, f"{file.name} group {group + 1} of {rows:,} rows")
                else:
                    groups.append(group)
            for rows in table.iter_batches(batch_size=batch, row_groups=groups, columns=list(columns)):
                try:
                    made = rows.to_pylist()
                except UnicodeDecodeError:  # Arrow does not look whether its text is UTF-8
                    made = [_parquet_row(rows, at, f"{file.name} row {number + at}") for at in range(len(rows))]
                yield from made
                number += len(rows)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist: check the input folder and its layout") from error
    except (arrow.ArrowException, OSError):
        yield Unusable(DAMAGED_FILE, file.name)


def _is_bomb(group: Any, columns: Sequence[str]) -> bool:
    """By the sizes that the file's own directory gives for a group's columns: 7 KB may unpack to gigabytes."""
    read = [group.column(number) for number in range(group.num_columns)]
    read = [column for column in read if column.path_in_schema.partition(".")[0] in columns]
    return any(is_bomb(column.total_uncompressed_size, column.total_compressed_size) for column in read)


def _parquet_row(rows: Any, at: int, where: str) -> Row | Unusable:
    try:
        return rows.slice(at, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return Unusable(NOT_UNICODE, where)
