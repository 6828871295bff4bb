"""Rows of CSV files as text by column, as the readers of `rows` give theirs."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.reading.faults import COLUMNS, NOT_UNICODE, OPEN_QUOTE, Unusable
from data_prep.reading.rows import WHOLE, Lines, Part, Row, open_text
from infimed_jax.errors import UserError


@dataclass(frozen=True)
class Table:
    """How a CSV file is written, and which of its columns are read; without a header, they are its columns."""

    columns: tuple[str, ...]
    delimiter: str = ","
    header: bool = True
    quoted: bool = True


def csv_rows(file: Path, table: Table, part: Part = WHOLE) -> Iterator[Row | Unusable]:
    """Rows as text by column. UserError: the file is missing, or its header lacks one of the columns."""
    names = _header(file, table) if table.header else list(table.columns)
    with open_text(file, newline="", start=part.start) as stream:
        lines = Lines(stream, f"{file.name} line ", part.line)
        for row in part.of(file, csv_lines(lines, table, part.start > 0)):
            yield row if isinstance(row, Unusable) else _named(names, row, f"{lines.where}{lines.number}")


def csv_lines(lines: Lines, table: Table, inside: bool = False) -> Iterator[list[str] | Unusable]:
    """Cells of each row that is not blank; `inside`: the lines do not begin with the file's first."""
    reader = _reader(lines, table)
    if table.header and not inside:
        next(reader, None)
    while True:
        first = lines.number + 1
        try:
            row = next(reader)
            open_quote = lines.ended  # it asked for more than there is
        except StopIteration:
            return
        except Unusable as fault:
            yield fault
            continue
        except csv.Error:  # the field has grown past its limit
            open_quote = True
        if open_quote:
            yield Unusable(OPEN_QUOTE, f"{lines.where.removesuffix(' ')}s {first} to {lines.number}")
        elif row:
            yield row


def _reader(lines: Lines, table: Table) -> Iterator[list[str]]:
    csv.field_size_limit(lines.limit)
    quoting = csv.QUOTE_MINIMAL if table.quoted else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=table.delimiter, quoting=quoting)


def _header(file: Path, table: Table) -> list[str]:
    """The names of the columns. UserError; it shows no cells if none is a known name: they may be a sample's text."""
    needed = f"it needs a header with the columns {', '.join(table.columns)}"
    with open_text(file, newline="") as stream:
        try:
            row = next(_reader(Lines(stream, f"{file.name} line "), table), [])
        except (Unusable, csv.Error) as error:
            raise UserError(f"{file} has no header: {needed}") from error
    names = [name.strip() for name in row]
    missing = [column for column in table.columns if column not in names]
    if len(missing) == len(table.columns):
        raise UserError(f"{file} seems to have no header: {needed}")
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}: its columns are {', '.join(names)[:300]}")
    return names


def _named(names: list[str], row: list[str], where: str) -> Row | Unusable:
    if len(row) != len(names):
        return Unusable(COLUMNS, where)
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return Unusable(NOT_UNICODE, where)
    return dict(zip(names, row, strict=True))
