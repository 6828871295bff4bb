"""Prompt wording against literal strings, and the turns built from it."""

from dataclasses import replace

import pytest

from infimed_jax.data.prompts import as_turns, exchange, question_text
from infimed_jax.data.sample import Question, Turn
from infimed_jax.errors import UserError

WORDING = [
    ("yes_no", False, "en", "Q?\nPlease output 'yes' or 'no'(no extra output)."),
    ("yes_no", True, "en", 'Q?\nPlease output "yes" or "no" and put the answer in one "\\boxed{}".'),
    ("closed", False, "en", "Q?\nAnswer the question using a single word or phrase."),
    (
        "closed",
        True,
        "en",
        'Q?\nAnswer the question using a single word or phrase and put the answer in one "\\boxed{}".',
    ),
    ("open", False, "en", "Q?\nPlease answer the question concisely."),
    ("open", True, "en", 'Q?\nPlease answer the question concisely and put the answer in one "\\boxed{}".'),
    ("closed", False, "zh", "Q?\n请用一个单词或者短语回答该问题。"),
    ("yes_no", False, "zh", "Q?\n请输出'是'或'否'(不要有任何其它输出)。"),
    ("yes_no", True, "zh", "Q?\n请输出'是'或'否'，并将答案放在一个'\\boxed{}'中。"),
    ("closed", True, "zh", "Q?\n请用一个单词或者短语回答该问题，并将答案放在一个'\\boxed{}'中。"),
    ("open", False, "zh", "Q?\n请简要回答该问题。"),
    ("open", True, "zh", "Q?\n请简要回答该问题，并将答案放在一个'\\boxed{}'中。"),
]


def asked(kind="choice", question="Q?", options=(), **fields) -> Question:
    return Question(**{"id": "s/test/0", "source": "s", "split": "test", "images": (b"png",), "answer": "B"}
                    | {"kind": kind, "question": question, "options": options} | fields)  # fmt: skip


@pytest.mark.parametrize(("kind", "reasoning", "language", "expected"), WORDING)
def test_wording_is_medevalkits(kind, reasoning, language, expected):
    assert question_text(asked(kind, meta={"language": language}), reasoning) == expected


def test_choice_lists_lettered_options_one_a_line():
    assert question_text(asked("choice", "Which {organ}?", ("lung", "liver"))) == (
        "Question: Which {organ}?\nOptions: \nA. lung\nB. liver\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert question_text(asked("choice", options=("x", "y")), True).endswith(
        '\nAnswer with the option\'s letter from the given choices and put the letter in one "\\boxed{}".'
    )
    chinese = asked("choice", options=("肺", "肝"), meta={"language": "zh"})
    assert question_text(chinese) == "问题： Q?\n选项： \nA. 肺\nB. 肝\n请直接使用给定选项中的选项字母来回答该问题。"
    assert question_text(chinese, True).endswith(
        '\n请直接使用给定选项中的选项字母来回答该问题,并将答案包裹在"\\boxed{}"里'
    )


@pytest.mark.parametrize(
    ("kind", "question", "options", "language"),
    [
        ("document", "Q?", (), "en"),
        ("chat", "Q?", (), "en"),
        ("open", "Q?", (), "fr"),
        ("open", "  ", (), "en"),
        ("choice", "Q?", ("one",), "en"),
        ("choice", "Q?", tuple(map(str, range(27))), "en"),
        ("yes_no", "Q?", ("yes", "no"), "en"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(kind, question, options, language):
    with pytest.raises(UserError, match=r"^sample s/test/0: "):
        question_text(asked(kind, question, options, meta={"language": language}))


def test_a_question_that_cannot_be_asked_is_named_and_its_text_is_not_shown():
    with pytest.raises(UserError, match=r"^sample a/b/7: a question of kind yes_no takes no options, but has 2$"):
        question_text(asked("yes_no", "Smith?", ("x", "y"), id="a/b/7"))
    with pytest.raises(UserError, match=r"^sample a/b/8: a question of kind yes_no has no text: give one, or leave"):
        question_text(asked("yes_no", " ", id="a/b/8"))


WHICH = asked("choice", "Which?", ("lung", "liver"))


def test_a_question_is_trained_on_in_direct_wording():
    assert as_turns(WHICH) == (Turn("user", (0, "\n" + question_text(WHICH))), Turn("assistant", ("B",)))


def test_with_reasoning_the_answer_is_boxed_after_the_thoughts():
    thought = replace(WHICH, reasoning="It is brown.")
    user, reply = as_turns(thought)
    assert reply == Turn("assistant", ("\\boxed{B}",), "It is brown.")
    assert user.content == (0, "\n" + question_text(WHICH, True)) and "boxed" in user.text
    assert exchange(thought, reasoning=False) == as_turns(WHICH)
    assert exchange(WHICH, reasoning=True) == (user, Turn("assistant", ("\\boxed{B}",)))


def test_several_images_are_numbered_before_the_text():
    pieces = as_turns(replace(WHICH, images=(b"a", b"b")))[0].content
    assert pieces[:4] == ("<image_1>: ", 0, "<image_2>: ", 1)
    assert pieces[4].startswith("\nQuestion: Which?")


def test_blind_control_has_no_place_for_an_image():
    assert exchange(WHICH, False, image=False)[0].content == (question_text(WHICH),)


def test_the_system_text_comes_first_and_words_may_be_another_s():
    turns = exchange(replace(WHICH, system="Be brief."), True, wording=lambda q, reasoning: f"{q.question} {reasoning}")
    assert turns[:2] == (Turn("system", ("Be brief.",)), Turn("user", (0, "\nWhich? True")))
