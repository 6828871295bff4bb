"""The reflective turn that procedural reasoning has: what one would say unseen, then a second look at the image.

The first guess is the same for every image, so it is right by chance alone and no short cut to the answer; the second
look corrects or confirms it. What it states is true, and the boxed answer follows from that.
"""

from __future__ import annotations

from dataclasses import replace

from data_prep.sources.procedural import Question


def reflect(question: Question, answer: str, guess: str, evidence: str) -> Question:
    """The question with its reasoning, and in `reflection` whether the first guess was corrected or confirmed.

    `answer` is what is guessed at, `evidence` the true statement that settles it, without a full stop.
    """
    reasoning = f"At first glance: {guess}. Wait, let me look again: {evidence}."
    return replace(question, reasoning=reasoning, reflection="confirmed" if guess == answer else "corrected")
