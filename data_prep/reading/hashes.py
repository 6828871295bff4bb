"""Hashes that identify copies: of files, of what an image looks like, and of a question's words."""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata

import numpy as np
from PIL import Image

from infimed_jax.data.images import FORMATS, ImageError, decode_image

_SIDE = 64
"""Side in pixels to which an image is scaled before its frequencies are computed."""
_BITS = 16
"""Side of the square of lowest frequencies whose signs are the hash: 256 bits, since the usual 64 do not
distinguish chest radiographs."""
THRESHOLD = 64
"""Bits in which a copy may differ; `data_prep.steps.decontaminate` says how it was chosen."""
ALIKE = 0.9
"""Likeness above which two images count as one; chosen there as well."""
_CROPS = (0.0, 0.02)
"""Shares cut from each side before hashing: a cropped copy is near one of them."""
_SHADE = 2
"""An image whose grey levels differ by less is of one shade."""
_AROUND = 9
"""Side of the window whose mean is subtracted from each pixel: detail remains, since outlines of bodies are alike."""
_ZOOMS, _MOVES, _MOST = (0.0, 0.01, 0.02, 0.04), (-0.02, -0.01, -0.005, 0.005, 0.01, 0.02), 0.05
"""Shares cut from all sides at first, changes then tried on each side, and the largest share."""
_N = 8
"""Words of a question's n-grams."""


_COSINES = np.cos(np.pi * np.arange(1, _BITS + 1)[:, None] * (np.arange(_SIDE) + 0.5) / _SIDE).astype(np.float32)
"""f32[16, 64]: the lowest frequencies of the discrete cosine transform (II), without the constant one."""


def exact_hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def perceptual_hashes(data: bytes) -> np.ndarray | None:
    """u64[2, 4]: 256 bits of the image as it is, and cropped by 2 % on each side; None if it cannot be decoded,
    or is of one shade, as the outer slices of a volume are: all of those look alike.

    Signs of the cosine transform of the luminance: size, encoding, colour, brightness and contrast hardly change them.
    """
    grey = _grey(data)
    if grey is None or np.ptp(_small(grey, (0.0,) * 4)) < _SHADE:
        return None
    return np.stack([_hash(grey, crop) for crop in _CROPS])


def _grey(data: bytes) -> Image.Image | None:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format == "JPEG":  # decoded at a fraction of its size, from its own frequencies
            image.draft("L", (4 * _SIDE, 4 * _SIDE))
            return image.convert("L")
        return Image.fromarray(decode_image(data, 4 * _SIDE)).convert("L")
    except (ImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _small(grey: Image.Image, cut: tuple[float, ...]) -> np.ndarray:
    """f32[64, 64] without the shares cut from left, top, right and bottom."""
    width, height = grey.size
    left, top, right, bottom = cut
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    return np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BOX, box=box), np.float32)


def _hash(grey: Image.Image, crop: float) -> np.ndarray:
    spectrum = _COSINES @ _small(grey, (crop,) * 4) @ _COSINES.T
    return np.packbits(spectrum.ravel() > 0).view(np.uint64)


def likeness(data: bytes, other: bytes) -> float:
    """Correlation of two images' details, at the crop of either (5 % a side at most) that fits best; 0 if one cannot
    be decoded or has no detail. Takes about 20 ms, so it is for pairs whose hashes are near."""
    one, two = _grey(data), _grey(other)
    return 0.0 if one is None or two is None else max(_best_fit(one, two), _best_fit(two, one))


def _best_fit(whole: Image.Image, part: Image.Image) -> float:
    """The best correlation of `part` with a crop of `whole`, by trial and descent, a side at a time."""
    wanted = _detail(part, (0.0,) * 4)

    def fit(cut: tuple[float, ...]) -> float:
        return float((wanted * _detail(whole, cut)).sum())

    best, cut = max((fit((zoom,) * 4), (zoom,) * 4) for zoom in _ZOOMS)
    for side in (*range(4), *range(4)):
        for move in _MOVES:
            tried = (*cut[:side], round(cut[side] + move, 3), *cut[side + 1 :])
            if 0 <= tried[side] <= _MOST and (score := fit(tried)) > best:
                best, cut = score, tried
    return best


def _detail(grey: Image.Image, cut: tuple[float, ...]) -> np.ndarray:
    """f32[64, 64] of length 1: each pixel minus the mean around it; zeros for an even image."""
    small = _small(grey, cut)
    sums = np.pad(np.pad(small, _AROUND // 2, mode="edge").cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    n = _AROUND
    detail = small - (sums[n:, n:] - sums[:-n, n:] - sums[n:, :-n] + sums[:-n, :-n]) / n**2
    detail -= detail.mean()
    length = np.linalg.norm(detail)
    return detail / length if length > 1 else np.zeros_like(detail)


def distances(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """i64[n, m]: bits that differ, of u64[n, 4] and u64[m, 4]."""
    return np.bitwise_count(hashes[:, None] ^ others[None]).sum(-1, dtype=np.int64)


def normalised(question: str) -> list[str]:
    """Words in lower case without accents, punctuation and invisible characters (soft hyphens, as in PDFs); a Chinese
    character is a word."""
    letters = unicodedata.normalize("NFKD", question.casefold())
    plain = "".join(c for c in letters if not unicodedata.combining(c) and unicodedata.category(c) != "Cf")
    return re.findall(
        r"[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]+", plain
    )


def ngrams(question: str) -> set[str]:
    """All runs of 8 words; a shorter question is one run, so that it matches only itself."""
    words = normalised(question)
    return {" ".join(words[i : i + _N]) for i in range(max(1, len(words) - _N + 1))} if words else set()
