"""Chains of thought as sampled, and the reflective patterns that are built from several of them.

All that a pattern states was sampled; only the joints are ours:
`corrected`     a rejected chain, doubt, then one that reaches the answer;
`verified`      two chains, drawn independently, that reach the same answer;
`reexamined`    a chain, then what the model says when it is asked to look at the image again, if it reaches it too.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal

from data_prep.llm import Reply
from infimed_jax.data.sample import Question
from infimed_jax.evaluation.answers import answer_of, gold_value, matches
from infimed_jax.rl.rewards.verifiable import CLOSE_TAG, OPEN_TAG, well_formed

Pattern = Literal["plain", "corrected", "verified", "reexamined"]
REFLECTIVE: tuple[Pattern, ...] = ("corrected", "verified", "reexamined")

_DOUBT = {
    "en": (
        "That would mean {wrong}. Wait, I should check this against the image before I settle on it.",
        "So far this points to {wrong}. But does the image bear it out? Let me go through it again.",
        "This leads to {wrong}. Hold on: let me look at the image again.",
    ),
    "zh": (
        "由此得出{wrong}。等等，我应该先对照影像再下结论。",
        "到目前为止指向{wrong}。但影像支持吗？让我重新看一遍。",
    ),
}
_CORRECTION = {
    "en": ("So it is {right}, not {wrong}.", "My first conclusion, {wrong}, was wrong: it is {right}."),
    "zh": ("所以应为{right}，而不是{wrong}。", "最初的结论{wrong}有误，应为{right}。"),
}
_VERIFY = {
    "en": ("Let me verify this by starting over.", "To be sure, let me go through it a second time."),
    "zh": ("让我从头再推一遍来验证。", "为确认起见，再推理一次。"),
}
_AGREEMENT = {
    "en": ("Both ways lead to {right}.", "The second pass confirms {right}."),
    "zh": ("两次推理都得出{right}。", "第二遍证实为{right}。"),
}
_LOOK = {
    "en": ("Let me look at the image again.", "Before I answer, back to the image once more."),
    "zh": ("让我再看一遍影像。", "回答之前，再回到影像确认一次。"),
}
_HOLDS = {"en": ("So {right} holds.", "The image supports {right}."), "zh": ("因此{right}成立。", "影像支持{right}。")}


@dataclass(frozen=True)
class Chain:
    """One drawn reply in the asked form, with an answer."""

    draw: int
    thoughts: str
    answer: str
    """As parsed."""


@dataclass(frozen=True)
class Made:
    """A chain of thought for one question."""

    pattern: Pattern
    reasoning: str
    draws: tuple[int, ...]


def read_chain(reply: Reply, draw: int, sample: Question) -> tuple[Chain | None, str]:
    """The reply's chain and why it is rejected; the empty reason accepts it. Without the asked form there is no chain.

    A reply that the limit cut is no answer, whatever it holds.
    """
    if reply.finish == "length":
        return None, "cut by the limit"
    if reply.finish == "content_filter":
        return None, "refused by the endpoint's filter"
    text = reply.whole
    if not well_formed(text):
        return None, "not in the asked form"
    parsed = answer_of(sample, text)
    if parsed.value is None:
        return None, "no answer of the question's kind"
    thoughts = text[text.index(OPEN_TAG) + len(OPEN_TAG) : text.index(CLOSE_TAG)].strip()
    return Chain(draw, thoughts, parsed.value), "" if matches(parsed, sample) else "wrong answer"


def corrected(sample: Question, wrong: Chain, right: Chain, language: str, rng: random.Random) -> Made:
    return _join("corrected", (wrong, right), (_DOUBT, _CORRECTION), sample, language, rng)


def verified(sample: Question, first: Chain, second: Chain, language: str, rng: random.Random) -> Made:
    return _join("verified", (first, second), (_VERIFY, _AGREEMENT), sample, language, rng)


def reexamined(sample: Question, chain: Chain, look: Chain, language: str, rng: random.Random) -> Made:
    return _join("reexamined", (chain, look), (_LOOK, _HOLDS), sample, language, rng)


def _join(
    pattern: Pattern,
    chains: tuple[Chain, Chain],
    joints: tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]],
    sample: Question,
    language: str,
    rng: random.Random,
) -> Made:
    """First thoughts, a turn, second thoughts, a conclusion."""
    names = {"wrong": spoken(chains[0].answer, sample), "right": spoken(gold_value(sample), sample)}
    turn, end = (
        re.sub(r"\{(right|wrong)\}", lambda match: names[match[1]], rng.choice(joint[language])) for joint in joints
    )
    reasoning = "\n\n".join((chains[0].thoughts, turn, chains[1].thoughts, end))
    return Made(pattern, reasoning, tuple(chain.draw for chain in chains))


def spoken(value: str, sample: Question) -> str:
    """An answer inside a sentence: a choice's letter with its option's text."""
    if sample.kind == "choice":
        return f"{value} ({sample.options[ord(value) - ord('A')]})"
    if sample.kind == "yes_no" and sample.meta.get("language") == "zh":
        return {"yes": "是", "no": "否"}[value]
    return value


def holds(sample: Question, made: Made) -> bool:
    """Whether the built reply passes the very checks that its parts have passed."""
    text = boxed(made.reasoning, sample.answer)
    return well_formed(text) and matches(answer_of(sample, text), sample)


def boxed(thoughts: str, answer: str) -> str:
    """The asked form of a reply."""
    return f"{OPEN_TAG}{thoughts}{CLOSE_TAG}\\boxed{{{answer}}}"
