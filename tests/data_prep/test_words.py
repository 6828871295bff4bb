"""Words of annotations: image marks, letters before options, answers as values of any type, and languages."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest

from data_prep.reading.faults import Unusable
from data_prep.reading.words import script_language, without_letters, without_marks
from data_prep.sources.source import answers, caption_sample, choice_sample, qa_sample, text

ID = "mine/train/00000"


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        (3.0, ("3",)),
        (2.50, ("2.5",)),
        (-0.0, ("0",)),
        (1e-05, ("0.00001",)),
        (150, ("150",)),
        (Decimal("2.50"), ("2.5",)),
        (Decimal("300"), ("300",)),
        (np.float32(2.3), ("2.3",)),
        (np.int64(7), ("7",)),
        (True, ("yes",)),
        (np.bool_(False), ("no",)),
        (["yes"], ("yes",)),
        (["left", "left", "the left", ""], ("left", "the left")),
        (np.array(["a", "b"], object), ("a", "b")),
        (np.array([1.0, 2.5]), ("1", "2.5")),
        ("['8.4', '8.40']", ("8.4", "8.40")),
        ('["yes"]', ("yes",)),
        ("['8.4' '8.40']", ("8.4", "8.40")),
        ("('8.4', '8.40')", ("8.4", "8.40")),
        ("('quoted')", ("('quoted')",)),
        ("[10, 20]", ("[10, 20]",)),
        ("['a', 3]", ("['a', 3]",)),
        ("['unclosed]", ("['unclosed]",)),
        ("['a'] and [b]", ("['a'] and [b]",)),
        ("__import__('os')", ("__import__('os')",)),
        (float("nan"), ()),
        (float("inf"), ()),
        (Decimal("NaN"), ()),
        (None, ()),
        ([], ()),
        ({"text": "a"}, ()),
        (b"a", ()),
    ],
)
def test_gold_answers_of_any_type(value, gold):
    assert answers(value) == gold


def test_identifiers_are_no_floats():
    assert text(17.0) == text(np.float64(17.0)) == "17" and text(True) == ""


def ask(*gold: str, kind: str = "", **meta: str):
    return qa_sample(ID, (b"x",), "What?", gold, meta, kind)


def test_alternatives_and_yes_or_no():
    one = ask("8.4", "8.40")
    assert (one.kind, one.answer, one.alternatives) == ("open", "8.4", ("8.40",))
    assert (ask("Yes", "yes").kind, ask("Yes", "yes").answer, ask("Yes", "yes").alternatives) == ("yes_no", "yes", ())
    assert (ask("yes", "yes, left").kind, ask("yes", "yes, left").alternatives) == ("open", ("yes, left",))
    assert ask("3", kind="CLOSED").kind == "closed"
    with pytest.raises(Unusable, match="both yes and no"):
        ask("yes", "no")


def test_thoughts_before_a_gold_answer_are_its_reasoning():
    for reply in ("Pneumothorax.", "\\boxed{Pneumothorax.}", "<answer>Pneumothorax.</answer>"):
        sample = ask(f"<think>\nThe edge is visible.\n</think>\n\n{reply}")
        assert (sample.reasoning, sample.answer) == ("The edge is visible.", "Pneumothorax.")
    assert ask("\\boxed{a}").answer == "\\boxed{a}"
    with pytest.raises(Unusable, match="think block"):
        ask("<think>The edge")
    with pytest.raises(Unusable, match="no answer"):
        ask("<think>The edge</think>")


def test_a_question_in_another_language_than_those_of_the_prompts_is_named():
    assert ask("a", language="zh").meta == {"language": "zh"}
    with pytest.raises(Unusable, match=r"language without a wording.*de"):
        ask("a", language="de")


@pytest.mark.parametrize(
    ("question", "images", "words"),
    [
        ("<image>\nWhat?", 1, "What?"),
        ("What?\n<image>", 1, "What?"),
        ("<image> <image>\nWhich?", 2, "Which?"),
        ("What is in <image>?", 1, "What is in the image?"),
        ("What is in this <image>?", 1, "What is in this image?"),
        ("Is <image> later than <image>?", 2, "Is <image_1> later than <image_2>?"),
        ("<image>Is it later than <image>?", 2, "Is it later than <image_2>?"),
        ("See <image 1>", 1, "See <image 1>"),
        ("What?", 3, "What?"),
    ],
)
def test_marks_in_a_question_are_placed(question, images, words):
    assert without_marks(question, images) == words


def test_marks_that_are_not_as_many_as_images_are_refused():
    for images in (0, 2):
        with pytest.raises(Unusable, match="image marks do not match images"):
            without_marks("<image>\nWhat?", images)
    with pytest.raises(Unusable, match="no question"):
        without_marks("<image>", 1)
    assert without_marks("<image>中有什么？", 1, "zh") == "中有什么？"
    assert without_marks("在<image>中有什么？", 1, "zh") == "在图像中有什么？"
    with pytest.raises(Unusable, match="image marks do not match images"):
        choice_sample(ID, (), "<image>Which?", ("a", "b"), "A", {})


def test_marks_in_a_caption_are_placed():
    assert caption_sample(ID, (b"x",), "A chest.", {}).chunks == ((0, "\nA chest."),)
    assert caption_sample(ID, (b"x", b"y"), "<image> before, <image> after.", {}).chunks == (
        (0, " before, ", 1, " after."),
    )
    with pytest.raises(Unusable, match="image marks do not match images"):
        caption_sample(ID, (b"x",), "<image><image>A chest.", {})
    with pytest.raises(Unusable, match="no text"):
        caption_sample(ID, (b"x",), "<image>", {})


@pytest.mark.parametrize(
    ("options", "bare"),
    [
        (("A. x", "B. y"), ("x", "y")),
        (("a) x", "b) y", "c) z"), ("x", "y", "z")),
        (("(A) x", "(B) y"), ("x", "y")),
        (("A、肺", "B、心"), ("肺", "心")),
        ((" A:x ", "B : y", "z", ""), ("x", "y", "z")),
        (("A. A. x", "B. y"), ("A. x", "y")),
        (("A. x", "B. y", "C.", ""), ("x", "y")),
        (("E. coli", "S. aureus", "C. difficile"), ("E. coli", "S. aureus", "C. difficile")),
        (("A: x", "B: y", "C. difficile"), ("x", "y", "C. difficile")),
        (("A", "B"), ("A", "B")),
        (("x", "", "z"), ("x", "", "z")),
        (("A.1 mm", "B.2 mm"), ("1 mm", "2 mm")),
        (("Abscess", "Biopsy"), ("Abscess", "Biopsy")),
    ],
)
def test_letters_before_options_are_removed_once(options, bare):
    assert without_letters(options) == bare


def test_a_gold_letter_whose_option_fell_away_is_none_and_equal_options_are_marked():
    with pytest.raises(Unusable, match="none of the options"):
        choice_sample(ID, (b"x",), "Which?", ("a", "b", ""), "C", {})
    with pytest.raises(Unusable, match=r"none of the options.*its option is empty"):
        choice_sample(ID, (b"x",), "Which?", ("a", "", "b"), "B", {})
    assert choice_sample(ID, (b"x",), "Which?", ("a", "b", "b"), "A", {}).meta == {"equal_options": "true"}
    assert choice_sample(ID, (b"x",), "Which?", ("a", "b"), "A", {}).meta == {}


def test_scripts():
    assert script_language("CT显示什么?") == "zh" and script_language("What does 肺 mean in this text?") == "en"
    assert script_language("これは何ですか 肺") == "ja" and script_language("123") == ""
