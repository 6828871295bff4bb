"""Cutting a long file of annotations into parts, so that workers share the images that it names.

One pass finds where rows begin: of JSON without parsing it, by brackets and quotes or by lines. How many parts there
are depends on the rows alone, so that a run that goes on elsewhere, with more workers or fewer, finds the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.sources.rows import (
    MAX_RECORD,
    WHOLE,
    Lines,
    Part,
    Table,
    csv_lines,
    elements,
    is_list,
    json_lines,
    open_text,
    state_of,
)

LEAST = 1024
"""Rows of a part: to start workers for fewer takes as long as their images."""
_MOST = 4096
"""Rows of a part: the samples of a shard, `storage.SHARD_SIZE`, whose module takes seconds to import."""
_PARTS = 32
"""Of a file, until they have as many rows."""


def json_parts(file: Path) -> list[Part]:
    """Of a JSON list or JSON lines. UserError as `json_rows`."""
    state = state_of(file)
    if not is_list(file):
        return _line_parts(file, None)
    with open_text(file) as stream:
        if stream.encoding != "utf-8":
            return [WHOLE]
    ends = ((place, number) for number, (_, place) in enumerate(elements(file, MAX_RECORD), start=1))
    return _parts(ends, state)


def csv_parts(file: Path, table: Table) -> list[Part]:
    """Of a table. UserError as `csv_rows`."""
    return _line_parts(file, table)


def _line_parts(file: Path, table: Table | None) -> list[Part]:
    state = state_of(file)
    with open_text(file, newline="") as stream:
        if stream.encoding != "utf-8":  # a place in it is no place in UTF-8
            return [WHOLE]
        lines = Lines(stream, MAX_RECORD, "")
        rows = json_lines(lines) if table is None else csv_lines(lines, table)
        return _parts(((lines.place, lines.number) for _ in rows), state)


def _parts(ends: Iterator[tuple[int, int]], state: tuple[int, int] | None = None) -> list[Part]:
    """By where each row ends: the byte of the next one, and the lines before that. `state` is that of the file."""
    marks, rows = [(0, 0)], 0
    for end in ends:
        rows += 1
        if rows % LEAST == 0:
            marks.append(end)
    made = [(part, marks[part.first // LEAST]) for part in even_parts(rows, state=state)]
    return [replace(part, start=start, line=line) for part, (start, line) in made]


def even_parts(rows: int, least: int = 0, **facts: Any) -> list[Part]:
    """So many rows in parts of one size, of at least `least` rows; `facts` are every part's."""
    step = max(min(-(-rows // (_PARTS * LEAST)), _MOST // LEAST), -(-least // LEAST), 1) * LEAST
    firsts = range(0, max(rows, 1), step)
    return [Part(first, stop, **facts) for first, stop in zip(firsts, [*firsts[1:], None], strict=True)]
