"""Drawing with signed distances: anti-aliased shapes on NumPy images, for the procedural sources.

Coordinates run from 0 to 1, x to the right and y downwards; a shape is its coverage f32[S,S] in [0,1].
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image

SIDE = 96
"""Pixels of a drawn image's side."""


@lru_cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    centres = ((np.arange(SIDE) + 0.5) / SIDE).astype(np.float32)
    return centres[None, :], centres[:, None]


def edge(distance: np.ndarray, blur: float = 1.0) -> np.ndarray:
    """Coverage from a signed distance (negative inside); `blur` is the edge's width in pixels."""
    return np.clip(0.5 - distance * (SIDE / blur), 0, 1)


def _turned(x: float, y: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    across, down = _grid()
    dx, dy = across - x, down - y
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return dx * cos + dy * sin, dy * cos - dx * sin


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0, blur: float = 1.0) -> np.ndarray:
    """A filled ellipse; the distance is exact for circles and close near the edge otherwise."""
    u, v = _turned(x, y, angle)
    scaled = np.hypot(u / rx, v / ry)
    slope = np.maximum(np.hypot(u / rx**2, v / ry**2), 1e-6)
    return edge(scaled * (scaled - 1) / slope, blur)


def ring(x: float, y: float, rx: float, ry: float, width: float, blur: float = 1.0) -> np.ndarray:
    """The band between an ellipse and the one `width` smaller."""
    return ellipse(x, y, rx, ry, 0.0, blur) - ellipse(x, y, rx - width, ry - width, 0.0, blur)


def box(x: float, y: float, half_width: float, half_height: float, angle: float = 0.0, blur: float = 1.0) -> np.ndarray:
    """A filled rectangle about its centre."""
    u, v = _turned(x, y, angle)
    return edge(np.maximum(np.abs(u) - half_width, np.abs(v) - half_height), blur)


def star(x: float, y: float, radius: float, depth: float, points: int, angle: float, blur: float = 1.0) -> np.ndarray:
    """A lobed shape: its radius swings by the share `depth` around `radius`, `points` times a turn."""
    u, v = _turned(x, y, angle)
    wave = 1 + np.float32(depth) * np.cos(points * np.arctan2(v, u))
    return edge(np.hypot(u, v) - radius * wave, blur)


def polygon(x: float, y: float, radius: float, corners: int, angle: float = 0.0, blur: float = 1.0) -> np.ndarray:
    """A regular polygon with a corner at the top when `angle` is 0."""
    u, v = _turned(x, y, angle)
    normals = np.pi / 2 + 2 * np.pi * (np.arange(corners) + 0.5) / corners
    sides = [-u * np.float32(np.cos(n)) - v * np.float32(np.sin(n)) for n in normals]
    return edge(np.max(sides, axis=0) - radius * np.cos(np.pi / corners), blur)


def paint(image: np.ndarray, coverage: np.ndarray, value: float | np.ndarray) -> None:
    """Lay `value` (a grey, a colour f32[C], or an image of values) over `image` in place, by coverage."""
    if image.ndim == 3:
        coverage = coverage[..., None]
    image += coverage * (np.asarray(value, np.float32) - image)


def smooth_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Soft random texture f32[S,S] of about unit spread: `cells` independent values a side, interpolated smoothly."""
    coarse = rng.standard_normal((cells + 1, cells + 1)).astype(np.float32)
    at = np.arange(SIDE, dtype=np.float32) * cells / SIDE
    left = at.astype(int)
    mix = at - left
    mix = mix * mix * (3 - 2 * mix)
    weights = np.zeros((SIDE, cells + 1), np.float32)
    weights[np.arange(SIDE), left] = 1 - mix
    weights[np.arange(SIDE), left + 1] = mix
    return weights @ coarse @ weights.T


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of f32[S,S] or f32[S,S,3] with values in [0,1]."""
    buffer = io.BytesIO()
    Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
