"""The reflective turn that procedural reasoning has: a first guess, a second look at the image, then the conclusion.

Half of the guesses are wrong and get corrected, half are right and get confirmed. What the second look states is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data_prep.sources.procedural import Question


def reflect(
    question: Question, answer: str, alternatives: Sequence[str], evidence: str, rng: np.random.Generator
) -> Question:
    """The question with its reasoning, and in `reflection` whether the first guess was corrected or confirmed.

    `answer` is what is guessed at, `alternatives` what it might be instead, `evidence` the true statement that
    settles it, without a full stop.
    """
    corrected = rng.random() < 0.5
    guess = alternatives[rng.integers(len(alternatives))] if corrected else answer
    ending = f"So {answer}, not {guess}." if corrected else f"So {answer} it is."
    letter = f" Option {question.letter}." if question.options else ""
    reasoning = f"At first glance: {guess}. Wait, let me look again: {evidence}. {ending}{letter}"
    return replace(question, reasoning=reasoning, reflection="corrected" if corrected else "confirmed")
