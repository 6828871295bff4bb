"""Files that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8; a reader sees the old file or the new one. Raises OSError, and then the old one stays."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, by `write_text`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
