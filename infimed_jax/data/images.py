"""Guarded decoding: an image file that may be hostile or broken → the pixels that the model sees, or a fixed reason.

Equal to transformers' `load_image` and SigLIP processor up to the normalisation, which happens on the device.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, UnidentifiedImageError

from infimed_jax import config

MAX_PIXELS = 2**26
"""Width × height; checked in the header, before any pixel is decoded. 67 million are 200 MB as RGB."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")

Reason = Literal["empty file", "not a supported image", "too many pixels", "truncated or corrupt"]
REASONS: tuple[str, ...] = get_args(Reason)

# EXIF tag 274: how the stored image must be turned to stand upright.
_ORIENTATION = 274
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}


class ImageError(ValueError):
    """An image that cannot be used; `reason` is one of REASONS, so that reports can count it."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Encoded file → u8[size, size, 3]: `decode_rgb`, then bicubic, aspect ratio ignored. Raises ImageError."""
    return np.asarray(decode_rgb(data).resize((size, size), Image.Resampling.BICUBIC))


def prepare_image(data: bytes, model: config.Model) -> Any:
    """Encoded file → the arrays that the model's encoder takes. Raises ImageError."""
    return model.host_arrays(decode_rgb(data))


def visual_tokens(images: Sequence[bytes], model: config.Model) -> int | list[int]:
    """Visual tokens of each image; one number, and nothing is read, where they do not depend on its size.

    An image that cannot be read counts as the largest one.
    """
    return [_span_tokens(data, model) for data in images] if model.sized else model.visual_tokens


def _span_tokens(data: bytes, model: config.Model) -> int:
    try:
        image = _open(data)
    except ImageError:
        return model.visual_tokens
    width, height = image.size[::-1] if _turn(image) in _SIDEWAYS else image.size
    return model.image(height, width).tokens


class ImageCache:
    """Prepared images by content and model, for many threads; beyond `limit` bytes the least recently used goes."""

    def __init__(self, limit: int = 2**28) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[tuple[bytes, config.Model], Any] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self, data: bytes, model: config.Model) -> Any:
        """As `prepare_image`; the arrays are shared, so they must not be written to."""
        name = (hashlib.sha256(data).digest(), model)
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        image = prepare_image(data, model)
        with self._lock:
            if name not in self._kept:
                self._kept[name] = image
                self._bytes += _nbytes(image)
            image = self._kept[name]
            while self._bytes > self._limit:
                self._bytes -= _nbytes(self._kept.popitem(last=False)[1])
        return image


def _nbytes(image: Any) -> int:
    from jax import tree  # here, since sources of data import this module and need no JAX

    return sum(array.nbytes for array in tree.leaves(image))


def decode_rgb(data: bytes) -> Image.Image:
    """Encoded file → RGB at its own size: first frame, upright by EXIF.

    Transparency is laid on white. Samples wider than 8 bits (X-ray and CT exports) are stretched from their own minimum
    and maximum: clipping them at 255, as Pillow would, or dividing by 256 leaves white or black squares.
    Raises ImageError.
    """
    image = _open(data)
    try:
        image.load()
        return _to_rgb(_upright(image))
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError("truncated or corrupt") from error


def _open(data: bytes) -> Image.Image:
    """The file with its header read."""
    if not data:
        raise ImageError("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too many pixels") from error
    except UnidentifiedImageError as error:
        raise ImageError("not a supported image") from error
    except Exception as error:  # hostile headers find their way to any exception
        raise ImageError("truncated or corrupt") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError("too many pixels")
    return image


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION))
    except Exception:  # broken metadata says nothing about the pixels
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _stretch(np.asarray(image)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _stretch(values: np.ndarray) -> Image.Image:
    """Wide grey values → 8 bits, minimum to 0 and maximum to 255; a constant image is black."""
    wide = values.astype(np.float64)
    low, high = wide.min(), wide.max()
    if not np.isfinite(high - low):
        raise ValueError("grey values are not finite")
    scale = 255.0 / (high - low) if high > low else 0.0
    return Image.fromarray(np.rint((wide - low) * scale).astype(np.uint8))
