"""Captions of phantoms: two or three sentences that state every attribute."""

from __future__ import annotations

import numpy as np

from data_prep.sources.phantom.scene import Scene

ARTICLE = {"CT": "a", "MRI": "an", "X-ray": "an", "microscopy": "a"}

_VIEW = ("This is {a} {modality} image of the {organ}.", "The {organ}, seen in {a} {modality} image.")
_NONE = "No lesion is seen."
_ONE = (
    "There is one {size} {intensity} {shape} lesion in the {places}.",
    "One lesion is seen in the {places}: it is {size}, {intensity} and {shape}.",
)
_SEVERAL = (
    "There are {count} {size} {intensity} {shape} lesions, in the {places}.",
    "{count} lesions are seen in the {places}: they are {size}, {intensity} and {shape}.",
)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    view, number = rng.integers(len(_VIEW)), rng.integers(2)
    findings = (_NONE, _ONE[number], _SEVERAL[number])[scene.count]
    return f"{_VIEW[view]} {findings}".format(
        a=ARTICLE[scene.modality],
        modality=scene.modality,
        organ=scene.organ,
        size=scene.size,
        intensity=scene.intensity,
        shape=scene.shape,
        count=scene.count,
        places=places(scene),
    )


def places(scene: Scene) -> str:
    """`upper left, upper right and lower left`."""
    quadrants = [lesion.quadrant for lesion in scene.lesions]
    return " and ".join(filter(None, (", ".join(quadrants[:-1]), *quadrants[-1:])))
