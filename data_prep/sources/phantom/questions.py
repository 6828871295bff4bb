"""The questions about a phantom: fifteen templates, yes/no, choice of four, short closed and open.

Whatever a wording reveals is independent of its answer, so that a model without the image can only guess.
"""

from __future__ import annotations

import numpy as np

from data_prep.sources.phantom.scene import MODALITIES, ORGANS, QUADRANTS, SHAPES, Scene
from data_prep.sources.procedural import Question, yes_or_no

WORDINGS: dict[str, tuple[str, ...]] = {
    "presence": ("Is there a lesion?", "Does this image show a lesion?", "Can a lesion be seen?"),
    "several": ("Is there more than one lesion?", "Are there several lesions?", "Does the image show several lesions?"),
    "side_check": ("Is the lesion on the left?", "Does the lesion lie on the left side?", "Is the left side affected?"),
    "intensity_check": ("Is the lesion bright?", "Does the lesion look bright?", "Does the lesion appear bright?"),
    "organ_check": ("Is the {} shown?", "Does this image show the {}?", "Is this an image of the {}?"),
    "modality": ("Which modality is this?", "How was this image taken?", "What kind of image is this?"),
    "organ": ("Which organ is shown?", "What does this image show?", "Which part of the body is this?"),
    "shape": ("What is the shape of the lesion?", "Which shape does the lesion have?", "How is the lesion shaped?"),
    "quadrant": ("Where is the lesion?", "In which quadrant is the lesion?", "Which quadrant is affected?"),
    "side": ("On which side is the lesion?", "Is the lesion on the left or right?", "Which side is affected?"),
    "size": ("What size is the lesion?", "Is the lesion small or large?", "How large is the lesion, small or large?"),
    "intensity": ("Is the lesion bright or dark?", "How does the lesion look, bright or dark?"),
    "count": ("How many lesions are there?", "How many lesions are seen?", "What is the number of lesions?"),
    "describe": ("Describe the lesion.", "What does the lesion look like?", "How would you describe the lesion?"),
    "place": ("Where is the lesion located?", "What is the location of the lesion?", "Which region is affected?"),
}
OPTIONS = {"modality": MODALITIES, "organ": ORGANS, "shape": SHAPES, "quadrant": QUADRANTS}


def ask(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of each template that fits: those on a lesion's attributes want exactly one lesion.

    Where there is one, general questions are left out more often than not: other images have them in plenty.
    """
    claimed_organ = scene.organ
    if rng.random() < 0.5:
        others = [organ for organ in ORGANS if organ != scene.organ]
        claimed_organ = others[rng.integers(len(others))]
    questions = [
        _question("presence", "yes_no", yes_or_no(scene.count > 0), rng),
        _question("several", "yes_no", yes_or_no(scene.count > 1), rng),
        _question("organ_check", "yes_no", yes_or_no(claimed_organ == scene.organ), rng, claimed_organ),
        _question("modality", "choice", scene.modality, rng),
        _question("organ", "choice", scene.organ, rng),
        _question("count", "closed", str(scene.count), rng),
    ]
    if scene.count != 1:
        return questions
    questions = [question for question in questions if rng.random() < 0.3]
    return [
        *questions,
        _question("side_check", "yes_no", yes_or_no(scene.only.side == "left"), rng),
        _question("intensity_check", "yes_no", yes_or_no(scene.intensity == "bright"), rng),
        _question("shape", "choice", scene.shape, rng),
        _question("quadrant", "choice", scene.only.quadrant, rng),
        _question("side", "closed", scene.only.side, rng),
        _question("size", "closed", scene.size, rng),
        _question("intensity", "closed", scene.intensity, rng),
        _question("describe", "open", description(scene), rng),
        _question("place", "open", f"{scene.only.quadrant} {scene.organ}", rng),
    ]


def description(scene: Scene) -> str:
    """All attributes of the one lesion, as the gold answer of `describe`."""
    return f"{scene.size} {scene.intensity} {scene.shape} lesion in the {scene.only.side} {scene.organ}"


def _question(template: str, kind: str, answer: str, rng: np.random.Generator, claim: str = "") -> Question:
    wordings = WORDINGS[template]
    text = wordings[rng.integers(len(wordings))].format(claim)
    return Question(template, kind, text, answer, OPTIONS.get(template, ()))
