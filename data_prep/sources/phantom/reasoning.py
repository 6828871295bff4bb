"""Reasoning about a phantom: what is guessed at first, and the true statement that settles each question."""

from __future__ import annotations

import numpy as np

from data_prep.sources.phantom.captions import findings, look, view
from data_prep.sources.phantom.scene import COUNT_CHANCES, INTENSITIES, SIDES, SIZES, Scene
from data_prep.sources.procedural import Question
from data_prep.sources.second_look import reflect

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
    """The true statement that settles the question, in the captions' own words: what was learnt there is used here."""
    if template in ("organ", "organ_check", "modality"):
        sentence = view(scene)
    elif template in ("intensity", "intensity_check", "size", "shape", "describe"):
        sentence = look(scene)
    else:
        sentence = findings(scene)
    return (sentence[0].lower() + sentence[1:]).removesuffix(".")
