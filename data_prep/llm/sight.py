"""Whether an endpoint takes notice of images: some servers of text models drop them without a word."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from data_prep.llm.messages import parts, speech

COUNTED, NOT_COUNTED, UNKNOWN = "counted", "not counted", "unknown"
_QUESTION = "Which colour is this?"
_SIDE = 224
"""Pixels: some models refuse images of few."""
_LEAST = 8
"""Tokens of an image: models spend dozens on one, a mark that is left in its place is a few."""


def probes(model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A question about a plain grey picture, and the same without the picture. Nothing of a sample stands in them."""
    picture = io.BytesIO()
    Image.new("RGB", (_SIDE, _SIDE), "gray").save(picture, "PNG")
    seen = parts([0, _QUESTION], [picture.getvalue()], _SIDE)
    rest = {"model": model, "max_tokens": 16, "temperature": 0.0, "seed": 0}
    return {"messages": [speech("user", seen)], **rest}, {"messages": [speech("user", seen[1:])], **rest}


def verdict(seen: tuple[int, int] | None, blind: tuple[int, int] | None) -> str:
    """The verdict from both token counts: an image that a model sees is tokens of its prompt."""
    if seen is None or blind is None:
        return UNKNOWN
    return COUNTED if seen[0] >= blind[0] + _LEAST else NOT_COUNTED
