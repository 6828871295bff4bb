"""Files that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """The place beside `path` to write to; it becomes `path` only after the block ended well.

    Whatever ends the block otherwise (a full disk, Ctrl-C) leaves the old file, and nothing beside it.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def open_whole(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file to write, in its place only after the block ended well; otherwise the old one stays."""
    with _whole(path) as part, part.open("w", encoding="utf-8") as file:
        yield file


def write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    with _whole(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all, as `open_whole` does."""
    with open_whole(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, by `write_text`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
