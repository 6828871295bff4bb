"""What one phantom image shows: a modality, an organ, and up to two alike lesions, in opposite quadrants.

Left and right are the image's, as a viewer sees them, not the patient's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Modality = Literal["CT", "MRI", "X-ray", "microscopy"]
Organ = Literal["lung", "brain", "kidney", "tissue"]
MODALITIES: tuple[Modality, ...] = ("CT", "MRI", "X-ray", "microscopy")
ORGANS: tuple[Organ, ...] = ("lung", "brain", "kidney", "tissue")
SIZES = ("small", "large")
INTENSITIES = ("dark", "bright")
SHAPES = ("round", "oval", "irregular", "ring-shaped")
SIDES = ("left", "right")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
RADIUS = {"small": 0.075, "large": 0.125}
"""In image sides: 3.6 and 6 pixels where the model sees 48."""
COUNT_CHANCES = (0.2, 0.6, 0.2)
"""Chances of 0, 1 and 2 lesions: most questions want exactly one."""
TAKEN = (((),), ((0,), (1,), (2,), (3,)), ((0, 3), (1, 2)))
"""Quadrants by count: two lesions lie across the centre from each other, where large ones cannot touch."""


@dataclass(frozen=True)
class View:
    """Where lesions lie in a modality's picture of an organ: offsets from the centre, and how far they stray."""

    x: float
    y: float
    stray_x: float
    stray_y: float


VIEWS: dict[tuple[Modality, Organ], View] = {
    ("CT", "lung"): View(0.2, 0.15, 0.025, 0.012),
    ("X-ray", "lung"): View(0.2, 0.155, 0.025, 0.015),
    ("CT", "brain"): View(0.162, 0.155, 0.02, 0.015),
    ("MRI", "brain"): View(0.162, 0.155, 0.02, 0.015),
    ("MRI", "kidney"): View(0.21, 0.15, 0.02, 0.012),
    ("X-ray", "kidney"): View(0.21, 0.15, 0.02, 0.012),
    ("microscopy", "tissue"): View(0.22, 0.22, 0.06, 0.06),
}
"""Each modality and each organ is a quarter of all images: tissue has one view, the other organs have two."""


@dataclass(frozen=True)
class Lesion:
    x: float
    """Centre, in image sides from the left."""
    y: float
    """From the top."""
    angle: float
    """Radians; without effect if the shape is round or a ring."""

    @property
    def side(self) -> str:
        return SIDES[self.x > 0.5]

    @property
    def quadrant(self) -> str:
        return f"{'lower' if self.y > 0.5 else 'upper'} {self.side}"


@dataclass(frozen=True)
class Scene:
    modality: Modality
    organ: Organ
    size: str
    """Size of all lesions, as shape and intensity are; drawn also where there is no lesion, then without meaning."""
    shape: str
    intensity: str
    """Against the organ around."""
    lesions: tuple[Lesion, ...]
    """In reading order of their quadrants."""
    x: float
    """Centre of the body, in image sides."""
    y: float
    scale: float
    texture: int
    """Seed of anatomy's variation and noise, which do not depend on the lesions."""

    @property
    def count(self) -> int:
        return len(self.lesions)

    @property
    def only(self) -> Lesion:
        """The lesion if there is exactly one; otherwise ValueError."""
        (lesion,) = self.lesions
        return lesion


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene. Attributes are independent of each other, but for an organ's choice of modalities."""
    organ = ORGANS[rng.integers(len(ORGANS))]
    modalities = [m for m, o in VIEWS if o == organ]
    modality = modalities[rng.integers(len(modalities))]
    view = VIEWS[modality, organ]
    x, y = 0.5 + rng.uniform(-0.02, 0.02, 2)
    taken = TAKEN[rng.choice(len(COUNT_CHANCES), p=COUNT_CHANCES)]
    quadrants = taken[rng.integers(len(taken))]
    scale = rng.uniform(0.96, 1.04)
    lesions = tuple(
        Lesion(
            x=_short(x + scale * ((2 * (q % 2) - 1) * view.x + rng.uniform(-view.stray_x, view.stray_x))),
            y=_short(y + scale * ((2 * (q // 2) - 1) * view.y + rng.uniform(-view.stray_y, view.stray_y))),
            angle=_short(rng.uniform(0, np.pi)),
        )
        for q in quadrants
    )
    return Scene(
        modality=modality,
        organ=organ,
        size=SIZES[rng.integers(len(SIZES))],
        shape=SHAPES[rng.integers(len(SHAPES))],
        intensity=INTENSITIES[rng.integers(len(INTENSITIES))],
        lesions=lesions,
        x=_short(x),
        y=_short(y),
        scale=_short(scale),
        texture=int(rng.integers(2**31)),
    )


def _short(value: float) -> float:
    """Four decimals: a hundredth of a pixel, and readable annotations."""
    return round(float(value), 4)
