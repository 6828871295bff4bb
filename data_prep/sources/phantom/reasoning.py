"""Reasoning about a phantom: what is guessed at first, and the true statement that settles each question."""

from __future__ import annotations

from data_prep.sources.phantom.captions import findings, look, view
from data_prep.sources.phantom.scene import COUNT_CHANCES, INTENSITIES, SIDES, SIZES, Scene
from data_prep.sources.procedural import Question, reflect

_VALUES = {"side": SIDES, "size": SIZES, "intensity": INTENSITIES, "count": tuple(map(str, range(len(COUNT_CHANCES))))}


def think(scene: Scene, question: Question) -> Question:
    """The question with its reasoning, and in `reflection` whether the first guess was corrected or confirmed."""
    answer, guess = _short_answer(scene, question)
    return reflect(question, answer, guess, evidence(scene, question.template))


def _short_answer(scene: Scene, question: Question) -> tuple[str, str]:
    """The attribute that is guessed (for a description only the size), and the guess."""
    if question.template == "describe":
        return scene.size, SIZES[0]
    if question.template == "place":
        return scene.only.side, SIDES[0]
    if question.kind == "yes_no":
        return question.answer, "yes"
    return question.answer, (question.options or _VALUES[question.template])[0]


def evidence(scene: Scene, template: str) -> str:
    """The true statement that settles the question, in the captions' own words: what was learnt there is used here."""
    if template in ("organ", "organ_check", "modality"):
        sentence = view(scene)
    elif template in ("intensity", "intensity_check", "size", "shape", "describe"):
        sentence = look(scene)
    else:
        sentence = findings(scene)
    return (sentence[0].lower() + sentence[1:]).removesuffix(".")
