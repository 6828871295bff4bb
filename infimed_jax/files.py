"""Folders for outputs, and files that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from infimed_jax.errors import UserError, disk_refusal

log = logging.getLogger(__name__)


def make_folder(folder: Path) -> None:
    """Make the folder that outputs go to, with its parents. UserError where nothing can be written there.

    To be called before the work, not after hours of it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        refusal = disk_refusal(error) or f"{(error.strerror or str(error)).lower()}; name another folder"
        raise UserError(f"cannot write to the folder {folder}: {refusal}, and run it again") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The place beside `path` to write to; it becomes `path` only after the block ended well.

    Whatever ends the block otherwise (a full disk, Ctrl-C) leaves the old file, and nothing beside it. Several
    processes may write the same file at once: each has a place of its own.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        part.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file: write() knows none
            error.filename = str(path)
        part.unlink(missing_ok=True)
        raise


def lock(folder: Path, output: Path) -> int:
    """Lock `folder` for this process, until the handle that is returned is closed or the process ends.

    UserError, which names `output`, where another process has it. A file system without locks gives none.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(f"another run is writing {output}: wait for it, or choose another output folder") from error
    except OSError as error:
        log.warning("%s cannot be locked (%s): start no second run on %s", folder, error.strerror, output)
    return handle


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """As `whole_file`, for a folder that is absent or empty."""
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(folder)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(folder)
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextmanager
def open_whole(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file to write, in its place only after the block ended well; otherwise the old one stays."""
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        yield file


def write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    with whole_file(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all, as `open_whole` does."""
    with open_whole(path) as file:
        file.write(text)


def to_json(
    value: Any,
    *,
    indent: int | None = None,
    sort_keys: bool = False,
    ensure_ascii: bool = True,
    separators: tuple[str, str] | None = None,
) -> str:
    """`value` as JSON, laid out by the options of json.dumps; a number that is not finite becomes null.

    RFC 8259 has no such number: jq, JavaScript and every strict reader refuse Python's NaN.
    """
    encoder = json.JSONEncoder(
        allow_nan=False, indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii, separators=separators
    )
    try:
        return encoder.encode(value)
    except ValueError:
        return encoder.encode(json.loads(json.dumps(value), parse_constant=lambda _: None))  # noqa: TID251


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON (see `to_json`), by `write_text`."""
    write_text(path, to_json(value, indent=1, ensure_ascii=False) + "\n")
