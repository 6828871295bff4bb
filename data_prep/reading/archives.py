"""Archives that may be hostile: members come as bytes with a checked name, one at a time; nothing is ever unpacked.

An `Unusable` takes the place of a member that is refused, so that it is counted and listed. Refused are names that
leave the archive, links and devices, encrypted members, and anything larger than its bound, declared or real.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from gzip import GzipFile
from pathlib import Path, PurePosixPath
from typing import IO

from data_prep.reading.faults import (
    BOMB,
    DAMAGED_ARCHIVE,
    DUPLICATE,
    ENCRYPTED,
    MEMBER_TOO_LARGE,
    NOT_A_FILE,
    UNSAFE_NAME,
    Unusable,
)

MAX_MEMBER = 2**28
"""Bytes of one member: 256 MiB. Images and their annotations are a thousandth of it."""
MAX_RATIO = 200
"""Unpacked to packed bytes of an archive, above which it counts as a bomb. Deflate reaches 1,032 on zeros;
JPEG files do not compress, JSON text by 5 to 20."""
_RATIO_FROM = 2**24
"""Unpacked bytes above which the ratio is checked: small archives of text may compress well."""
_MAX_GROUP = 64
"""Members of one WebDataset sample."""


@dataclass(frozen=True)
class Member:
    name: str
    data: bytes


def safe_name(name: str) -> bool:
    """Whether a member's name stays inside any folder that it would be written to, on any system."""
    path = PurePosixPath(name)
    return bool(name) and not (
        path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or (len(name) > 1 and name[1] == ":")
    )


def is_resource_fork(name: str) -> bool:
    """Whether it is what macOS writes beside a file, on foreign disks and into archives."""
    return name.rpartition("/")[2].startswith("._")


def is_bomb(unpacked: int, packed: int) -> bool:
    """Whether unpacking so many bytes from so few counts as an attack on memory."""
    return unpacked > max(_RATIO_FROM, MAX_RATIO * packed)


def read_tar(file: Path, max_member: int = MAX_MEMBER) -> Iterator[Member | Unusable]:
    """The files of a `.tar`, `.tar.gz` or `.tgz` in order; folders are skipped.

    A damaged archive gives the members before the damage, then an `Unusable` that names it.
    """
    number = 0
    try:
        with file.open("rb") as raw, tarfile.open(fileobj=(stream := _bounded(raw, max_member)), mode="r:") as tar:
            while (info := tar.next()) is not None:
                number += 1
                tar.members.clear()  # it would keep every header of a long archive
                if info.isdir():
                    continue
                yield _tar_member(stream, info, f"{file.name} member {number}", max_member)
            if stream.last != bytes(tarfile.BLOCKSIZE):  # for tarfile, a broken header is the end
                raise tarfile.ReadError("no end mark")
    except _Bomb:
        yield Unusable(BOMB, file.name)
    except MemoryError:
        raise
    except Exception:  # hostile headers can provoke any exception
        yield Unusable(DAMAGED_ARCHIVE, f"{file.name} after member {number}")


def _tar_member(stream: _Bounded, info: tarfile.TarInfo, where: str, limit: int) -> Member | Unusable:
    if not safe_name(info.name):
        return Unusable(UNSAFE_NAME, where)
    if not info.isreg() or info.issparse():
        return Unusable(NOT_A_FILE, where)
    if info.size > limit:
        return Unusable(MEMBER_TOO_LARGE, where)
    stream.seek(info.offset_data)
    data = stream.read(info.size)
    if len(data) != info.size:
        raise tarfile.ReadError("unexpected end of data")
    return Member(info.name, data)


class _Bomb(Exception):
    pass


class _Bounded:
    """What tarfile asks of a stream. Reads above a bound are refused: a header may ask for a name of gigabytes."""

    def __init__(self, stream: IO[bytes], packed: IO[bytes] | None, limit: int) -> None:
        self.stream, self.packed, self.limit = stream, packed, limit
        self.last = b""
        """The bytes of the last read."""

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self.limit + 1:
            raise tarfile.ReadError("a header asks for too much")
        self.last = self.stream.read(size)
        self._check()
        return self.last

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = self.stream.tell()
        if self.packed is None or whence != io.SEEK_SET or offset < position:
            return self.stream.seek(offset, whence)
        while position < offset:  # a skipped member is unpacked too, so its ratio counts
            skipped = len(self.stream.read(min(offset - position, 2**20)))
            if not skipped:
                break
            position += skipped
            self._check()
        return position

    def tell(self) -> int:
        return self.stream.tell()

    def _check(self) -> None:
        if self.packed is not None and is_bomb(self.stream.tell(), self.packed.tell()):
            raise _Bomb


