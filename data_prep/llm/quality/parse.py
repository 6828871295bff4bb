"""A rater's reply to a rating: read tolerantly, then checked by a strict schema. What is missing stays missing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from data_prep.llm.quality.rubric import DIMENSIONS
from infimed_jax.evaluation.answers import after_thinking


class Score(BaseModel):
    """One dimension: a whole number from 1 to 5, never null, never text, and the rater's reason."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    score: Annotated[StrictInt, Field(ge=1, le=5)]
    comment: StrictStr


LONGEST = 50_000
"""Characters of a reply that is read at all."""

Rating = dict[str, Score]
"""By the dimension's key, in the rubric's order."""


@dataclass(frozen=True)
class Outcome:
    """What became of one drawn sample."""

    source: str
    id: str
    rating: Rating | None
    reason: str = ""
    """Why there is no rating; a fixed phrase."""
    cut: bool = False
    """The rater saw the beginning of its text only."""


class BadReply(ValueError):
    """A reply that is no rating; the message is a fixed phrase and holds nothing of the reply."""


def parse_rating(reply: str) -> Rating:
    """All six dimensions, wherever in the reply their objects stand: fenced, in prose, or in an object never closed.

    Raises BadReply: a dimension has no score, no valid one, or two that differ.
    """
    text = after_thinking(reply)
    if text is None:
        raise BadReply("thoughts without an end")
    if len(text) > LONGEST:
        raise BadReply("reply too long")
    return {dimension.key: _score(text, (dimension.key, dimension.other_key)) for dimension in DIMENSIONS}


def _score(text: str, names: tuple[str, str]) -> Score:
    found = [value for name in names if name for value in _values(text, name)]
    if not found:
        raise BadReply("no score for a dimension")
    try:
        scores = [Score.model_validate(value) for value in found]
    except ValidationError:
        raise BadReply("a score is no whole number from 1 to 5, or lacks its comment") from None
    if len({score.score for score in scores}) > 1:
        raise BadReply("several scores for a dimension")
    return scores[-1]


def _values(text: str, name: str) -> list[Any]:
    """The JSON values that stand after the key; one that was cut, or is none, is left out."""
    words = r"[\s_]*".join(map(re.escape, name.split()))
    values = []
    for key in re.finditer(rf'"\s*{words}\s*"\s*:\s*', text, re.IGNORECASE):
        for rest in (text[key.end() :], _TRAILING.sub(r"\1", text[key.end() :], count=1)):
            try:
                values.append(_DECODER.raw_decode(rest)[0])
                break
            except (ValueError, RecursionError):
                continue
    return values


_DECODER = json.JSONDecoder(strict=False)  # raters put bare newlines into strings
_TRAILING = re.compile(r",(\s*\})")  # `{"score": 4, "comment": "…",}`: raters that think in Python
