"""Small samples for the tests of this room."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from infimed_jax.data.sample import Document, Question


def picture(seed: int = 0, side: int = 12, **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **({"format": "PNG"} | options))
    return file.getvalue()


def caption(number: int, source: str = "vqa_rad", text: str = "A chest.", images: int = 1) -> Document:
    content = (*range(images), f"\n{text}")
    pictures = tuple(picture(number + i) for i in range(images))
    return Document(f"{source}/train/{number}", source, "train", pictures, (content,))


def question(number: int, source: str = "vqa_rad", kind="open", answer="left lung", options=(), **values) -> Question:
    return Question(
        id=f"{source}/train/{number}",
        source=source,
        split="train",
        images=values.pop("images", (picture(number),)),
        kind=kind,
        question=values.pop("question", f"Which organ is number {number}?"),
        answer=answer,
        options=options,
        **values,
    )


def damage(folder: Path) -> None:
    """Make the first record of a dataset unreadable, and leave the others."""
    (file,) = folder.glob("*.array_record*")
    content = bytearray(file.read_bytes())
    content[100] ^= 1  # inside the first record
    file.write_bytes(content)
