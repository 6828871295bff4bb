"""Rows of annotations that may be huge, broken or hostile: they stream, and a bad one is reported in its place.

Row readers yield dictionaries, and an `Unusable` where a row cannot be read: too large, broken, or not UTF-8. Memory
is bounded by one row. Text is UTF-8 (a byte-order mark is passed over) or UTF-16 with its mark; another encoding
shows as rows that are not UTF-8, each counted and named.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.reading.faults import (
    NOT_AN_OBJECT,
    NOT_JSON,
    NOT_UNICODE,
    RECORD_TOO_LARGE,
    Unusable,
)
from data_prep.reading.files import NoFiles
from infimed_jax.errors import UserError
from infimed_jax.files import to_json

Row = dict[str, Any]

MAX_RECORD = 2**26
"""Characters of one row: 64 million. A conversation has thousands."""
_MAX_WHOLE = 2**29
"""Bytes of a file that is read at once, which takes three times as many: 512 MiB, thrice the largest published one."""
_CHUNK = 2**20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""The escape of a surrogate, alone or in a pair."""
_BETWEEN_LISTS, _BETWEEN_ENTRIES = re.compile(r"[ \t\n\r]*+"), re.compile(r"[ \t\n\r,]*+")
_AFTER_ENTRY = re.compile(r"[ \t\n\r]*+(?=[,\]])")
_OUTSIDE = re.compile(r'[^"{}\[\],]*+(["{}\[\],]?)')
"""Text up to a bracket, a comma or an opening quote; the group is empty where the text ends first."""
_QUOTED = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+("?)', re.DOTALL)
"""Text up to the closing quote; the group is empty where the text ends first, perhaps within an escape."""
_parse = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class Part:
    """Some rows of a file of annotations, read without those before them; by default all of them."""

    first: int = 0
    """Number of its first row, from which ids are counted."""
    stop: int | None = None
    """Number of the first row after it."""
    start: int = 0
    """Byte after the row before; 0 for the file's first row, whatever precedes that."""
    line: int = 0
    """Lines before it; in a JSON list, entries."""
    state: tuple[int, int] | None = None
    """`state_of` the file when it was cut: in a changed file, rows begin elsewhere."""
    file: str = ""
    """Its path in the input folder, where a split has several."""

    def of(self, file: Path, rows: Iterable[Any]) -> Iterator[Any]:
        """The part's rows, out of all rows of the file from `start` on. UserError as `check_state`."""
        check_state(file, self)
        yield from itertools.islice(rows, None if self.stop is None else self.stop - self.first)
        check_state(file, self)


WHOLE = Part()


def state_of(file: Path) -> tuple[int, int]:
    """Size, and time of the last change. UserError as `open_text`."""
    with _errors_name(file):
        stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def check_state(file: Path, part: Part) -> None:
    """UserError: the file is no longer what it was when it was cut."""
    if part.state is not None and part.state != state_of(file):
        raise UserError(f"{file} has changed since its rows were counted: run this again when it is complete")


@contextmanager
def open_text(file: Path, newline: str | None = None, start: int = 0) -> Iterator[io.TextIOWrapper]:
    """The file as text, from byte `start` on; bytes that are not UTF-8 become lone surrogates.

    The position of its `buffer` is where the text begins. UserError names the file and the fix.
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
    """The file's JSON value, of type `kind`; of several lists in one file all entries.

    UserError names the file where it is missing, broken, or another type.
    """
    with open_text(file) as stream:
        if os.fstat(stream.fileno()).st_size > _MAX_WHOLE:
            raise UserError(f"{file} is larger than {_MAX_WHOLE >> 20} MiB: it is no file of annotations")
        content = stream.read()
    try:
        value, end = _parse(content, _blank_end(content, 0))
        while (end := _blank_end(content, end)) < len(content):
            if not isinstance(value, list) or content[end] != "[":
                place = len(content[:end].encode(errors="surrogateescape"))
                raise ValueError(f"text from byte {place:,} on, after the {type(value).__name__} has ended")
            more, end = _parse(content, end)
            value += more
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): download it again") from error
    if not _is_unicode(content, value):
        raise UserError(f"{file} is not UTF-8: convert it, or download it again")
    if not isinstance(value, kind):
        raise UserError(f"{file} must hold a JSON {kind.__name__}, not {type(value).__name__}")
    return value


def _blank_end(content: str, start: int) -> int:
    blank = _BETWEEN_LISTS.match(content, start)
    return blank.end() if blank else start


def read_rows(file: Path) -> list[Row]:
    """A JSON list of objects, whole: for small annotations, where any fault is a UserError, as in `read_json`."""
    rows = read_json(file)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{file}: entry {number} is {type(row).__name__}, not an object")
    return rows


def json_rows(file: Path, part: Part = WHOLE, limit: int | None = None) -> Iterator[Row | Unusable]:
    """The objects of JSON lists or of JSON lines, one at a time; `limit`: characters of one [MAX_RECORD].

    UserError: the file is missing, or its list is cut.
    """
    listed = is_list(file)
    with open_text(file, newline="", start=part.start) as stream:
        if listed:
            rows: Iterable[Row | Unusable] = Entries(stream, f"{file.name} entry ", part.line, limit, part.start > 0)
        else:
            rows = _line_rows(Lines(stream, f"{file.name} line ", part.line, limit))
        yield from part.of(file, rows)


def is_list(file: Path) -> bool:
    """Whether the file's JSON is a list, not lines."""
    with open_text(file) as stream:
        head = stream.read(1)
        while head and head.isspace():
            head = stream.read(1)
    return head == "["


def _line_rows(lines: Lines) -> Iterator[Row | Unusable]:
    for line in json_lines(lines):
        yield line if isinstance(line, Unusable) else _parsed(line, f"{lines.where}{lines.number}")


def json_lines(lines: Lines) -> Iterator[str | Unusable]:
    """The lines that are not blank."""
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


def _parsed(raw: str, where: str) -> Row | Unusable:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return Unusable(NOT_JSON, where)
    return _object(value, raw, where)


def _object(value: Any, raw: str, where: str) -> Row | Unusable:
    """The value, if it is an object without lone surrogates; `raw` is the text that may hold them."""
    if not isinstance(value, dict):
        return Unusable(NOT_AN_OBJECT, where)
    return value if _is_unicode(raw, value) else Unusable(NOT_UNICODE, where)


def _is_unicode(raw: str, value: Any) -> bool:
    """False where text holds lone surrogates, escaped or from bytes that are not UTF-8."""
    try:
        raw.encode()
        if _SURROGATE.search(raw):
            to_json(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


class Lines:
    """Lines of bounded length; an overlong one raises Unusable in its turn, and the next follows it."""

    def __init__(self, stream: io.TextIOWrapper, where: str = "", number: int = 0, limit: int | None = None) -> None:
        self.stream, self.where, self.limit = stream, where, limit or MAX_RECORD
        self.number = number
        """Lines read."""
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


class Entries:
    """The entries of a JSON list as rows, and of further lists that follow it in the file.

    The standard library's parser reports where the value that it has parsed ends, so an entry is found and parsed in
    one pass. Only an entry that it cannot parse (broken, or cut by the end of the text that has been read) is
    delimited by its brackets and quotes; one that exceeds MAX_RECORD is passed over without being kept.
    """

    def __init__(
        self,
        stream: io.TextIOWrapper,
        where: str = "",
        number: int = 0,
        limit: int | None = None,
        inside: bool = False,
    ) -> None:
        """`inside`: the stream begins after an entry, not before the list."""
        self.stream, self.where, self.limit = stream, where, limit or MAX_RECORD
        self.number = number
        """Entries read."""
        self.inside = inside
        self._text, self._at = "", 0
        self._suspect = False
        """Whether the text may hold surrogates: it seldom does, and then no row needs to be examined."""
        self._decoder = codecs.getincrementaldecoder(stream.encoding)()
        self._encoding = "utf-8" if stream.encoding == "utf-8" else "utf-16-le"  # without a mark

    @property
    def place(self) -> int:
        """Byte after the last entry."""
        unread = self._text[self._at :].encode(self._encoding, self._decoder.errors)
        return self.stream.buffer.tell() - len(self._decoder.getstate()[0]) - len(unread)

    def __iter__(self) -> Iterator[Row | Unusable]:
        while mark := self._next():
            if mark == ("]" if self.inside else "["):
                self.inside = not self.inside
                self._at += 1
                continue
            self.number += 1
            where = f"{self.where}{self.number}"
            if not self.inside:
                yield Unusable(NOT_JSON, f"{where}, after the list: the file is not read from byte {self.place:,} on")
                return
            yield self._entry(where)
        if self.inside:
            raise self._cut(self.place)

    def _cut(self, place: int) -> UserError:
        return UserError(
            f"{self.stream.name} ends inside of its list: the entry that begins at byte {place:,} never does, for it "
            "is cut or a quote in it is not escaped: fix it, or download the file again"
        )

    def _next(self) -> str:
        """The first character of an entry, or a bracket of the list; empty at the end of the file."""
        while True:
            self._at = (_BETWEEN_ENTRIES if self.inside else _BETWEEN_LISTS).match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on(self._at):
                return ""

    def _read_on(self, at: int) -> bool:
        """Drops the text before `at` and reads some more; False at the end of the file."""
        raw = self.stream.buffer.read(_CHUNK)
        try:
            fresh = self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError:
            self._decoder.errors = "surrogateescape"
            fresh = self._decoder.decode(raw, final=not raw)
        self._text, self._at = self._text[at:] + fresh, 0
        self._suspect = self._decoder.errors != "strict" or _SURROGATE.search(self._text) is not None
        return bool(raw)

    def _entry(self, where: str) -> Row | Unusable:
        begin = self._at
        try:
            value, end = _parse(self._text, begin)
        except (ValueError, RecursionError):
            pass
        else:
            if stop := _AFTER_ENTRY.match(self._text, end):
                self._at = stop.end()
                if self._at - begin > self.limit:
                    return Unusable(RECORD_TOO_LARGE, where)
                return _object(value, self._text[begin:end] if self._suspect else "", where)
        raw = self._delimited()
        return Unusable(RECORD_TOO_LARGE, where) if raw is None else _parsed(raw, where)

    def _delimited(self) -> str | None:
        """The text up to the comma or bracket that ends the entry; None if it exceeds the limit."""
        place, pieces, size = None, list[str](), 0
        depth, quoted = 0, False
        begin = at = self._at
        while True:
            match = (_QUOTED if quoted else _OUTSIDE).match(self._text, at)
            at, mark = match.end(), match[1]
            if not mark:
                if place is None:  # only here: finding it encodes all the text that has not been read yet
                    place = self.place
                size += at - begin
                pieces = [*pieces, self._text[begin:at]] if size <= self.limit else []
                if not self._read_on(at):
                    raise self._cut(place)
                begin = at = 0
            elif mark == '"':
                quoted = not quoted
            elif mark in "{[":
                depth += 1
            elif depth:
                depth -= mark != ","
            elif mark in ",]":
                self._at = at - 1
                size += self._at - begin
                return "".join((*pieces, self._text[begin : self._at])) if size <= self.limit else None
