"""Replies on disk, one file each, by the digest of everything that was asked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from infimed_jax.files import to_json, whole_file


class Cache:
    """Entries appear whole or not at all, whatever else reads or writes there. Holds replies, never requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def key(url: str, body: dict[str, Any]) -> str:
        """SHA-256 of address and request: another model, setting, word or pixel is another key."""
        text = to_json([url, body], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry; None where there is none, or one that cannot be read and will be replaced."""
        try:
            entry = json.loads(self._file(key).read_bytes())
            return entry["value"] if entry["key"] == key and isinstance(entry["value"], dict) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Raises OSError, and then there is no new entry."""
        file = self._file(key)
        file.parent.mkdir(exist_ok=True)
        with whole_file(file) as part:
            part.touch(0o600)  # replies may speak of patients
            part.write_text(to_json({"key": key, "value": value}), encoding="utf-8")

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
