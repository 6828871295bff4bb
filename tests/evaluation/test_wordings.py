"""Wordings in which models answer, refuse and hedge: those of one maker in ../shared/cases, and others."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from infimed_jax.data.sample import Question
from infimed_jax.evaluation.answers import matches, parse_answer
from infimed_jax.evaluation.text import normalize

REPLIES = Path(__file__).resolve().parents[2].parent / "shared" / "cases" / "replies.jsonl"
OPTIONS = ("lung", "liver", "left kidney", "The spleen")
CHOICES = [
    ("B\n\nBecause the liver is bright.", "B"),
    ("B. liver\n\nThe lesion is in the right upper quadrant.", "B"),
    ("B, since the organ is large.", "B"),
    ("B because it is large", "B"),
    ("B is the right answer.", "B"),
    ("B is correct.", "B"),
    ("Option B is the best choice because of this.", "B"),
    ("Choice B is correct, as the liver is enlarged.", "B"),
    ("(B) is the correct answer.", "B"),
    ("## Final Answer\nB", "B"),
    ("**Answer**\n\nB", "B"),
    ("**Final Answer**\n(B) liver", "B"),
    ("I looked at it carefully. The margins are smooth.\n\nB. liver", "B"),
    ("The scan was taken in the axial plane.\n(B)", "B"),
    ("我选B", "B"),
    ("选择B", "B"),
    ("选 B。", "B"),
    ("Short Answer: B\nLong Answer: The liver is bright.", "B"),
    ("Brief answer: B. liver\n\nFull answer: it is lung-like but liver.", "B"),
    ("This is the liver.", "B"),
    ("It is the liver.", "B"),
    ("The picture shows the spleen.", "D"),
    ("Hence, the most probable organ is the **liver**.", "B"),
    ("The findings are consistent with liver.", "B"),
    ("The correct answer would be B.", "B"),
    ("The answer should be (B).", "B"),
    ("Therefore, B.", "B"),
    ("So the answer is B", "B"),
    ("B - liver", "B"),
    ("B) liver, because it is big", "B"),
    ("I choose B", "B"),
    ("I would choose option B.", "B"),
    ("My answer is B.", "B"),
    ("正确答案是B", "B"),
    ("答案为B。", "B"),
    ("应选B", "B"),
    ("答案选B", "B"),
    ("故选B。", "B"),
    ("B.\nliver", "B"),
    ("The answer to this question is B.", "B"),
    ("The best answer is option B: liver", "B"),
    ("B: liver\nExplanation: The image shows a large organ.", "B"),
    ("Answer: B\nExplanation: A large organ is seen.", "B"),
    ("**B**\n\nThe liver is the largest.", "B"),
    ("B!", "B"),
    ("The answer is **B**", "B"),
    ('The answer is "B"', "B"),
    ("Answer - B", "B"),
    ("Answer is B", "B"),
    ("ANSWER: B", "B"),
    ("the option is B", "B"),
    ("The correct letter is B", "B"),
]
NO_CHOICES = [
    "A cyst is seen",
    "The answer is A or B",
    "The answer is not B",
    "The answer is A. B.",
    "A or B",
    "Either A or B",
    "B or C",
    "A, B",
    "A/B",
    "A and B",
    "I cannot answer, but B",
    "I'm sorry, but I can't help. B",
    "As an AI, I cannot view images. B",
    "Maybe B",
    "B, but it could be C",
    "B?",
    "Not B",
    "It is not the liver.",
    "The image does not show liver.",
    "The image may be lung",
    "The organ is unlikely to be liver",
    "A\nB\nC\nD",
    "A. lung\nB. liver\nC. left kidney\nD. The spleen",
    "The image shows lung. The image shows liver.",
    "\\boxed{A}, \\boxed{B}",
    "\\boxed{A} and \\boxed{B}",
    "\\boxed{A}\n\\boxed{B}",
    "None of the above",
    "All of the above",
    "B is incorrect.",
    "Option B is wrong.",
    "B is not correct.",
    "Option A is wrong, and so is B.",
    "A is correct. B is correct.",
    "Unlike the liver, the image shows a heart.",
    "Is it liver?",
    "The diagnosis is either lung or liver",
    "lung, liver",
    "The options are lung, liver, left kidney and the spleen",
    "I do not know whether it is the liver",
    "I don't think it is liver",
    "Out of the options, the liver is the most likely.",
]
YES_NO = [
    ("No\n\nThe finding is absent.", "no"),
    ("Yes\nThe image shows it clearly.", "yes"),
    ("The image shows a normal heart. So, no.", "no"),
    ("The lungs look clear. No.", "no"),
    ("Therefore, the answer to your question is yes.", "yes"),
    ("The answer to the question is: no.", "no"),
    ("Thus, no.", "no"),
    ("Simple answer: no.\nDetailed answer: The lungs are normal.", "no"),
    ("No evidence of this is seen. No.", "no"),
    ("There is no sign of this in the picture.", "no"),
    ("There are signs of this here.", "yes"),
    ("Yes, both lungs are affected.", "yes"),
    ("No, there is no mass in either lung.", "no"),
    ("No, I cannot see any fracture.", "no"),
    ("No. The fracture cannot be seen.", "no"),
    ("Yes - see the arrow", "yes"),
    ("**No**, the heart is normal.", "no"),
    ("Short answer: yes", "yes"),
    ("**Final Answer**\nNo", "no"),
    ("The answer would be yes.", "yes"),
    ("Yes, it does.", "yes"),
    ("Yes it does", "yes"),
    ("Yes they are", "yes"),
    ("No, because the heart is normal", "no"),
    ("Yes! The mass is large.", "yes"),
    ("Yes, the mass is seen in the left lung, which is enlarged; no effusion.", "yes"),
    ("So the answer is no.", "no"),
    ("In conclusion, yes.", "yes"),
    ("Based on the image, no.", "no"),
    ("no, normal", "no"),
    ("Yes, there is evidence of this in the image.", "yes"),
    ("Correct answer: No", "no"),
]
NO_YES_NO = [
    "No. I cannot see the image.",
    "No, sorry, I cannot answer that question.",
    "Yes; it could be either.",
    "No, I can't view images.",
    "No image was provided.",
    "no idea",
    "Yes, or maybe no",
    "Yes and no.",
    "I am unable to determine. No.",
    "No, as an AI I cannot diagnose.",
    "Yes? No?",
    "It depends. Yes.",
    "Yes, but I am not sure.",
    "No, it is hard to say.",
    "Not sure, yes",
    "Cannot be determined",
    "It is unclear. No.",
    "Yes, I think, although this cannot be determined.",
    "No abnormality",
    "normal",
    "No opinion",
    "no comment",
    "There is no fracture.",
    "Is it normal? Yes. Is there a mass? No.",
    "Neither yes nor no",
    "The answer is no image",
    "I cannot say yes",
    "不确定",
    "是或否",
    "可能是",
    "抱歉，我看不到图片。否",
    "No. Unable to view the image.",
    "No. There is no image attached.",
    "No. Please consult a doctor.",
]
CHINESE_YES_NO = [
    ("有", "yes"),
    ("没有", "no"),
    ("是的，有骨折", "yes"),
    ("没有骨折", None),
    ("没有，未见骨折。", "no"),
    ("有，左肺有结节。", "yes"),
    ("是", "yes"),
    ("不是。", "no"),
    ("否", "no"),
    ("对", "yes"),
    ("根据图像，有。", "yes"),
    ("答案：没有", "no"),
    ("答案是有", "yes"),
    ("是的，没有骨折", None),
    ("不存在", "no"),
    ("有或没有", None),
    ("无法判断，有", None),
    ("没有，有", None),
    ("图中没有骨折。没有", "no"),
    ("有的", "yes"),
    ("yes", "yes"),
    ("无", "no"),
    ("是的", "yes"),
]
TEXTS = [
    ("Lung, as can be seen in this picture.", "lung"),
    ("lung (visible in the left part of the picture)", "lung"),
    ("lung (as shown in the image)", "lung"),
    ("lung - as seen on the scan", "lung"),
    ("lung — shown in the figure", "lung"),
    ("Lung\n\nThe picture confirms it.", "lung"),
    ("Lung. The picture shows an opacity there.", "lung"),
    ("Answer: Lung. There is a mass.", "lung"),
    ("This is the lung.", "lung"),
    ("It's the lung", "lung"),
    ("The picture depicts a lung.", "lung"),
    ("The CT shows lung", "lung"),
    ("That is a lung.", "lung"),
    ("Based on the image, lung", "lung"),
    ("Based on the image, it is the lung.", "lung"),
    ("lung because the density is low", "lung"),
    ("80\\%", "80%"),
    ("80 %", "80%"),
    ("5cm", "5 cm"),
    ("5 mm", "5mm"),
    ("I see a lung", "lung"),
    ("These are lungs", "lungs"),
    ("图片显示肺部。", "肺部"),
    ("这是肺。", "肺"),
    ("根据图片，是肺", "肺"),
    ("如图所示，肺", "肺"),
    ("Short Answer: lung\nDetailed Answer: The lung is large.", "lung"),
    ("The answer is lung because of it.", "lung"),
    ("The image shows lung, liver and heart", "lung liver and heart"),
    ("lung, liver", "lung liver"),
    ("lung (or liver)", "lung or liver"),
    ("lung - or liver", "lung or liver"),
    ("Lung. Liver.", "lung liver"),
    ("lung and liver", "lung and liver"),
    ("The lung.", "lung"),
    ("lung (liver)", "lung liver"),
    ("lung; liver is seen in the image", "lung liver is seen in the image"),
    ("lung\nliver", "lung liver"),
    ("Lung. Also the liver is seen.", "Lung. Also the liver is seen."),
    ("T2-MRI", "t2 mri"),
    ("ring-enhancing lesions, as seen in the image", "ring enhancing lesions"),
    ("Lung. It could be liver.", "Lung. It could be liver."),
    ("lung, seen in the image, liver", "lung, seen in the image, liver"),
    ("lung, as well as liver in the image", "lung, as well as liver in the image"),
    ("on CT", "on ct"),
    ("in the lung", "in the lung"),
    ("right, as in the left image", "right"),
    ("The image shows T2 weighted MRI", "t2 weighted mri"),
    ("The image is an axial CT", "axial ct"),
]
REFUSALS = [
    "I'm sorry, I can't interpret medical images.",
    "I cannot see the image.",
    "I am unable to view images",
    "Sorry, no.",
    "As an AI model, I can't.",
    "No image is provided",
    "抱歉，我无法解读医学影像。",
    "I can't help with that diagnosis",
    "Unable to answer.",
]


@pytest.mark.parametrize(("reply", "letter"), CHOICES)
def test_choices(reply, letter):
    assert parse_answer(reply, "choice", OPTIONS).value == letter


@pytest.mark.parametrize("reply", NO_CHOICES)
def test_no_choices(reply):
    assert parse_answer(reply, "choice", OPTIONS).status == "unparsed"


@pytest.mark.parametrize(("reply", "value"), YES_NO)
def test_yes_and_no(reply, value):
    assert parse_answer(reply, "yes_no").value == value


@pytest.mark.parametrize("reply", NO_YES_NO)
def test_neither_yes_nor_no(reply):
    assert parse_answer(reply, "yes_no").status == "unparsed"


@pytest.mark.parametrize(("reply", "value"), CHINESE_YES_NO)
def test_yes_and_no_in_chinese(reply, value):
    assert parse_answer(reply, "yes_no", language="zh").value == value


def test_the_language_of_the_question_decides_which_words_answer():
    assert parse_answer("有", "yes_no", language="zh").value == "yes"
    assert parse_answer("有", "yes_no", language="en").status == "unparsed"


@pytest.mark.parametrize(("reply", "text"), TEXTS)
@pytest.mark.parametrize("kind", ["closed", "open"])
def test_texts(reply, text, kind):
    """`text` is the answer without its presentation; where a list is given, all of the reply."""
    assert parse_answer(reply, kind).value == normalize(text)


@pytest.mark.parametrize("reply", REFUSALS)
@pytest.mark.parametrize("kind", ["yes_no", "choice", "closed", "open"])
def test_refusals(reply, kind):
    assert parse_answer(reply, kind, OPTIONS if kind == "choice" else ()).status == "unparsed"


def test_a_gold_answer_is_read_as_a_reply_is():
    for gold in ("as seen in the image", "because of the fracture", "The image shows the lung", "是", "see the image"):
        sample = Question("q", "s", "t", (), kind="open", question="?", answer=gold)
        assert matches(parse_answer(gold, "open"), sample)


@pytest.mark.skipif(not REPLIES.exists(), reason="needs ../shared/cases")
def test_replies_that_others_graded():
    """At most 3 % of what a careful person accepts is rejected, no form whole, and nothing else is accepted."""
    accepted, rejected = Counter(), Counter()
    for line in REPLIES.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["acceptable"] is None:
            continue
        sample = Question("q", "s", "t", (), kind=row["kind"], question=row["question"], answer=row["answer"])
        language = row["meta"].get("language", "en")
        right = matches(parse_answer(row["reply"], row["kind"], row["options"], language=language), sample)
        assert row["acceptable"] or not right, row
        if row["acceptable"]:
            (accepted if right else rejected)[row["form"]] += 1
    assert rejected.total() <= 0.03 * (accepted.total() + rejected.total()), rejected
    assert not set(rejected) - set(accepted)
