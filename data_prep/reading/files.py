"""A source's files, and images by the names that annotations give them, however broken or hostile."""

from __future__ import annotations

import functools
import os
import stat
from pathlib import Path
from typing import Any

from data_prep.reading.archives import MAX_MEMBER, ZipFiles
from data_prep.reading.faults import IMAGE_MISSING, IMAGE_TOO_LARGE, Unusable
from infimed_jax.errors import UserError


class NoFiles(UserError):
    """The files of a split do not exist."""


def find_files(folder: Path, *patterns: str) -> list[Path]:
    """The files of the first pattern that has any, sorted. NoFiles names the patterns if none has."""
    for pattern in patterns:
        if files := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return files
    raise NoFiles(f"{folder} holds none of {', '.join(patterns)}: check the input folder and its layout")


def all_files(folder: Path, *suffixes: str) -> list[Path]:
    """Every file in the folder, at any depth, whose name ends in a suffix, sorted. NoFiles if there is none."""
    files = sorted(path for path in folder.rglob("*") if path.name.endswith(suffixes) and path.is_file())
    if not files:
        raise NoFiles(f"{folder} holds no file that ends in {' or '.join(suffixes)}: check the input folder")
    return files


def shard_name(folder: Path, file: Path) -> str:
    """The path in the input folder, which makes the ids of the file's records unique."""
    return file.relative_to(folder).as_posix()


class Images:
    """Images by the names that annotations give them, from folders and zip archives (`NAME.zip`) in turn.

    Names that leave a folder count as missing; an archive is indexed when the folders first lack an image. `flat`
    looks for the bare file name in archives, as `unzip -j` would leave it: right only if no two names are alike.
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
                self._opened = [_opened(file, (s := file.stat()).st_size, s.st_mtime_ns) for file in self.zips]
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
        handle = os.open(file, os.O_RDONLY)  # a file object would cost half as much as the reading
        try:
            return os.read(handle, state.st_size)
        finally:
            os.close(handle)
    except (OSError, ValueError):  # a name too long, or with a NUL
        return None


@functools.lru_cache(64)
def _opened(file: Path, size: int, modified: int) -> ZipFiles:
    """Shared by all parts that a process reads: the index of a million members takes seconds."""
    return ZipFiles(file)


_real = functools.lru_cache(1024)(os.path.realpath)
"""Real paths of folders: thousands of images share one."""
