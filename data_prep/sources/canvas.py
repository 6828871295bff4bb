"""Drawing with signed distances: anti-aliased shapes on NumPy images, for the procedural sources.

Coordinates run from 0 to 1, x to the right and y downwards; a shape is its coverage f32[S,S] in [0,1].
"""

from __future__ import annotations

import io
import math
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


_ALL = slice(None)


def _turned(
    x: float, y: float, angle: float, rows: slice = _ALL, columns: slice = _ALL
) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres in the frame of a shape at (x, y), turned by `angle`."""
    across, down = _grid()
    dx, dy = across[:, columns] - np.float32(x), down[rows] - np.float32(y)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return dx * cos + dy * sin, dy * cos - dx * sin


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0, blur: float = 1.0) -> np.ndarray:
    """A filled ellipse; the distance is exact for circles and close near the edge otherwise."""
    reach = max(rx, ry) + blur / SIDE
    rows, columns = _span(y, reach), _span(x, reach)  # most are small: computing only there is five times faster
    u, v = _turned(x, y, angle, rows, columns)
    scaled = np.hypot(u / rx, v / ry)
    slope = np.maximum(np.hypot(u / rx**2, v / ry**2), 1e-6)
    coverage = np.zeros((SIDE, SIDE), np.float32)
    coverage[rows, columns] = edge(scaled * (scaled - 1) / slope, blur)
    return coverage


def _span(centre: float, reach: float) -> slice:
    """The pixels that a shape of this reach may touch, along one axis."""
    low, high = math.floor(SIDE * (centre - reach)) - 1, math.ceil(SIDE * (centre + reach)) + 1
    return slice(min(max(low, 0), SIDE), min(max(high, 0), SIDE))


def ring(x: float, y: float, rx: float, ry: float, width: float, blur: float = 1.0) -> np.ndarray:
    """The band between an ellipse and the one `width` smaller."""
    return ellipse(x, y, rx, ry, 0.0, blur) - ellipse(x, y, rx - width, ry - width, 0.0, blur)


def box(x: float, y: float, half_width: float, half_height: float, angle: float = 0.0, blur: float = 1.0) -> np.ndarray:
    """A filled rectangle about its centre."""
    u, v = _turned(x, y, angle)
    return edge(np.maximum(np.abs(u) - half_width, np.abs(v) - half_height), blur)


def blob(x: float, y: float, radius: float, angle: float, blur: float = 1.0) -> np.ndarray:
    """An irregular outline: uneven lobes, as a third and a fifth harmonic of the radius make them."""
    u, v = _turned(x, y, angle)
    turn = np.arctan2(v, u)
    wave = 1 + np.float32(0.42) * np.cos(3 * turn) + np.float32(0.16) * np.cos(5 * turn + np.float32(1.2))
    return edge(np.hypot(u, v) - radius * wave, blur)


def star(x: float, y: float, radius: float, depth: float, points: int, angle: float) -> np.ndarray:
    """A star with straight edges: its radius falls by the share `depth` between the points; angle 0 points right."""
    u, v = _turned(x, y, angle)
    inner, half = radius * (1 - depth), np.pi / points
    turn = np.abs((np.arctan2(v, u) + half) % (2 * half) - half)  # mirrored into one half of one point
    along, across = np.hypot(u, v) * np.cos(turn), np.hypot(u, v) * np.sin(turn)
    # signed distance from the line between the outer and the inner corner
    ex, ey = inner * np.cos(half) - radius, inner * np.sin(half)
    return edge((across * -ex + (along - radius) * ey) / np.hypot(ex, ey))


def polygon(x: float, y: float, radius: float, corners: int, angle: float = 0.0) -> np.ndarray:
    """A regular polygon with a corner at the top when `angle` is 0."""
    u, v = _turned(x, y, angle)
    normals = np.pi / 2 + 2 * np.pi * (np.arange(corners) + 0.5) / corners
    sides = [-u * np.float32(np.cos(n)) - v * np.float32(np.sin(n)) for n in normals]
    return edge(np.max(sides, axis=0) - radius * np.cos(np.pi / corners))


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
