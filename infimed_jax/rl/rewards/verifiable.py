"""What a completion earns: the answer, through the one answer grammar, and the form it was asked for.

The published reward is 0.9 accuracy + 0.1 format. Both are all or nothing, and a truncated reply earns neither, so
that a cut-off chain of thought is never taken for an answer. `tests/rl/test_rewards.py` holds the table of attacks.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from infimed_jax import config
from infimed_jax.evaluation.answers import answer_of, matches
from infimed_jax.rl.rewards import Attempt, Reward

OPEN_TAG, CLOSE_TAG = "<think>", "</think>"
_FORM = re.compile(r"\s*<think>(?P<thoughts>.*)</think>\s*\\boxed\{(?P<answer>.*)\}\.?\s*", re.DOTALL)
_HIDDEN = ("Cc", "Cf", "Co", "Cs", "Cn")
"""Unicode categories without a glyph: controls, zero-width and direction marks, private, surrogate, unassigned."""


def reward(attempts: Sequence[Attempt], grpo: config.Grpo) -> list[Reward]:
    return [score(attempt, grpo) for attempt in attempts]


def score(attempt: Attempt, grpo: config.Grpo) -> Reward:
    """`accuracy` is 1 where the answer is right, `format` 1 where the reply has the asked form, otherwise 0."""
    sample, finished = attempt.sample, attempt.finished
    parsed = answer_of(sample, attempt.reply, finished)
    accuracy = float(finished and parsed.status == "ok" and matches(parsed, sample))
    form = float(finished and well_formed(attempt.reply))
    total = grpo.accuracy_weight * accuracy + grpo.format_weight * form
    return Reward(total, {"accuracy": accuracy, "format": form})


def well_formed(reply: str) -> bool:
    """Exactly one `<think>…</think>`, then exactly one `\\boxed{…}`, and nothing else but blanks and a full stop.

    Thoughts and answer must hold a letter or a digit, and the reply nothing invisible.
    """
    if reply.count(OPEN_TAG) != 1 or reply.count(CLOSE_TAG) != 1:
        return False
    if any(unicodedata.category(c) in _HIDDEN and c not in "\n\r\t" for c in reply):
        return False
    form = _FORM.fullmatch(reply)
    if form is None or "\\boxed" in form["answer"] or not _balanced(form["answer"]):
        return False
    return any(map(str.isalnum, form["thoughts"])) and any(map(str.isalnum, form["answer"]))


def _balanced(text: str) -> bool:
    """Whether braces close in order, so that the box ends at the last one and not before."""
    depth = 0
    for c in text:
        depth += (c == "{") - (c == "}")
        if depth < 0:
            return False
    return depth == 0
