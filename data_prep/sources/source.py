"""What a data source is: the door through which every dataset enters, and what the adapters share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infimed_jax.data.sample import Kind, Sample, Skipped
from infimed_jax.errors import UserError

IMAGE_MISSING = "image missing"
NO_ANSWER = "no answer"
NO_QUESTION = "no question"


@dataclass(frozen=True)
class Source:
    """One dataset: where it is had, what it may be used for, and how its files become samples."""

    name: str
    title: str
    licence: str
    """SPDX name where there is one."""
    commercial_use: bool
    allow_external_api: bool
    """Whether its text and images may be sent to a third party's service; credentialed data never."""
    training_allowed: bool
    splits: tuple[str, ...]
    layout: str
    """The files that `read` expects in the input folder."""
    obtain: str
    """How a user comes by those files."""
    read: Callable[..., Iterator[Sample | Skipped]]
    """(input folder, split) to samples in a fixed order; (input folder, split, shard) where there are `shards`.
    UserError: the folder or a file of annotations is unusable."""
    shards: Callable[[Path, str], list[str]] | None = None
    """(input folder, split) to the names of pieces that can be read apart, so in parallel: the tars of a WebDataset."""


def read_json(file: Path, kind: type = list) -> Any:
    """The file's JSON value, of type `kind`. UserError names the file where it is missing, broken, or another type."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist: check the input folder and its layout") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{file} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, kind):
        raise UserError(f"{file} must hold a JSON {kind.__name__}, not {type(value).__name__}")
    return value


def read_rows(file: Path) -> list[dict[str, Any]]:
    """A JSON list of objects, as annotations usually are. UserError as in `read_json`."""
    rows = read_json(file)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{file}: entry {number} is {type(row).__name__}, not an object")
    return rows


def read_image(folder: Path, name: str) -> bytes | None:
    """The bytes of an image named by an annotation, or None where it is absent or lies outside of `folder`."""
    root = folder.resolve()
    try:
        file = (root / name).resolve()
        return file.read_bytes() if file.is_relative_to(root) and file.is_file() else None
    except (OSError, ValueError):  # a name too long, or with a NUL
        return None


def text(value: Any) -> str:
    """An annotation's value as stripped text: numbers become text, absent and nested values the empty string."""
    return str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def answer_kind(answer: str, answer_type: str) -> Kind:
    """How a question of CLOSED or OPEN type is asked: yes/no by its answer, else closed or open."""
    if answer.lower() in ("yes", "no"):
        return "yes_no"
    return "closed" if answer_type == "CLOSED" else "open"
