"""The wording in which questions are asked, for tuning, reinforcement learning and evaluation alike.

The strings are MedEvalKit's (`utils/question_formats.py`), the harness of the published InfiMed scores, so that ours
can be compared with them. Two liberties: the newline that starts its choice prompt is the one after the image here,
and options are written `A. text` here, from options without letters, unless a benchmark says how they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

from infimed_jax.data.sample import Chat, Content, Document, Question, QuestionKind, Sample, Turn
from infimed_jax.errors import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUESTION_KINDS = get_args(QuestionKind)

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


Wording = Callable[[Question, bool], str]
"""`(question, reasoning) -> text of the user's turn`; `reasoning` asks for the answer in `\\boxed{}`."""


def question_text(question: Question, reasoning: bool = False, shown: Sequence[str] = ()) -> str:
    """The general wording, in the language `meta["language"]`, English where it is absent.

    `shown`: a choice's options as they are written, a line each, if not as `A. text`.
    Raises UserError for an unknown kind or language, and options that do not fit the kind.
    """
    words = instruction(question, reasoning)
    if question.kind != "choice":
        return f"{question.question}\n{words}"
    layout = _CHOICE_LAYOUT[question.meta.get("language", "en")]
    lines = "\n".join(shown or lettered(question.options))
    return layout.format(question=question.question, options=lines) + "\n" + words


def lettered(options: Sequence[str]) -> list[str]:
    """Options as `A. text`."""
    return [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]


def instruction(question: Question, reasoning: bool) -> str:
    """What the question's kind asks for, in its language. UserError as `question_text`."""
    kind, options, language = question.kind, question.options, question.meta.get("language", "en")
    if (kind, language) not in _INSTRUCTIONS:
        raise UserError(
            f"sample {question.id}: no wording for a question of kind {kind!r} in language {language!r}: "
            f"kinds are {', '.join(QUESTION_KINDS)}, languages en, zh"
        )
    if not question.question.strip():
        raise UserError(f"sample {question.id}: a question of kind {kind} has no text: give one, or leave it out")
    if kind == "choice" and not 2 <= len(options) <= len(LETTERS):
        raise UserError(f"sample {question.id}: a choice needs 2 to {len(LETTERS)} options, not {len(options)}")
    if kind != "choice" and options:
        raise UserError(f"sample {question.id}: a question of kind {kind} takes no options, but has {len(options)}")
    return _INSTRUCTIONS[kind, language][reasoning]


def exchange(
    question: Question, reasoning: bool, image: bool = True, wording: Wording = question_text
) -> tuple[Turn, ...]:
    """The question as turns: its system text if any, images and wording, and the gold answer.

    With `reasoning` the answer is boxed, after the thoughts that the question carries. `image=False` is the blind
    control: no image and no place for one.
    """
    content = with_images(wording(question, reasoning), len(question.images) if image else 0)
    answer = f"\\boxed{{{question.answer}}}" if reasoning else question.answer
    reply = Turn("assistant", (answer,), question.reasoning if reasoning else "")
    system = (Turn("system", (question.system,)),) if question.system else ()
    return (*system, Turn("user", content), reply)


def as_turns(sample: Sample) -> tuple[Turn, ...]:
    """The sample as it is trained on; a document's chunks are turns of role `document`."""
    if isinstance(sample, Document):
        return tuple(Turn("document", chunk) for chunk in sample.chunks)
    return sample.turns if isinstance(sample, Chat) else exchange(sample, bool(sample.reasoning))


def with_images(text: str, images: int) -> Content:
    """One image stands before the text; several are each introduced by their number."""
    if images == 0:
        return (text,)
    if images == 1:
        return (0, "\n" + text)
    numbered = tuple(piece for i in range(images) for piece in (f"<image_{i + 1}>: ", i))
    return (*numbered, "\n" + text)
