"""Cutting a long file of annotations into parts, so that workers share the images that it names.

One pass finds where rows begin. How many parts there are depends on the rows alone, so that a run that continues
elsewhere, with more workers or fewer, finds the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.reading.csv_rows import Table, csv_lines
from data_prep.reading.files import shard_name
from data_prep.reading.parquet import group_sizes
from data_prep.reading.rows import WHOLE, Entries, Lines, Part, is_list, json_lines, open_text, state_of

LEAST = 1024
"""Rows of a part: to start workers for fewer takes as long as their images."""
_MOST = 4096
"""Rows of a part: the samples of a shard, `storage.SHARD_SIZE`, whose module takes seconds to import."""
_PARTS = 32
"""Parts of a file, until each has `_MOST` rows."""
_PER_GROUP = 4
"""Parts of a Parquet file's group: none can be entered but at its beginning, and to pass over a row costs a tenth of
its use."""


def parts_of(files: Callable[[Path, str], list[Path]]) -> Callable[..., list[Part]]:
    """`Source.shards`: the parts of a split's files, whatever the options. UserError: a file is missing."""
    return partial(_split_parts, files)


def _split_parts(files: Callable[[Path, str], list[Path]], folder: Path, split: str, **options: Any) -> list[Part]:
    paths = files(folder, split)
    many = len(paths) > _PARTS  # enough to share, so that no text has to be read to cut it
    return [replace(part, file=shard_name(folder, path)) for path in paths for part in _file_parts(path, many)]


def _file_parts(file: Path, many: bool) -> list[Part]:
    """Parts by the kind of file; an archive is one, as is any text of `many`."""
    match file.suffix:
        case ".parquet":
            return _parquet_parts(file)
        case ".csv" if not many:
            return csv_parts(file, Table(()))
        case ".json" | ".jsonl" if not many:
            return json_parts(file)
    return [WHOLE]


def _parquet_parts(file: Path) -> list[Part]:
    state, groups = state_of(file), group_sizes(file)
    return even_parts(sum(groups), -(-max(groups, default=0) // _PER_GROUP), state) if groups is not None else [WHOLE]


def json_parts(file: Path) -> list[Part]:
    """Parts of a JSON list or of JSON lines. UserError as `json_rows`."""
    return _parts(file, Entries, iter) if is_list(file) else _parts(file, Lines, json_lines)


def csv_parts(file: Path, table: Table) -> list[Part]:
    """Parts of a table. UserError as `csv_rows`."""
    return _parts(file, Lines, partial(csv_lines, table=table))


def _parts(file: Path, reader: type[Lines] | type[Entries], rows: Callable[[Any], Iterator[object]]) -> list[Part]:
    """Parts by what the reader counts as it passes the `rows`: bytes and lines."""
    state = state_of(file)
    with open_text(file, newline="") as stream:
        if stream.encoding != "utf-8":  # places are counted in UTF-8
            return [WHOLE]
        read = reader(stream)
        marks, count = [(0, 0)], 0
        for count, _ in enumerate(rows(read), start=1):
            if count % LEAST == 0:
                marks.append((read.place, read.number))
    parts = [(part, *marks[part.first // LEAST]) for part in even_parts(count, state=state)]
    return [replace(part, start=start, line=line) for part, start, line in parts]


def even_parts(rows: int, least: int = 0, state: tuple[int, int] | None = None) -> list[Part]:
    """So many rows in parts of one size, of at least `least` rows."""
    step = max(min(-(-rows // (_PARTS * LEAST)), _MOST // LEAST), -(-least // LEAST), 1) * LEAST
    firsts = range(0, max(rows, 1), step)
    return [Part(first, stop, state=state) for first, stop in zip(firsts, [*firsts[1:], None], strict=True)]
