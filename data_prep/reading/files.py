"""A source's files, and images by the names that annotations give them, however broken or hostile."""

from __future__ import annotations

import base64
import binascii
import functools
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from data_prep.reading.archives import MAX_MEMBER, ZipFiles, is_resource_fork
from data_prep.reading.faults import (
    IMAGE_ADDRESS,
    IMAGE_LEAVES,
    IMAGE_MISSING,
    IMAGE_NOT_BASE64,
    IMAGE_TOO_LARGE,
    Unusable,
)
from infimed_jax.errors import UserError

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_BASE64 = re.compile(
    r"data:[^,]{0,100};base64,|(?=(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/\s]{60})", re.IGNORECASE
)
"""A data address, or Base64 that begins as JPEG, PNG, GIF or WebP files do."""


class NoFiles(UserError):
    """The files of a split do not exist."""


def find_files(folder: Path, *patterns: str) -> list[Path]:
    """The files of the first pattern that has any, sorted. NoFiles names the patterns if none has."""
    for pattern in patterns:
        if files := sorted(path for path in _matching(folder, pattern) if path.is_file()):
            return files
    raise NoFiles(f"{folder} holds none of {', '.join(patterns)}: check the input folder and its layout")


def _matching(folder: Path, pattern: str) -> Iterator[Path]:
    if pattern.startswith("**/"):  # glob follows no links to folders here
        return (Path(file) for file in walk(folder) if fnmatch(os.path.basename(file), pattern[len("**/") :]))
    return (path for path in folder.glob(pattern) if not is_resource_fork(path.name))


def all_files(folder: Path, *suffixes: str) -> list[Path]:
    """Every file in the folder, at any depth, whose name ends in a suffix, sorted. NoFiles if there is none."""
    files = sorted(path for path in map(Path, walk(folder)) if path.name.endswith(suffixes) and path.is_file())
    if not files:
        raise NoFiles(f"{folder} holds no file that ends in {' or '.join(suffixes)}: check the input folder")
    return files


def walk(folder: str | Path) -> Iterator[str]:
    """The paths of all files in the folder in a fixed order, through links to folders, but not round in circles."""
    above: dict[str, tuple[str, ...]] = {}
    for parent, folders, files in os.walk(folder, followlinks=True):
        trail = (*above.get(os.path.dirname(parent), ()), os.path.realpath(parent))
        above[parent] = trail
        folders[:] = sorted(f for f in folders if os.path.realpath(os.path.join(parent, f)) not in trail)
        yield from (os.path.join(parent, file) for file in sorted(files) if not is_resource_fork(file))


def shard_name(folder: Path, file: Path) -> str:
    """The path in the input folder, which makes the ids of the file's records unique."""
    return file.relative_to(folder).as_posix()


