"""Prompt wording against literal strings, and the samples built from it."""

import dataclasses

import pytest

from infimed_jax.data.prompts import prompt_for, question_sample, question_text
from infimed_jax.data.sample import Turn
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


@pytest.mark.parametrize(("kind", "reasoning", "language", "expected"), WORDING)
def test_wording_is_medevalkits(kind, reasoning, language, expected):
    assert question_text(kind, "Q?", reasoning=reasoning, language=language) == expected


def test_choice_lists_lettered_options_one_a_line():
    assert question_text("choice", "Which {organ}?", ("lung", "liver")) == (
        "Question: Which {organ}?\nOptions: \nA. lung\nB. liver\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert question_text("choice", "Q?", ("x", "y"), reasoning=True).endswith(
        '\nAnswer with the option\'s letter from the given choices and put the letter in one "\\boxed{}".'
    )
    assert question_text("choice", "Q?", ("肺", "肝"), language="zh") == (
        "问题： Q?\n选项： \nA. 肺\nB. 肝\n请直接使用给定选项中的选项字母来回答该问题。"
    )
    assert question_text("choice", "Q?", ("肺", "肝"), language="zh", reasoning=True).endswith(
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
def test_what_cannot_be_asked_is_refused(kind, question, options, language):
    with pytest.raises(UserError):
        question_text(kind, question, options, language=language)


def sample(**changes):
    fields = {
        "id": "s/test/0",
        "source": "s",
        "split": "test",
        "images": (b"png",),
        "kind": "choice",
        "question": "Which?",
        "answer": "B",
        "options": ("lung", "liver"),
        "meta": {"image_id": "i0"},
    }
    return question_sample(**(fields | changes))


def test_a_sample_that_cannot_be_asked_is_named_and_its_text_is_not_shown():
    facts = {"source": "a", "split": "b", "images": (), "answer": "no"}
    with pytest.raises(UserError, match=r"^sample a/b/7: a question of kind yes_no takes no options, but has 2$"):
        question_sample(id="a/b/7", kind="yes_no", question="Smith?", options=("x", "y"), **facts)
    with pytest.raises(UserError, match=r"^sample a/b/8: a question of kind yes_no has no text: give one, or leave"):
        question_sample(id="a/b/8", kind="yes_no", question=" ", **facts)


def test_direct_sample():
    built = sample()
    assert built.turns == (
        Turn("user", (0, "\n" + question_text("choice", "Which?", ("lung", "liver")))),
        Turn("assistant", ("B",)),
    )
    assert (built.question, built.options, built.answer) == ("Which?", ("lung", "liver"), "B")


def test_reasoning_sample_boxes_its_answer_after_the_thoughts():
    built = sample(reasoning="It is brown.", with_reasoning=True)
    assert built.turns[1] == Turn("assistant", ("\\boxed{B}",), "It is brown.")
    assert "boxed" in built.turns[0].content[1]


def test_several_images_are_numbered_before_the_text():
    pieces = sample(images=(b"a", b"b")).turns[0].content
    assert pieces[:4] == ("<image_1>: ", 0, "<image_2>: ", 1)
    assert pieces[4].startswith("\nQuestion: Which?")


def test_language_comes_from_meta():
    built = sample(kind="open", options=(), answer="肺", meta={"language": "zh"})
    assert built.turns[0].content[1].endswith("请简要回答该问题。")


@pytest.mark.parametrize(
    "changes",
    [
        {"answer": "C"},
        {"answer": "b"},
        {"answer": "AB"},
        {"answer": ""},
        {"kind": "yes_no", "options": (), "answer": "Yes"},
        {"kind": "open", "options": (), "answer": " "},
    ],
)
def test_impossible_gold_answers_are_refused(changes):
    with pytest.raises(UserError, match="s/test/0"):
        sample(**changes)


def test_prompt_for_switches_wording_and_back():
    direct = sample()
    thinking = prompt_for(direct, reasoning=True)
    assert thinking == sample(with_reasoning=True)
    assert prompt_for(thinking, reasoning=False) == direct
    kept = prompt_for(sample(reasoning="Because.", with_reasoning=True), reasoning=True)
    assert kept.turns[1].reasoning == "Because."


def test_blind_control_has_no_image_and_no_place_for_one():
    blind = prompt_for(sample(), reasoning=False, image=False)
    assert blind.images == ()
    assert blind.turns[0].content == (question_text("choice", "Which?", ("lung", "liver")),)
    assert blind.meta["image_id"] == "i0"


def test_system_turn_stays():
    system = Turn("system", ("Be brief.",))
    original = dataclasses.replace(sample(), turns=(system, *sample().turns))
    assert prompt_for(original, reasoning=True).turns[0] == system
