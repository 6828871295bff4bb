"""Reading annotations and images that may be huge, broken or hostile: rows stream, and a bad one stands in its place.

Row readers yield dictionaries, and an `Unusable` where a row cannot be read: too large, broken, or not UTF-8. Memory
is bounded by one row. Text is UTF-8 (a byte-order mark is passed over) or UTF-16 with its mark; another encoding
shows as rows that are not UTF-8, each counted and named.
"""

from __future__ import annotations

import codecs
import csv
import functools
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from data_prep.archives import MAX_MEMBER, ZipFiles
from data_prep.faults import (
    COLUMNS,
    IMAGE_MISSING,
    IMAGE_TOO_LARGE,
    NOT_AN_OBJECT,
    NOT_JSON,
    NOT_UNICODE,
    OPEN_QUOTE,
    RECORD_TOO_LARGE,
    Unusable,
)
from data_prep.sources.source import Row
from infimed_jax.errors import UserError

MAX_RECORD = 2**26
"""Characters of one row: 64 million. A conversation has thousands."""
_MAX_WHOLE = 2**29
"""Bytes of a file that is read at once, which takes three times as many: 512 MiB, thrice the largest published one."""
_CHUNK = 2**20
_LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*("?)|[{}\[\],]', re.DOTALL)
"""A whole string, or as much of it as there is, or a mark of structure."""
_INSIDE = re.compile(r'(?:[^"{}\[\]]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
"""What an element holds up to its next bracket, or up to a string that is cut: passed over at once."""
_STRING_REST = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*("?)', re.DOTALL)


class NoFiles(UserError):
    """What a split is read from is not there."""


@contextmanager
def open_text(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """The file as text; bytes that are no UTF-8 become lone surrogates. UserError names the file and the mend."""
    try:
        with file.open("rb") as raw:
            head = raw.read(4)
            raw.seek(0)
            utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            if (b"\0" in head and not utf16) or head == codecs.BOM_UTF32_LE:
                raise UserError(f"{file} is not UTF-8 (zero bytes): convert it, as with iconv -f UTF-16LE -t UTF-8")
            encoding, errors = ("utf-16", "strict") if utf16 else ("utf-8-sig", "surrogateescape")
            yield io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline=newline)
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


def json_rows(file: Path, limit: int | None = None) -> Iterator[Row | Unusable]:
    """The objects of a JSON list, or of JSON lines, one at a time. UserError: the file is missing or no such thing."""
    limit = MAX_RECORD if limit is None else limit
    with open_text(file) as stream:
        head = stream.read(1)
        while head and head.isspace():
            head = stream.read(1)
        if head == "[":
            yield from _list_rows(file, stream, limit)
        else:
            yield from _line_rows(file, stream, head, limit)


def _line_rows(file: Path, stream: TextIO, head: str, limit: int) -> Iterator[Row | Unusable]:
    lines = _Lines(stream, limit, f"{file.name} line ", head)
    while True:
        try:
            line = next(lines)
        except StopIteration:
            return
        except Unusable as fault:
            yield fault
            continue
        if not line.isspace():
            yield _object(line, f"{file.name} line {lines.number}")


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
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Unusable(NOT_UNICODE) from error


class _Lines:
    """Lines of bounded length; an overlong one raises Unusable when its turn comes, and the next goes on after it."""

    def __init__(self, stream: TextIO, limit: int, where: str, head: str = "") -> None:
        self.stream, self.limit, self.where, self.head = stream, limit, where, head
        self.number = 0
        self.ended = False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.head + self.stream.readline(self.limit + 1)
        self.head = ""
        if not line:
            self.ended = True
            raise StopIteration
        self.number += 1
        if len(line) > self.limit and not line.endswith("\n"):
            while (rest := self.stream.readline(_CHUNK)) and not rest.endswith("\n"):
                pass
            raise Unusable(RECORD_TOO_LARGE, f"{self.where}{self.number}")
        return line


def _list_rows(file: Path, stream: TextIO, limit: int) -> Iterator[Row | Unusable]:
    """The elements after the opening bracket; one that is too large is passed over without being kept."""
    number = 0
    for element in _elements(file, stream, limit):
        if element is None or element.strip():
            number += 1
            where = f"{file.name} entry {number}"
            yield Unusable(RECORD_TOO_LARGE, where) if element is None else _object(element, where)


def _elements(file: Path, stream: TextIO, limit: int) -> Iterator[str | None]:
    """What stands between the list's commas, found by brackets and quotes alone; None for what exceeds the limit."""
    pieces: list[str] = []
    size = depth = 0
    quoted = False
    while chunk := stream.read(_CHUNK):
        if (len(chunk) - len(chunk.rstrip("\\"))) % 2:
            chunk += stream.read(1)  # an escape is never cut in two
        start = at = 0
        if quoted:
            match = _STRING_REST.match(chunk)
            at, quoted = match.end(), not match[1]
        while match := _TOKEN.search(chunk, _INSIDE.match(chunk, at).end() if depth else at):
            at, mark = match.end(), match[0]
            if mark[0] == '"':
                quoted = not match[1]
            elif mark in "{[":
                depth += 1
            elif depth and mark in "}]":
                depth -= 1
            elif not depth and mark in ",]":
                size += match.start() - start
                yield "".join((*pieces, chunk[start : match.start()])) if size <= limit else None
                pieces, size, start = [], 0, at
                if mark == "]":
                    return
        size += len(chunk) - start
        pieces = [*pieces, chunk[start:]] if size <= limit else []
    raise UserError(f"{file} ends inside of its list: it is not valid JSON, download it again")


def csv_rows(
    file: Path, columns: Sequence[str], *, delimiter: str = ",", header: bool = True, quoted: bool = True
) -> Iterator[Row | Unusable]:
    """The rows of a table as text by column. Without a header, `columns` are its columns in order.

    UserError: the file is missing, or its header lacks one of `columns`.
    """
    with open_text(file, newline="") as stream:
        lines = _Lines(stream, MAX_RECORD, f"{file.name} line ")
        csv.field_size_limit(MAX_RECORD)
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
        names = list(columns)
        if header:
            try:
                names = [name.strip() for name in next(reader, [])]
            except (Unusable, csv.Error) as error:
                raise UserError(f"{file} has no header: it needs the columns {', '.join(columns)}") from error
            if missing := [column for column in columns if column not in names]:
                raise UserError(f"{file} lacks {', '.join(missing)}: its columns are {', '.join(names)[:300]}")
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
                yield Unusable(OPEN_QUOTE, f"{file.name} lines {first} to {lines.number}")
            elif row:
                yield _named(names, row, f"{file.name} line {lines.number}")


def _named(names: list[str], row: list[str], where: str) -> Row | Unusable:
    if len(row) != len(names):
        return Unusable(COLUMNS, where)
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return Unusable(NOT_UNICODE, where)
    return dict(zip(names, row, strict=True))


def find_files(folder: Path, *patterns: str) -> list[Path]:
    """The files of the first pattern that has any, sorted. NoFiles names the patterns where none has."""
    for pattern in patterns:
        if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return found
    raise NoFiles(f"{folder} holds none of {', '.join(patterns)}: check the input folder and its layout")


def all_files(folder: Path, *suffixes: str) -> list[Path]:
    """Every file in the folder, at any depth, whose name ends so, sorted. NoFiles where there is none."""
    found = sorted(path for path in folder.rglob("*") if path.name.endswith(suffixes) and path.is_file())
    if not found:
        raise NoFiles(f"{folder} holds no file that ends in {' or '.join(suffixes)}: check the input folder")
    return found


def shards_of(files: Callable[[Path, str], list[Path]]) -> Callable[[Path, str], list[str]]:
    """`Source.shards` of a split's files: their paths in the input folder."""
    return partial(_relative, files)


def _relative(files: Callable[[Path, str], list[Path]], folder: Path, split: str) -> list[str]:
    return [shard_name(folder, file) for file in files(folder, split)]


def shard_name(folder: Path, file: Path) -> str:
    """The path in the input folder; it stands in the ids of the shard's records, which makes them unique."""
    return file.relative_to(folder).as_posix()


class Images:
    """Images by the names that annotations give them, from folders and zip archives (`NAME.zip`) in turn.

    Names that leave a folder are taken for missing; an archive is indexed when a folder first lacks an image. `flat`
    looks for the bare file name in archives, as `unzip -j` would leave it: right only where no two names are alike.
    """

    def __init__(self, *places: Path, flat: bool = False) -> None:
        self.flat = flat
        self.folders = [os.path.realpath(place) for place in places if place.suffix != ".zip"]
        self.zips = [place for place in places if place.suffix == ".zip" and place.is_file()]
        self._opened: list[ZipFiles] | None = None

    def read(self, name: str) -> bytes:
        """The image's bytes. Raises Unusable: missing, too large, or a refused member of an archive."""
        if name:
            for folder in self.folders:
                if (data := _read_inside(folder, name)) is not None:
                    return data
            if self._opened is None:
                self._opened = [ZipFiles(file) for file in self.zips]
            wanted = os.path.basename(name) if self.flat else name
            for archive in self._opened:
                if wanted in archive:
                    return archive.read(wanted)
        raise Unusable(IMAGE_MISSING, name[:200])

    def cell(self, value: Any) -> bytes:
        """The image of a table's cell: bytes, `{"bytes", "path"}` as Hugging Face has them, or a file's name."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        return self.read(value if isinstance(value, str) else "")


def read_image(folder: Path, name: str) -> bytes | None:
    """The bytes of an image named by an annotation, or None where it is absent or lies outside of `folder`."""
    return _read_inside(os.path.realpath(folder), name)


def _read_inside(folder: str, name: str) -> bytes | None:
    try:
        parent, base = os.path.split(os.path.join(folder, name))
        file = os.path.join(_real(parent), base)
        state = os.lstat(file)
        if stat.S_ISLNK(state.st_mode):
            file = os.path.realpath(file)
            state = os.lstat(file)
        if not file.startswith(folder + os.sep) or not stat.S_ISREG(state.st_mode):
            return None
        if state.st_size > MAX_MEMBER:
            raise Unusable(IMAGE_TOO_LARGE, name[:200])
        handle = os.open(file, os.O_RDONLY)  # no file object, which would cost half as much as what is read
        try:
            return os.read(handle, state.st_size)
        finally:
            os.close(handle)
    except (OSError, ValueError):  # a name too long, or with a NUL
        return None


_real = functools.lru_cache(1024)(os.path.realpath)
"""Of folders: thousands of images share one."""
