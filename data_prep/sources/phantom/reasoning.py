"""Reasoning about a phantom: what is guessed at first, and the true statement that settles each question."""

from __future__ import annotations

import numpy as np

from data_prep.sources.phantom.captions import places
from data_prep.sources.phantom.questions import description
from data_prep.sources.phantom.scene import COUNT_CHANCES, INTENSITIES, SIDES, SIZES, Scene
from data_prep.sources.procedural import Question
from data_prep.sources.second_look import reflect

_MODALITY_LOOK = {
    "CT": "bone is white in a thin slice",
    "MRI": "soft tissue is clear and bone is dark",
    "X-ray": "the whole body is seen through",
    "microscopy": "small stained cells are seen",
}
_ORGAN_LOOK = {
    "lung": "there are two lungs in the chest",
    "brain": "the skull is around the brain",
    "kidney": "there are two kidneys beside the spine",
    "tissue": "there is tissue with many cells",
}
_SHAPE_LOOK = {
    "round": "the outline is a circle",
    "oval": "it is longer than wide",
    "irregular": "the outline is uneven",
    "ring-shaped": "the centre is hollow",
}
_SIZE_LOOK = {"small": "the lesion takes little space", "large": "the lesion takes much space"}
_WRONG = {"side": SIDES, "size": SIZES, "intensity": INTENSITIES, "count": tuple(map(str, range(len(COUNT_CHANCES))))}


def think(scene: Scene, question: Question, rng: np.random.Generator) -> Question:
    """The question with its reasoning, and in `reflection` whether the first guess was corrected or confirmed."""
    answer, alternatives = _short_answer(scene, question)
    return reflect(question, answer, alternatives, evidence(scene, question.template), rng)


def _short_answer(scene: Scene, question: Question) -> tuple[str, list[str]]:
    """What is guessed at first (for a description only the size), and what it might be instead."""
    if question.template == "describe":
        answer, values = scene.size, SIZES
    elif question.template == "place":
        answer, values = scene.only.side, SIDES
    elif question.kind == "yes_no":
        answer, values = question.answer, ("yes", "no")
    else:
        answer, values = question.answer, question.options or _WRONG[question.template]
    return answer, [value for value in values if value != answer]


def evidence(scene: Scene, template: str) -> str:
    """The true statement that settles the question."""
    if template in ("presence", "several", "count"):
        number = f"are {scene.count} lesions" if scene.count > 1 else "is one lesion" if scene.count else "is no lesion"
        return f"there {number}, {places(scene)}" if template == "count" and scene.count else f"there {number}"
    if template in ("organ", "organ_check"):
        return _ORGAN_LOOK[scene.organ]
    if template == "modality":
        return _MODALITY_LOOK[scene.modality]
    if template == "shape":
        return _SHAPE_LOOK[scene.shape]
    if template == "size":
        return _SIZE_LOOK[scene.size]
    if template in ("intensity", "intensity_check"):
        return f"the lesion is {scene.intensity}er than the {scene.organ}"
    if template == "describe":
        return f"it is a {description(scene)}"
    return f"the lesion is in the {scene.only.quadrant} {scene.organ}"
