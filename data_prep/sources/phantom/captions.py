"""Captions of phantoms: two or three sentences that state every attribute."""

from __future__ import annotations

import numpy as np

from data_prep.sources.phantom.scene import Scene

ARTICLE = {"CT": "a", "MRI": "an", "X-ray": "an", "microscopy": "a"}

_VIEW = (
    "This is {a} {modality} image of the {organ}.",
    "The {organ}, seen in {a} {modality} image.",
    "An image of the {organ}, taken by {modality}.",
)
_NONE = ("There is no lesion.", "No lesion is seen.", "The {organ} looks normal, without a lesion.")
_ONE = (
    "There is one {size} {intensity} {shape} lesion in the {places}.",
    "One lesion is seen in the {places}: it is {size}, {intensity} and {shape}.",
    "A {size} {intensity} lesion lies in the {places}, its shape is {shape}.",
)
_SEVERAL = (
    "There are {count} {size} {intensity} {shape} lesions, in the {places}.",
    "{count} lesions are seen in the {places}. They are {size}, {intensity} and {shape}.",
    "{count} {size} {intensity} lesions lie in the {places}. Their shape is {shape}.",
)
_SIDE = ("", " The {side} {organ} is affected.")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    findings = (_NONE, _ONE)[scene.count] if scene.count < 2 else _SEVERAL
    side = _SIDE[rng.integers(len(_SIDE))] if scene.count == 1 else ""
    wording = f"{_VIEW[rng.integers(len(_VIEW))]} {findings[rng.integers(len(findings))]}{side}"
    return wording.format(
        a=ARTICLE[scene.modality],
        modality=scene.modality,
        organ=scene.organ,
        size=scene.size,
        intensity=scene.intensity,
        shape=scene.shape,
        count=scene.count,
        places=places(scene),
        side=scene.only.side if scene.count == 1 else "",
    )


def places(scene: Scene) -> str:
    """`upper left, upper right and lower left`."""
    quadrants = [lesion.quadrant for lesion in scene.lesions]
    return " and ".join(filter(None, (", ".join(quadrants[:-1]), *quadrants[-1:])))