class Images:
    """Images by the names that annotations give them, from folders and zip archives (`NAME.zip`) in turn.

    A name that no file has is also tried with `/` for `\\`, without percent signs, and in other case and Unicode form
    if exactly one file is meant. Links in a folder are its owner's, and are followed; a name never leaves the folder.
    An archive is indexed when the folders first lack an image. `flat` looks for the bare file name in archives, as
    `unzip -j` would leave it: right only if no two names are alike.
    """

    def __init__(self, *places: Path, flat: bool = False) -> None:
        self.flat = flat
        self.folders = [os.path.abspath(place) for place in places if place.suffix != ".zip"]
        self.zips = [place for place in places if place.suffix == ".zip" and place.is_file()]
        self._opened: list[ZipFiles] | None = None

    def read(self, name: str) -> bytes:
        """The image's bytes; Base64 is decoded. Raises Unusable: why there is no such image, and its name."""
        if encoded := _BASE64.match(name):
            return from_base64(name[encoded.end() :])
        local = unquote(name[len("file://") :]) if name.startswith("file://") else name
        if _ADDRESS.match(local):
            raise Unusable(IMAGE_ADDRESS, name[:200])
        if local:
            data = self._exact(local)
            plain = local.replace("\\", "/").strip()
            if data is None:
                data = self._alike(plain)
            if data is None and "%" in plain:
                data = self._alike(unquote(plain))
            if data is not None:
                return data
            if self.folders and all(_inside(folder, local) is None for folder in self.folders):
                raise Unusable(IMAGE_LEAVES, name[:200])
            if any(_is_link(folder, local) for folder in self.folders):
                raise Unusable(IMAGE_MISSING, f"{name[:200]}, a link to a file that does not exist")
        raise Unusable(IMAGE_MISSING, name[:200])

    def _exact(self, name: str) -> bytes | None:
        for folder in self.folders:
            if (file := _inside(folder, name)) and (data := _read_file(file, name)) is not None:
                return data
        wanted = os.path.basename(name) if self.flat else name
        return next((archive.read(wanted) for archive in self._archives() if wanted in archive), None)

    def _alike(self, name: str) -> bytes | None:
        for folder in self.folders:
            file = _inside(folder, name)
            if file and (found := _find_alike(folder, os.path.relpath(file, folder))):
                return _read_file(found, name)
        wanted = os.path.basename(name) if self.flat else name
        for archive in self._archives():
            if member := archive.alike(wanted, spelling):
                return archive.read(member)
        return None

    def _archives(self) -> list[ZipFiles]:
        if self._opened is None:
            self._opened = [_opened(file, (s := file.stat()).st_size, s.st_mtime_ns) for file in self.zips]
        return self._opened

    def cell(self, value: Any) -> bytes:
        """The image of a cell: bytes, `{"bytes", "path"}` as Hugging Face has them, or a name as `read` takes it."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path") or value.get("url")
        if isinstance(value, bytes) and value:
            return value
        if value is None or isinstance(value, str | bytes):
            return self.read(value or "")
        raise Unusable(IMAGE_MISSING, f"no name or bytes, but {type(value).__name__}")

    def cells(self, value: Any) -> tuple[bytes, ...]:
        """The images of a cell that may hold a list of them."""
        return tuple(self.cell(each) for each in as_list(value))


def as_list(value: Any) -> list[Any]:
    """A list of values, also where a table holds it as an array; one value is a list of one."""
    if isinstance(value, list | tuple):
        return list(value)
    return list(value) if hasattr(value, "dtype") and getattr(value, "ndim", 0) == 1 else [value]


def from_base64(encoded: str) -> bytes:
    """Raises Unusable."""
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unusable(IMAGE_NOT_BASE64) from error


def spelling(name: str) -> str:
    """What names have in common that differ in case or in the form of Unicode: macOS decomposes accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _inside(folder: str, name: str) -> str | None:
    """The file's path, if the name by itself does not leave the folder."""
    path = os.path.normpath(os.path.join(folder, name))
    if path.startswith(folder + os.sep):
        return path
    real = _real(folder)
    return os.path.join(folder, path[len(real) + 1 :]) if path.startswith(real + os.sep) else None


def _read_file(file: str, name: str) -> bytes | None:
    try:
        state = os.stat(file)
        if not stat.S_ISREG(state.st_mode):
            return None
        if state.st_size > MAX_MEMBER:
            raise Unusable(IMAGE_TOO_LARGE, name[:200])
        handle = os.open(file, os.O_RDONLY)  # a file object would cost half as much as the reading
        try:
            return os.read(handle, state.st_size)
        finally:
            os.close(handle)
    except (OSError, ValueError):  # a name too long, or with a NUL
        return None


def _is_link(folder: str, name: str) -> bool:
    try:
        return os.path.islink(_inside(folder, name) or folder)
    except ValueError:
        return False


def _find_alike(folder: str, name: str) -> str | None:
    """The one file whose path is spelt like the name; None where there is none, or another."""
    place = folder
    for part in name.split(os.sep):
        try:
            there = os.path.lexists(os.path.join(place, part))
        except ValueError:
            return None
        same = part if there else _listing(place).get(spelling(part))
        if same is None:
            return None
        place = os.path.join(place, same)
    return place


@functools.lru_cache(16)
def _listing(folder: str) -> dict[str, str | None]:
    """Names in a folder by their spelling; None for a spelling that several have."""
    names: dict[str, str | None] = {}
    try:
        for name in os.listdir(folder):
            key = spelling(name)
            names[key] = None if key in names else name
    except OSError:
        pass
    return names


@functools.lru_cache(64)
def _opened(file: Path, size: int, modified: int) -> ZipFiles:
    """Shared by all parts that a process reads: the index of a million members takes seconds."""
    return ZipFiles(file)


_real = functools.lru_cache(64)(os.path.realpath)
