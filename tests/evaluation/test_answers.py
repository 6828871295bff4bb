"""The answer grammar as tables of what is and what is no answer, and properties on arbitrary text."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infimed_jax.data.sample import Question
from infimed_jax.errors import UserError
from infimed_jax.evaluation.answers import gold_value, last_boxed, matches, parse_answer
from infimed_jax.evaluation.text import normalize

OPTIONS = ("lung", "liver", "left kidney", "The spleen")
VQA_RAD = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "vqa_rad"

CHOICES = [
    # lone letters
    ("B", "B"),
    ("b", "B"),
    (" B.\n", "B"),
    ("(B)", "B"),
    ("B)", "B"),
    ("B:", "B"),
    ("[B]", "B"),
    ("Option B", "B"),
    ("option (B)", "B"),
    ("选项B", "B"),
    ("Ｂ。", "B"),
    ("**B**", "B"),
    ("$B$", "B"),
    ("\\text{B}", "B"),
    ("\\textbf{\\text{B}}", "B"),
    ("\u200bB", "B"),
    # option text, alone or after its own letter
    ("liver", "B"),
    ("Liver.", "B"),
    ("the liver", "B"),
    ("spleen", "D"),
    ("B. liver", "B"),
    ("(B) Liver.", "B"),
    ("B: liver", "B"),
    ("**B. liver**", "B"),
    # boxes: the last one, whatever else is said
    ("\\boxed{B}", "B"),
    ("\\boxed{(B)}", "B"),
    ("\\boxed{\\text{B}}", "B"),
    ("\\boxed{B. liver}", "B"),
    ("\\boxed{liver}", "B"),
    ("\\boxed {B}", "B"),
    ("$\\boxed{B}$", "B"),
    ("\\boxed{A} no, \\boxed{B}", "B"),
    ("The answer is A. \\boxed{B}", "B"),
    ("\\boxed{\\boxed{B}}", "B"),
    ("I think <answer>A</answer> \\boxed{B}", "B"),
    # one answer tag
    ("<answer>B</answer>", "B"),
    ("so <answer> (B) liver </answer>.", "B"),
    ("the answer is A <answer>B</answer>", "B"),
    # declarations
    ("The answer is B.", "B"),
    ("The correct option is B", "B"),
    ("It is brown. Answer: B", "B"),
    ("**Answer:** B", "B"),
    ("**Answer**: (B) liver", "B"),
    ("Answer:\nB", "B"),
    ("The answer is: B. The organ lies on the right.", "B"),
    ("Answer: A. On reflection, the final answer is B", "B"),
    ("The answer is B.\nFinal answer: liver", "B"),
    ("答案：B", "B"),
    ("答案是B。", "B"),
    # after the think block
    ("<think>A, surely \\boxed{A}</think>B", "B"),
    ("\\boxed{A}<think>hm</think>\\boxed{B}", "B"),
    ("thoughts</think>\n\n\\boxed{B}", "B"),
    ("<think>x</think>A<think>y</think>B", "B"),
]

NO_CHOICE = [
    "",
    "   ",
    ".",
    "E",
    "A or B",
    "A, B",
    "AB",
    "A B",
    "It does",
    "I",
    "A liver lesion",
    "B. lung",
    "B. maybe",
    "liver or lung",
    "liver lung",
    "a large liver",
    "\\boxed{}",
    "\\boxed{A or B}",
    "\\boxed{A}, hence \\boxed{",
    "B \\boxed{}",
    "\\boxed{B",
    "\\boxed B",
    "\\boxed{A, B}",
    "\\boxed{E}",
    "<answer>A</answer><answer>B</answer>",
    "<answer>B</answer><answer>B</answer>",
    "<answer>B",
    "B</answer>",
    "</answer>B<answer>",
    "<answer></answer>B",
    "The answer is A. The correct option is B.",
    "The answer is A or B",
    "The answer is not B",
    "The answer is B. lung",
    "The answer is A. B.",
    "Final answer: A\nFinal answer: B",
    "The answer is unclear. B",
    "<think>B</think>",
    "<think>\\boxed{B}</think>I cannot tell.",
    "А",  # Cyrillic
    "\\boxed{A}\\boxed{None of them}",
]


@pytest.mark.parametrize(("reply", "letter"), CHOICES)
def test_choices_are_read(reply, letter):
    assert parse_answer(reply, "choice", OPTIONS).value == letter


@pytest.mark.parametrize("reply", NO_CHOICE)
def test_no_single_choice_is_unparsed(reply):
    assert parse_answer(reply, "choice", OPTIONS) == parse_answer("", "choice", OPTIONS)
    assert parse_answer(reply, "choice", OPTIONS).status == "unparsed"


def test_equal_option_texts_name_no_letter():
    assert parse_answer("Two", "choice", ("2", "two", "3")).status == "unparsed"
    assert parse_answer("B", "choice", ("2", "two", "3")).value == "B"


def test_letter_comes_before_an_option_that_reads_like_a_letter():
    assert parse_answer("B", "choice", ("B", "A")).value == "B"


YES_NO = [
    ("yes", "yes"),
    ("Yes.", "yes"),
    ("NO", "no"),
    ("'no'", "no"),
    ("(yes)", "yes"),
    ("Yes, a nodule is seen", "yes"),
    ("Yes, there is no doubt that it is", "yes"),
    ("No, there is not.", "no"),
    ("No. The lungs are normal.", "no"),
    ("Yes it is", "yes"),
    ("No - it is normal", "no"),
    ("Yes—clearly", "yes"),
    ("\\boxed{yes}", "yes"),
    ("\\boxed{\\text{No}}", "no"),
    ("The answer is yes.", "yes"),
    ("Answer: No. The heart is normal.", "no"),
    ("<answer>no</answer>", "no"),
    ("<think>yes yes yes</think>no", "no"),
    ("是", "yes"),
    ("是的。", "yes"),
    ("不是", "no"),
    ("答案：否", "no"),
]
NO_YES_NO = [
    "",
    "normal",
    "abnormal",
    "nodule",
    "yesterday",
    "There is no fracture.",
    "No fracture is seen",
    "yes or no",
    "yes/no",
    "yes no",
    "yes and no",
    "Yes, or no.",
    "Yes. No.",
    "No. Yes.",
    "No, yes it is",
    "yes-no",
    "\\boxed{yes or no}",
    "\\boxed{yes}\\boxed{}",
    "The answer is normal",
    "Answer: yes\nAnswer: no",
    "not at all",
    "maybe",
    "true",
]


@pytest.mark.parametrize(("reply", "value"), YES_NO)
def test_yes_and_no_are_read(reply, value):
    assert parse_answer(reply, "yes_no").value == value


@pytest.mark.parametrize("reply", NO_YES_NO)
def test_yes_and_no_need_a_word_of_their_own(reply):
    assert parse_answer(reply, "yes_no").status == "unparsed"


SAME_TEXT = [
    ("Liver", "liver."),
    ("The liver", "liver"),
    ("two", "2"),
    ("Twelve lesions", "12 lesions"),
    ("posterior-anterior", "Posterior Anterior"),
    ("left/right", "left, right"),
    ("1,200 ml", "1200 ml"),
    ("Crohn’s disease", "Crohn's disease"),
    ("**liver**", "liver"),
    ("*liver*", "liver"),
    ("\\text{liver}", "liver"),
    ("  left\n kidney ", "left kidney"),
    ("ＣＴ", "ct"),
    ("-5", "−5"),
    ("L4-5", "L4 5"),  # between words a hyphen is no minus
    ("5-10 cm", "5 10 cm"),
    ("No.5", "no 5"),  # after letters a full stop is no decimal point
    ("肺。", "肺"),
    ("80\\%", "80%"),
    ("80 %", "80%"),
    ("5cm", "5 cm"),
    ("2.50", "2.5"),
    ("3.0", "3"),
    ("-0.0", "0"),
    (".5", "0.50"),
    ("1,500.0", "1500"),
    ("80.0%", "80 %"),
    ("2.50cm", "2.5 cm"),
    ("5.0 x 3.0 cm", "5 x 3 cm"),
    ("two", "2.0"),
]
OTHER_TEXT = [
    ("hepatitis A", "hepatitis"),
    ("1.5", "15"),
    ("1.5", "1 5"),
    (".5", "5"),
    ("-5", "5"),
    ("(-5)", "5"),
    ("1/2", "12"),
    ("1/2", "1 2"),
    ("5%", "5"),
    ("T2*", "T2"),
    (">5 cm", "5 cm"),
    ("left", "left lung"),
    ("not the liver", "liver"),
    ("twenty", "two"),
    ("12", "1 2"),
    ("liver lung", "liver"),
    ("1,2345", "12345"),  # no thousands
    ("A", "the"),  # an article alone is the answer
    ("T 2", "T2"),
    ("5 classes", "5c lasses"),
    ("150", "15"),
    ("1.50", "15"),
    ("10", "1"),
    ("007", "7"),
    ("1e3", "1000"),
    ("1.2.0", "1.2"),
    ("version 1.10", "version 1.1"),
    ("12.10.2020", "12.1.2020"),
    ("T2.0", "T2"),
    ("2.5e0", "2.5"),
    ("-2.50", "2.5"),
    ("Th10.0", "Th10"),
]


@pytest.mark.parametrize(("one", "other"), SAME_TEXT)
def test_text_that_means_the_same(one, other):
    assert normalize(one) == normalize(other) != ""


@pytest.mark.parametrize(("one", "other"), OTHER_TEXT)
def test_text_that_means_something_else(one, other):
    assert normalize(one) != normalize(other)


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Liver.", "liver"),
        ("\\boxed{the liver}", "liver"),
        ("Answer: the liver.", "liver"),
        ("The final answer is liver", "liver"),
        ("<answer>liver</answer>", "liver"),
        ("<think>lung</think>\nliver", "liver"),
        ("liver or lung", "liver or lung"),
        ("It is the liver", "liver"),
        ("\\boxed{x_{1}}", "x 1"),
    ],
)
@pytest.mark.parametrize("kind", ["closed", "open"])
def test_text_answers(reply, value, kind):
    assert parse_answer(reply, kind).value == value


@pytest.mark.parametrize(
    "reply", ["", " ", "?!", "\\boxed{}", "\\boxed{ . }", "<answer> </answer>", "<think>liver</think>"]
)
def test_no_text_is_unparsed(reply):
    assert parse_answer(reply, "open").status == "unparsed"


@pytest.mark.parametrize(
    ("reply", "finished", "status"),
    [
        ("<think>It is B", True, "truncated"),
        ("<think>It is \\boxed{B}", False, "truncated"),
        ("<think>x</think>\\boxed{A}<think>more", True, "truncated"),
        ("B", False, "truncated"),
        ("The answer is B", False, "truncated"),
        ("", False, "truncated"),
        ("<think>x</think>\\boxed{A} or \\boxed{", False, "truncated"),
        ("<think>x</think>\\boxed{B} because of", False, "ok"),
        ("<think>x</think><answer>B</answer> because", False, "ok"),
        ("<think>x</think><answer>B", False, "truncated"),
    ],
)
def test_cut_replies(reply, finished, status):
    assert parse_answer(reply, "choice", OPTIONS, finished).status == status


@pytest.mark.parametrize("kind", ["document", "chat"])
def test_kinds_without_answer_are_refused(kind):
    with pytest.raises(UserError, match=kind):
        parse_answer("yes", kind)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{a}", "a"),
        ("\\boxed{a{b}{c}}", "a{b}{c}"),
        ("\\boxed{a}\\boxed{b}", "b"),
        ("\\boxed{a}\\boxed{b", None),
        ("\\boxed", None),
        ("boxed{a}", None),
        ("\\boxed{}", ""),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def question(kind, answer, options=()):
    return Question(id="q", source="s", split="t", images=(), kind=kind, question="Q?", answer=answer, options=options)


FORMS = [
    "{}",
    "{}.",
    " {}\n",
    "\\boxed{{{}}}",
    "\\boxed{{\\text{{{}}}}}",
    "Because.\n\\boxed{{{}}}.",
    "\\boxed{{wrong}} is wrong, so \\boxed{{{}}}",
    "<answer>{}</answer>",
    "The answer is {}",
    "Final answer: {}",
    "**Answer:** {}",
    "<think>wrong\n\\boxed{{wrong}}</think>{}",
    "<think>wrong</think>\n\n\\boxed{{{}}}",
]
TERMS = st.from_regex(r"[b-s]{3,9}( [b-s]{3,9}){0,2}", fullmatch=True)  # no article, neither yes
GOLDS = st.one_of(
    st.sampled_from(["yes", "no"]).map(lambda answer: question("yes_no", answer)),
    st.sampled_from("ABCD").map(lambda letter: question("choice", letter, OPTIONS)),
    TERMS.map(lambda text: question("open", text)),
    TERMS.map(lambda text: question("closed", text)),
)


@given(GOLDS, st.sampled_from(FORMS))
def test_gold_in_any_accepted_form_matches(sample, form):
    assert matches(parse_answer(form.format(sample.answer), sample.kind, sample.options), sample)


def test_any_alternative_is_right():
    sample = dataclasses.replace(question("open", "8.4"), alternatives=("about 8", "8.50"))
    for reply, right in (
        ("8.40", True),
        ("About 8.", True),
        ("8.5", True),
        ("8.4, 8.5", False),
        ("85", False),
        ("", False),
    ):
        assert matches(parse_answer(reply, "open"), sample) is right


@given(st.sampled_from("ABCD"), st.sampled_from(FORMS))
def test_gold_option_text_matches_in_any_form(letter, form):
    sample = question("choice", letter, OPTIONS)
    text = OPTIONS["ABCD".index(letter)]
    assert matches(parse_answer(form.format(text), "choice", OPTIONS), sample)


@given(GOLDS, GOLDS, st.sampled_from(FORMS))
def test_another_answer_never_matches(sample, other, form):
    """The mutation test: the same form around another answer changes the verdict."""
    if sample.kind == "choice" and normalize(other.answer) in map(normalize, OPTIONS):
        return
    if gold_value(sample) != gold_value(other):
        assert not matches(parse_answer(form.format(other.answer), sample.kind, sample.options), sample)


@given(GOLDS, GOLDS)
def test_naming_two_answers_never_matches(sample, other):
    if sample.kind != other.kind or gold_value(sample) == gold_value(other):
        return
    for both in ("{} {}", "{} or {}", "{} and {}", "{}/{}", "\\boxed{{{} or {}}}", "\\boxed{{{}}}\\boxed{{{}"):
        for one, two in ((sample, other), (other, sample)):
            reply = both.format(one.answer, two.answer)
            assert not matches(parse_answer(reply, sample.kind, sample.options), sample)


MARKS = [
    "<think>",
    "</think>",
    "\\boxed{",
    "\\boxed",
    "}",
    "{",
    "<answer>",
    "</answer>",
    "Answer: ",
    "answer is ",
    "答案是",
]
WORDS = ["final ", "A", "B", "(", ")", ". ", "yes", "no", "\n", "$", "\\text{", "*", "\u200b", "lung"]
PIECES = st.sampled_from(MARKS + WORDS)
REPLIES = st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=15).map("".join))


@settings(max_examples=300)
@given(REPLIES, st.booleans(), st.sampled_from(["yes_no", "choice", "closed", "open"]))
def test_any_reply_is_read_without_error_and_never_beyond_the_answers_there_are(reply, finished, kind):
    parsed = parse_answer(reply, kind, OPTIONS if kind == "choice" else (), finished)
    assert (parsed.value is None) == (parsed.status != "ok")
    if kind == "choice":
        assert parsed.value in (None, *"ABCD")
    if kind == "yes_no":
        assert parsed.value in (None, "yes", "no")
    if kind in ("open", "closed"):
        assert parsed.value is None or parsed.value.strip() == parsed.value != ""
    if finished and parsed.status == "truncated":
        assert "<think>" in reply
    if not finished and parsed.status == "ok":
        assert "\\boxed" in reply or "<answer>" in reply or re.search("[^\x00-\x7f]", reply)


@given(st.text(alphabet=st.characters(blacklist_categories=("Cs",)), max_size=40), REPLIES)
def test_thoughts_never_count(answer, thoughts):
    thoughts = thoughts.replace("think>", "")
    for kind in ("yes_no", "closed", "open"):
        assert parse_answer(f"<think>{thoughts}</think>{answer}", kind) == parse_answer(f"x</think>{answer}", kind)


@given(st.text())
def test_normalize_is_stable(text):
    once = normalize(text)
    assert once == " ".join(once.split())


@pytest.mark.skipif(not VQA_RAD.exists(), reason="the real VQA-RAD questions (../shared/data/vqa_rad) are absent")
def test_every_real_answer_of_vqa_rad_parses_to_itself():
    rows = [row for name in ("trainset", "testset") for row in json.loads((VQA_RAD / f"{name}.json").read_text())]
    assert len(rows) == 3515
    for row in rows:
        answer = str(row["answer"]).strip()
        binary = answer.lower() in ("yes", "no")
        sample = question("yes_no" if binary else "open", answer.lower() if binary else answer)
        for form in ("{}", "\\boxed{{{}}}", "<think>no</think>\nAnswer: {}"):
            if form != "{}" and "{" in answer:
                continue
            assert matches(parse_answer(form.format(answer), sample.kind), sample), row
