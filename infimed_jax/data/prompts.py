"""The wording in which questions are asked, for tuning, reinforcement learning and evaluation alike.

The strings are MedEvalKit's (`utils/question_formats.py`), the harness of the published InfiMed scores, so that ours
can be compared with them. Two liberties: the newline that starts its choice prompt is the one after the image here,
and options are written `A. text` by this function, from options without letters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from infimed_jax.data.sample import Kind, Sample, Turn
from infimed_jax.errors import UserError

Language = Literal["en", "zh"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUESTION_KINDS = ("yes_no", "choice", "closed", "open")

# (kind, language): what follows the question, direct and with reasoning.
_INSTRUCTIONS: dict[tuple[str, str], tuple[str, str]] = {
    ("choice", "en"): (
        "Answer with the option's letter from the given choices directly.",
        'Answer with the option\'s letter from the given choices and put the letter in one "\\boxed{}".',
    ),
    ("choice", "zh"): (
        "请直接使用给定选项中的选项字母来回答该问题。",
        '请直接使用给定选项中的选项字母来回答该问题,并将答案包裹在"\\boxed{}"里',
    ),
    ("yes_no", "en"): (
        "Please output 'yes' or 'no'(no extra output).",
        'Please output "yes" or "no" and put the answer in one "\\boxed{}".',
    ),
    ("yes_no", "zh"): (
        "请输出'是'或'否'(不要有任何其它输出)。",
        "请输出'是'或'否'，并将答案放在一个'\\boxed{}'中。",
    ),
    ("closed", "en"): (
        "Answer the question using a single word or phrase.",
        'Answer the question using a single word or phrase and put the answer in one "\\boxed{}".',
    ),
    ("closed", "zh"): (
        "请用一个单词或者短语回答该问题。",
        "请用一个单词或者短语回答该问题，并将答案放在一个'\\boxed{}'中。",
    ),
    ("open", "en"): (
        "Please answer the question concisely.",
        'Please answer the question concisely and put the answer in one "\\boxed{}".',
    ),
    ("open", "zh"): (
        "请简要回答该问题。",
        "请简要回答该问题，并将答案放在一个'\\boxed{}'中。",
    ),
}
_CHOICE_LAYOUT = {"en": "Question: {question}\nOptions: \n{options}", "zh": "问题： {question}\n选项： \n{options}"}


def question_text(
    kind: Kind, question: str, options: Sequence[str] = (), *, reasoning: bool = False, language: Language = "en"
) -> str:
    """The text of the user's turn; `reasoning` asks for the answer in `\\boxed{}`.

    Raises UserError for a kind that is no question, an unknown language, or options that do not fit the kind.
    """
    if (kind, language) not in _INSTRUCTIONS:
        raise UserError(
            f"no wording for a question of kind {kind!r} in language {language!r}: "
            f"kinds are {', '.join(QUESTION_KINDS)}, languages en, zh"
        )
    if not question.strip():
        raise UserError(f"a question of kind {kind} has no text: give one, or leave it out")
    if kind == "choice" and not 2 <= len(options) <= len(LETTERS):
        raise UserError(f"a choice needs 2 to {len(LETTERS)} options, not {len(options)}")
    if kind != "choice" and options:
        raise UserError(f"a question of kind {kind} takes no options, but has {len(options)}")
    instruction = _INSTRUCTIONS[kind, language][reasoning]
    if kind != "choice":
        return f"{question}\n{instruction}"
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return _CHOICE_LAYOUT[language].format(question=question, options=lines) + "\n" + instruction


def question_sample(
    *,
    id: str,
    source: str,
    split: str,
    images: tuple[bytes, ...],
    kind: Kind,
    question: str,
    answer: str,
    options: tuple[str, ...] = (),
    reasoning: str = "",
    with_reasoning: bool = False,
    meta: Mapping[str, str] | None = None,
) -> Sample:
    """A question with its gold answer as one exchange: images and prompt, then the answer.

    `answer` is `yes`/`no`, a choice's letter, or the text. With `with_reasoning` the prompt asks for a boxed answer,
    and the reply is `reasoning` inside the think block, then the boxed answer. The language is `meta["language"]`,
    English where it is absent. Raises UserError for an answer that the kind cannot have.
    """
    meta = dict(meta or {})
    if kind == "yes_no" and answer not in ("yes", "no"):
        raise UserError(f"sample {id}: a yes_no answer must be 'yes' or 'no', not {answer!r}")
    if kind == "choice" and (len(answer) != 1 or answer not in LETTERS[: len(options)]):
        raise UserError(f"sample {id}: a choice's answer must be the letter of one of its options, not {answer!r}")
    if not answer.strip():
        raise UserError(f"sample {id}: a {kind} question needs a gold answer")
    try:
        text = question_text(kind, question, options, reasoning=with_reasoning, language=meta.get("language", "en"))
    except UserError as error:
        raise UserError(f"sample {id}: {error}") from error
    reply = Turn("assistant", (f"\\boxed{{{answer}}}",), reasoning) if with_reasoning else Turn("assistant", (answer,))
    return Sample(
        id=id,
        source=source,
        split=split,
        kind=kind,
        images=images,
        turns=(Turn("user", with_images(text, len(images))), reply),
        question=question,
        options=options,
        answer=answer,
        meta=meta,
    )


def prompt_for(sample: Sample, reasoning: bool, image: bool = True) -> Sample:
    """The same question in direct or reasoning wording, rebuilt from its structured fields.

    `image=False` is the blind control: no image and no place for one; `meta["image_id"]` stays, for clustering.
    The reply is rebuilt to fit the wording; reasoning that the sample carries is kept where it is asked for.
    """
    thoughts = sample.turns[-1].reasoning if sample.turns and sample.turns[-1].role == "assistant" else ""
    rebuilt = question_sample(
        id=sample.id,
        source=sample.source,
        split=sample.split,
        images=sample.images if image else (),
        kind=sample.kind,
        question=sample.question,
        answer=sample.answer,
        options=sample.options,
        reasoning=thoughts,
        with_reasoning=reasoning,
        meta=sample.meta,
    )
    system = tuple(turn for turn in sample.turns if turn.role == "system")
    return replace(rebuilt, turns=system + rebuilt.turns)


def with_images(text: str, images: int) -> tuple[str | int, ...]:
    """One image stands before the text; several are each introduced by their number."""
    if images == 0:
        return (text,)
    if images == 1:
        return (0, "\n" + text)
    numbered = tuple(piece for i in range(images) for piece in (f"<image_{i + 1}>: ", i))
    return (*numbered, "\n" + text)
