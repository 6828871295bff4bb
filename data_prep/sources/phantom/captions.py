"""Captions of phantoms: two sentences, the view and the findings, that state every attribute."""

from __future__ import annotations

import numpy as np

from data_prep.sources.phantom.scene import Scene

_ARTICLE = {"CT": "a", "MRI": "an", "X-ray": "an", "microscopy": "a"}

_VIEW = ("This is {a} {modality} image of the {organ}.", "The {organ}, seen in {a} {modality} image.")
_NONE = ("No lesion is seen.", "No lesion is seen.")
_ONE = (
    "There is one {size} {intensity} {shape} lesion in the {places}.",
    "One lesion is seen in the {places}: it is {size}, {intensity} and {shape}.",
)
_SEVERAL = (
    "There are {count} {size} {intensity} {shape} lesions, in the {places}.",
    "{count} lesions are seen in the {places}: they are {size}, {intensity} and {shape}.",
)
WORDINGS = len(_VIEW)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    wording = rng.integers(WORDINGS)
    return f"{view(scene, wording)} {findings(scene, rng.integers(WORDINGS))}"


def view(scene: Scene, wording: int = 0) -> str:
    """The sentence that names modality and organ."""
    return _VIEW[wording].format(a=_ARTICLE[scene.modality], modality=scene.modality, organ=scene.organ)


def findings(scene: Scene, wording: int = 0) -> str:
    """The sentence that says how many lesions there are, where, and how they look."""
    quadrants = [lesion.quadrant for lesion in scene.lesions]
    return (_NONE, _ONE, _SEVERAL)[scene.count][wording].format(
        count=scene.count,
        size=scene.size,
        intensity=scene.intensity,
        shape=scene.shape,
        places=" and ".join(quadrants),
    )
