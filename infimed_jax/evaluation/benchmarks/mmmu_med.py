"""MMMU's five medical subjects (arXiv 2311.16502), with the layout and the reading of replies that MMMU itself has.

MedEvalKit sends `image_1` alone, draws an option at random for a reply that names none (`unread` here), and never
counts an open question as right.
"""

from __future__ import annotations

from collections.abc import Sequence

from infimed_jax.data.prompts import LETTERS, instruction
from infimed_jax.data.sample import Question, QuestionKind
from infimed_jax.evaluation.benchmark import Benchmark, Verdict, written
from infimed_jax.evaluation.medevalkit import boxed, tagged


def in_brackets(options: Sequence[str]) -> list[str]:
    """Options as `(A) text`."""
    return [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]


def _shown(sample: Question) -> Sequence[str]:
    return written(sample) or in_brackets(sample.options)


def _wording(question: Question, reasoning: bool) -> str:
    """Neither "Question:" nor "Options:", and the blanks of its source code before the instruction."""
    options = "".join(f"{line}\n" for line in _shown(question)) + "\n\n" if question.options else ""
    return f"{question.question}\n\n{options}        {instruction(question, reasoning)}"


def _kind(sample: Question) -> QuestionKind:
    """Open questions are asked for a word or phrase."""
    return "choice" if sample.kind == "choice" else "closed"


def _grade(sample: Question, reply: str, finished: bool) -> Verdict:
    if sample.kind != "choice":
        return Verdict(False, "ok" if finished else "truncated", reply, "open MMMU: never right in the harness")
    reply = tagged(reply)
    letter, rule = read_choice(reply if (box := boxed(reply)) is None else box, sample.options)
    if letter is None:
        return Verdict(False, "unread", None, rule)
    return Verdict(letter == sample.answer, "ok" if finished else "truncated", letter, rule)


def read_choice(reply: str, options: Sequence[str]) -> tuple[str | None, str]:
    """The letter that MMMU's parser reads, and by which rule; None where it draws one.

    A letter in brackets, otherwise one between blanks, otherwise the text of an option in a reply of more than five
    words; the one that stands last in the reply.
    """
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "
    places = {letter: reply.rfind(f"({letter})") for letter in LETTERS[: len(options)]}
    rule = "MMMU: letter in brackets"
    if max(places.values()) < 0:
        places, rule = {letter: reply.rfind(f" {letter} ") for letter in places}, "MMMU: letter between blanks"
    if max(places.values()) < 0 and len(reply.split()) > 5:
        texts = zip(places, options, strict=True)
        places, rule = {letter: reply.lower().rfind(text.lower()) for letter, text in texts}, "MMMU: text of an option"
    last = max(places, key=lambda letter: places[letter])
    return (last, rule) if places[last] >= 0 else (None, "MMMU: unread, the harness draws an option")


BENCHMARK = Benchmark(
    "mmmu_med",
    adapters=("mmmu_med",),
    split="validation",
    questions=150,
    shown=_shown,
    wording=_wording,
    medevalkit_kind=_kind,
    medevalkit_images=1,
    grades={"medevalkit-fixed": _grade, "medevalkit-2025-06": _grade},
    groups=("subject",),
    published={"medevalkit-fixed": {"InfiMed-Foundation-1.7B": 0.347, "InfiMed-Foundation-4B": 0.433}},
)