def _bounded(raw: IO[bytes], limit: int) -> _Bounded:
    packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return _Bounded(GzipFile(fileobj=raw, mode="rb"), raw, limit) if packed else _Bounded(raw, None, limit)


def read_webdataset(file: Path, max_member: int = MAX_MEMBER) -> Iterator[dict[str, bytes] | Unusable]:
    """The samples of a WebDataset tar: neighbouring members of one key, as `{"__key__": …, "jpg": …, "json": …}`.

    The key is the path up to the first dot of the file's name. A repeated key is refused, as is a sample of more than
    64 members or of more bytes than one member may have.
    """
    seen: set[str] = set()
    group: dict[str, bytes] = {}
    key = ""
    for member in read_tar(file, max_member):
        if isinstance(member, Unusable):
            yield member
            continue
        folder, _, base = member.name.rpartition("/")
        if is_resource_fork(base):
            continue
        stem, _, suffix = base.partition(".")
        if not stem or not suffix:
            yield Unusable(NOT_A_FILE, f"{file.name}: a member without key or suffix")
            continue
        fresh = f"{folder}/{stem}" if folder else stem
        if fresh != key:
            if group:
                yield _group(file, key, group, seen)
            key, group = fresh, {}
        suffix = suffix.lower()
        if suffix in group:
            yield Unusable(DUPLICATE, f"{file.name}: a second .{suffix} of one key")
        elif len(group) == _MAX_GROUP or sum(map(len, group.values())) + len(member.data) > max_member:
            yield Unusable(MEMBER_TOO_LARGE, f"{file.name}: a sample of too many members or bytes")
        else:
            group[suffix] = member.data
    if group:
        yield _group(file, key, group, seen)


def _group(file: Path, key: str, group: dict[str, bytes], seen: set[str]) -> dict[str, bytes] | Unusable:
    if key in seen:
        return Unusable(DUPLICATE, f"{file.name}: a key comes again")
    seen.add(key)
    return {"__key__": key.encode(errors="surrogateescape"), **group}


class ZipFiles:
    """Random access to the files of a zip archive, by name or by the end of it (`a/b.jpg` for `images/a/b.jpg`)."""

    def __init__(self, file: Path, max_member: int = MAX_MEMBER) -> None:
        self.file = file
        self.max_member = max_member
        try:
            self._zip = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise Unusable(DAMAGED_ARCHIVE, file.name) from error
        # a name that two members share is ambiguous, so it is refused
        whole: dict[str, zipfile.ZipInfo | None] = {}
        ends: dict[str, zipfile.ZipInfo | None] = {}
        for info in self._zip.infolist():
            if not info.is_dir() and not is_resource_fork(info.filename):
                whole[info.filename] = None if info.filename in whole else info
                end = info.filename.partition("/")[2]
                while end:
                    ends[end] = None if end in ends else info
                    end = end.partition("/")[2]
        self._members = ends | whole
        self._spelt: dict[str, str | None] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def alike(self, name: str, spelling: Callable[[str], str]) -> str | None:
        """The name of the one member that is spelt like it."""
        if self._spelt is None:  # the others only: as a rule names are spelt as they are compared, and there are many
            self._spelt = {}
            for member in self._members:
                if (key := spelling(member)) != member:
                    self._spelt[key] = None if key in self._spelt else member
        key = spelling(name)
        if key in self._members:
            return None if key in self._spelt else key
        return self._spelt.get(key)

    def read(self, name: str) -> bytes:
        """The member's bytes. Raises Unusable if it is refused, KeyError if there is none."""
        info = self._members[name]
        if info is None:
            raise Unusable(DUPLICATE, f"{self.file.name}: two members of one name")
        kind = (info.external_attr >> 28) & 0xF  # of the Unix mode, 0 where there is none
        if not safe_name(info.filename):
            raise Unusable(UNSAFE_NAME, self.file.name)
        if kind not in (0, 8):
            raise Unusable(NOT_A_FILE, self.file.name)
        if info.flag_bits & 1:
            raise Unusable(ENCRYPTED, self.file.name)
        if info.file_size > self.max_member:
            raise Unusable(MEMBER_TOO_LARGE, self.file.name)
        if is_bomb(info.file_size, info.compress_size):
            raise Unusable(BOMB, self.file.name)
        try:
            with self._zip.open(info) as stream:
                data = stream.read(info.file_size + 1)  # never more than declared: the reader stops there
        except MemoryError:
            raise
        except Exception as error:  # wrong checksums, unknown methods, truncated streams
            raise Unusable(DAMAGED_ARCHIVE, self.file.name) from error
        if len(data) != info.file_size:
            raise Unusable(DAMAGED_ARCHIVE, self.file.name)
        return data
