"""Captions of phantoms: the view, how many lesions there are and where, and how they look."""

from __future__ import annotations

import numpy as np

from data_prep.sources.phantom.scene import Scene

_ARTICLE = {"CT": "a", "MRI": "an", "X-ray": "an", "microscopy": "a"}

_VIEW = ("This is {a} {modality} image of the {organ}.", "The {organ}, seen in {a} {modality} image.")
_PLACES = (
    ("There is no lesion.", "No lesion is seen."),
    ("There is one lesion in the {places}.", "One lesion is seen in the {places}."),
    ("There are {count} lesions, in the {places}.", "{count} lesions are seen in the {places}."),
)
"""By the number of lesions."""
_LOOK = ("", "It is {intensity}, {size} and {shape}.", "They are {intensity}, {size} and {shape}.")
WORDINGS = len(_VIEW)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    sentences = view(scene, rng.integers(WORDINGS)), findings(scene, rng.integers(WORDINGS)), look(scene)
    return " ".join(filter(None, sentences))


def view(scene: Scene, wording: int = 0) -> str:
    """The sentence that names modality and organ."""
    return _VIEW[wording].format(a=_ARTICLE[scene.modality], modality=scene.modality, organ=scene.organ)


def findings(scene: Scene, wording: int = 0) -> str:
    """The sentence that says how many lesions there are, and where."""
    places = " and ".join(lesion.quadrant for lesion in scene.lesions)
    return _PLACES[scene.count][wording].format(count=scene.count, places=places)


def look(scene: Scene) -> str:
    """The sentence that says how the lesions look; empty where there is none."""
    return _LOOK[scene.count].format(intensity=scene.intensity, size=scene.size, shape=scene.shape)
