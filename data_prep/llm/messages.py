"""Samples as chat messages: text as it is, images as data URLs of their pixels alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from infimed_jax.data.images import decode_rgb

Message = dict[str, Any]
Part = dict[str, Any]


def speech(role: str, content: str | list[Part]) -> Message:
    return {"role": role, "content": content}


def parts(content: Sequence[str | int], images: Sequence[bytes], side: int) -> list[Part]:
    """Text and images in the order of a turn's content, images at most `side` pixels long. ImageError as decoding."""
    return [
        {"type": "text", "text": piece}
        if isinstance(piece, str)
        else {"type": "image_url", "image_url": {"url": data_url(images[piece], side)}}
        for piece in content
    ]


def data_url(image: bytes, side: int) -> str:
    """The image as JPEG, never larger than it is, longer side at most `side`.

    Always written anew: a file's EXIF, comments and thumbnails stay in the house. Raises ImageError.
    """
    picture = decode_rgb(image)
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    Image.frombytes("RGB", picture.size, picture.tobytes()).save(buffer, "JPEG", quality=95, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def text_bytes(messages: Sequence[Message]) -> int:
    """UTF-8 bytes of all text, with 16 for each message's frame."""
    return sum(16 + sum(len(text.encode()) for text in _texts(message)) for message in messages)


def image_count(messages: Sequence[Message]) -> int:
    return sum(part["type"] == "image_url" for m in messages if isinstance(m["content"], list) for part in m["content"])


def _texts(message: Message) -> list[str]:
    if isinstance(message["content"], str):
        return [message["content"]]
    return [part["text"] for part in message["content"] if part["type"] == "text"]
