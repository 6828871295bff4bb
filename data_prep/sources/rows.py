"""Rows of annotations that may be huge, broken or hostile: they stream, and a bad one stands in its place.

Row readers yield dictionaries, and an `Unusable` where a row cannot be read: too large, broken, or not UTF-8. Memory
is bounded by one row. Text is UTF-8 (a byte-order mark is passed over) or UTF-16 with its mark; another encoding
shows as rows that are not UTF-8, each counted and named.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.reading.faults import (
    COLUMNS,
    NOT_AN_OBJECT,
    NOT_JSON,
    NOT_UNICODE,
    OPEN_QUOTE,
    RECORD_TOO_LARGE,
    Unusable,
)
from data_prep.sources.files import NoFiles
from data_prep.sources.source import Row
from infimed_jax.errors import UserError
from infimed_jax.files import to_json

MAX_RECORD = 2**26
"""Characters of one row, bytes of a JSON list's: 64 million. A conversation has thousands."""
_MAX_WHOLE = 2**29
"""Bytes of a file that is read at once, which takes three times as many: 512 MiB, thrice the largest published one."""
_CHUNK = 2**20
_LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*("?)|[{}\[\],]', re.DOTALL)
"""A whole string, or as much of it as there is, or a mark of structure."""
_INSIDE = re.compile(rb'(?:[^"{}\[\]]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
"""What an element holds up to its next bracket, or up to a string that is cut: passed over at once."""
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_FLAT = _INNER = rb'(?:[^"{}\[\]]++|' + _STRING + rb")*+"
for _ in range(4):
    _INNER = _FLAT + rb"(?:[{\[]" + _INNER + rb"[}\]]" + _FLAT + rb")*+"
_NEST = re.compile(_INNER + rb"[}\]]", re.DOTALL)
"""What follows an opening bracket up to its closing one, where no more than four lie in one another between them: at
once, as nearly all rows allow, in less than half of the time that bracket by bracket takes."""
_STRING_REST = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*("?)', re.DOTALL)


@dataclass(frozen=True)
class Part:
    """Some rows of a file of annotations, read without those before them; all of them where nothing else is said."""

    first: int = 0
    """Number of its first row, which ids go on from."""
    stop: int | None = None
    """Number of the first row behind it."""
    start: int = 0
    """Byte where the first row begins; 0 where that is the file's first, whatever stands before it."""
    line: int = 0
    """Lines before it; of a JSON list, rows."""
    state: tuple[int, int] | None = None
    """The file's when it was cut: in another file the bytes are not where its rows begin."""
    file: str = ""
    """Its path in the input folder, where a split has several."""

    def of(self, rows: Iterator[Row | Unusable]) -> Iterator[Row | Unusable]:
        """Its own of the rows from `start` on."""
        return rows if self.stop is None else itertools.islice(rows, self.stop - self.first)


WHOLE = Part()


def state_of(file: Path) -> tuple[int, int]:
    """Size, and time of the last change. UserError as `open_text`."""
    with _errors_name(file):
        found = file.stat()
    return found.st_size, found.st_mtime_ns


def check_state(file: Path, part: Part) -> None:
    """UserError: the file is no longer what it was when it was cut."""
    if part.state is not None and part.state != state_of(file):
        raise UserError(f"{file} has changed since its rows were counted: run this again when it is complete")


@contextmanager
def open_text(file: Path, newline: str | None = None, start: int = 0) -> Iterator[io.TextIOWrapper]:
    """The file as text, from byte `start` on; bytes that are no UTF-8 become lone surrogates.

    Its `buffer` stands where the text begins. UserError names the file and the mend.
    """
    with _errors_name(file), file.open("rb") as raw:
        head = raw.read(4)
        raw.seek(start or (len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0))
        utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if (b"\0" in head and not utf16) or head == codecs.BOM_UTF32_LE:
            raise UserError(f"{file} is not UTF-8 (zero bytes): convert it, as with iconv -f UTF-16LE -t UTF-8")
        encoding, errors = ("utf-16", "strict") if utf16 else ("utf-8", "surrogateescape")
        yield io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline=newline)


@contextmanager
def _errors_name(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NoFiles(f"{file} does not exist: check the input folder and its layout") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not valid {error.encoding}: convert it to UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def read_json(file: Path, kind: type = list) -> Any:
    """The file's JSON value, of type `kind`. UserError names the file where it is missing, broken, or another type."""
    with open_text(file) as stream:
        if os.fstat(stream.fileno()).st_size > _MAX_WHOLE:
            raise UserError(f"{file} is larger than {_MAX_WHOLE >> 20} MiB: it is no file of annotations")
        content = stream.read()
    try:
        value = json.loads(content)
        _check_unicode(content, value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): download it again") from error
    except Unusable as error:
        raise UserError(f"{file} is not UTF-8: convert it, or download it again") from error
    if not isinstance(value, kind):
        raise UserError(f"{file} must hold a JSON {kind.__name__}, not {type(value).__name__}")
    return value


def read_rows(file: Path) -> list[Row]:
    """A JSON list of objects, whole: for small annotations, where any fault is a UserError, as in `read_json`."""
    rows = read_json(file)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{file}: entry {number} is {type(row).__name__}, not an object")
    return rows


def json_rows(file: Path, limit: int | None = None, part: Part = WHOLE) -> Iterator[Row | Unusable]:
    """The objects of a JSON list, or of JSON lines, one at a time. UserError: the file is missing or no such thing."""
    limit = MAX_RECORD if limit is None else limit
    check_state(file, part)
    yield from part.of(_list_rows(file, limit, part) if is_list(file) else _line_rows(file, limit, part))
    check_state(file, part)


def is_list(file: Path) -> bool:
    """Whether the file's JSON is a list, not lines."""
    with open_text(file) as stream:
        head = stream.read(1)
        while head and head.isspace():
            head = stream.read(1)
    return head == "["


def _line_rows(file: Path, limit: int, part: Part) -> Iterator[Row | Unusable]:
    with open_text(file, newline="", start=part.start) as stream:
        lines = Lines(stream, limit, f"{file.name} line ", part.line)
        for line in json_lines(lines):
            yield line if isinstance(line, Unusable) else _object(line, f"{lines.where}{lines.number}")


def json_lines(lines: Lines) -> Iterator[str | Unusable]:
    """Those that are not blank."""
    while True:
        try:
            line = next(lines)
        except StopIteration:
            return
        except Unusable as fault:
            yield fault
            continue
        if not line.isspace():
            yield line


def _object(raw: str, where: str) -> Row | Unusable:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return Unusable(NOT_JSON, where)
    if not isinstance(value, dict):
        return Unusable(NOT_AN_OBJECT, where)
    try:
        _check_unicode(raw, value)
    except Unusable as fault:
        return Unusable(fault.reason, where)
    return value


def _check_unicode(raw: str, value: Any) -> None:
    """Raises Unusable where text holds lone surrogates, escaped or from bytes that are no UTF-8."""
    try:
        if not raw.isascii():
            raw.encode()
        if _LONE_SURROGATE.search(raw):
            to_json(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Unusable(NOT_UNICODE) from error


class Lines:
    """Lines of bounded length; an overlong one raises Unusable when its turn comes, and the next goes on after it."""

    def __init__(self, stream: io.TextIOWrapper, limit: int, where: str, number: int = 0) -> None:
        self.stream, self.limit, self.where = stream, limit, where
        self.number = number
        self.place = stream.buffer.tell()
        """Byte where the next line begins, in UTF-8."""
        self.ended = False

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        line = self._read(self.limit + 1)
        if not line:
            self.ended = True
            raise StopIteration
        self.number += 1
        if len(line) > self.limit and not line.endswith(("\n", "\r")):
            while (rest := self._read(_CHUNK)) and not rest.endswith(("\n", "\r")):
                pass
            raise Unusable(RECORD_TOO_LARGE, f"{self.where}{self.number}")
        return line

    def _read(self, size: int) -> str:
        line = self.stream.readline(size)
        self.place += len(line) if line.isascii() else len(line.encode(errors="surrogateescape"))
        return line


def _list_rows(file: Path, limit: int, part: Part) -> Iterator[Row | Unusable]:
    for number, (element, _) in enumerate(elements(file, limit, part.start), start=part.line + 1):
        where = f"{file.name} entry {number}"
        if element is None:
            yield Unusable(RECORD_TOO_LARGE, where)
        else:
            yield _object(element.decode(errors="surrogateescape"), where)


def elements(file: Path, limit: int, start: int = 0) -> Iterator[tuple[bytes | None, int]]:
    """What stands between a JSON list's commas, found by brackets and quotes alone, and the byte where the next begins.

    From `start` on, which is 0 or such a byte. None for what exceeds the limit: it is passed over without being kept.
    """
    pieces: list[bytes] = []
    place, size, depth = start, 0, 0
    entry = start
    quoted, opened = False, start > 0
    chunks = _utf8_chunks(file, start)
    for chunk in chunks:
        while (len(chunk) - len(chunk.rstrip(b"\\"))) % 2 and (more := next(chunks, b"")):
            chunk += more  # an escape is never cut in two
        begin = at = 0
        if not opened:
            begin = at = chunk.find(b"[") + 1
            opened = at > 0
            if not opened:
                place += len(chunk)
                continue
            entry = place + at
        elif quoted:
            match = _STRING_REST.match(chunk)
            at, quoted = match.end(), not match[1]
        while match := _TOKEN.search(chunk, _INSIDE.match(chunk, at).end() if depth else at):
            at, mark = match.end(), match[0]
            if mark[:1] == b'"':
                quoted = not match[1]
            elif mark in b"{[":
                if depth == 0 and (nest := _NEST.match(chunk, at)):
                    at = nest.end()
                else:
                    depth += 1
            elif depth and mark in b"}]":
                depth -= 1
            elif not depth and mark in b",]":
                size += match.start() - begin
                element = b"".join((*pieces, chunk[begin : match.start()])) if size <= limit else None
                if element is None or element.strip():
                    yield element, place + at
                pieces, size, begin, entry = [], 0, at, place + at
                if mark == b"]":
                    return
        size += len(chunk) - begin
        pieces = [*pieces, chunk[begin:]] if size <= limit else []
        place += len(chunk)
    raise UserError(
        f"{file} ends inside of its list: the entry that begins at byte {entry:,} never does, for it is cut or a quote "
        "in it is not escaped: mend it, or download the file again"
    )


def _utf8_chunks(file: Path, start: int) -> Iterator[bytes]:
    """The file's bytes from `start` on; of UTF-16, what they would be in UTF-8."""
    with open_text(file, start=start) as stream:
        if stream.encoding == "utf-16":
            while text := stream.read(_CHUNK):
                yield text.encode()
        elif start or stream.buffer.tell() == 0:
            while chunk := stream.buffer.read(_CHUNK):
                yield chunk
        else:
            yield codecs.BOM_UTF8  # passed over by the stream, yet bytes of the file
            while chunk := stream.buffer.read(_CHUNK):
                yield chunk


@dataclass(frozen=True)
class Table:
    """How a CSV file is written, and the columns that are read of it; without a header, they are its columns."""

    columns: tuple[str, ...]
    delimiter: str = ","
    header: bool = True
    quoted: bool = True


def csv_rows(file: Path, table: Table, part: Part = WHOLE) -> Iterator[Row | Unusable]:
    """The rows as text by column. UserError: the file is missing, or its header lacks one of the columns."""
    check_state(file, part)
    names = _header(file, table) if table.header else list(table.columns)
    with open_text(file, newline="", start=part.start) as stream:
        lines = Lines(stream, MAX_RECORD, f"{file.name} line ", part.line)
        for row in part.of(csv_lines(lines, table, part.start > 0)):
            yield row if isinstance(row, Unusable) else _named(names, row, f"{lines.where}{lines.number}")
    check_state(file, part)


def csv_lines(lines: Lines, table: Table, inside: bool = False) -> Iterator[list[str] | Unusable]:
    """Cells of each row that is not blank, from the file's beginning, or from `inside` of it."""
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
    csv.field_size_limit(MAX_RECORD)
    quoting = csv.QUOTE_MINIMAL if table.quoted else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=table.delimiter, quoting=quoting)


def _header(file: Path, table: Table) -> list[str]:
    """UserError; it shows no cells where they may be a sample's text, since none is a column that is read."""
    needed = f"it needs a header with the columns {', '.join(table.columns)}"
    with open_text(file, newline="") as stream:
        try:
            row = next(_reader(Lines(stream, MAX_RECORD, f"{file.name} line "), table), [])
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
