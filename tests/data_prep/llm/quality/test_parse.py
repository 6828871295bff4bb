"""A rater's reply: what a person would read as six scores is read so, and nothing else is."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.llm.quality.parse import LONGEST, BadReply, parse_rating
from data_prep.llm.quality.rubric import DIMENSIONS, KEYS, instructions

SCORES = (4, 5, 3, 1, 2, 4)


def reply(scores=SCORES, dialogue=False, **changed) -> dict:
    names = [d.other_key if dialogue and d.other_key else d.key for d in DIMENSIONS]
    rating = {name: {"score": score, "comment": "Well."} for name, score in zip(names, scores, strict=True)}
    return rating | changed


PLAIN = json.dumps(reply())
READABLE = {
    "plain": PLAIN,
    "indented": json.dumps(reply(), indent=2),
    "dialogue": json.dumps(reply(dialogue=True)),
    "fenced": f"```json\n{PLAIN}\n```",
    "in prose": f"Here is my rating {{as asked}}:\n{PLAIN}\nI hope this helps {{you}}.",
    "after thoughts": f'<think>"Overall": {{"score": 1, "comment": "no"}}, hm</think>{PLAIN}',
    "without the last brace": PLAIN[:-1],
    "without the first brace": PLAIN[1:],
    "wrapped": json.dumps({"ratings": reply(), "model": None}),
    "in a list": json.dumps([{key: value} for key, value in reply().items()]),
    "trailing commas": PLAIN.replace('"Well."}', '"Well.",}').replace("}}", "},}"),
    "bare newlines": PLAIN.replace("Well.", "Well,\nas it is."),
    "score last": json.dumps({k: {"comment": v["comment"], "score": v["score"]} for k, v in reply().items()}),
    "other case": PLAIN.replace("Medical Information Accuracy", "medical information accuracy"),
    "underscores": PLAIN.replace("Medical Imaging Relevance", "Medical_Imaging_Relevance"),
    "said twice alike": PLAIN + "\n" + PLAIN,
    "more keys": json.dumps(reply(Novelty={"score": 9})),
    "braces in comments": PLAIN.replace("Well.", 'A {brace} and a \\"quote\\", done'),
    "chinese comments": PLAIN.replace("Well.", "描述准确。"),
}


@pytest.mark.parametrize("case", READABLE)
def test_what_a_person_would_read(case):
    rating = parse_rating(READABLE[case])
    assert tuple(rating) == KEYS
    assert tuple(score.score for score in rating.values()) == SCORES


def one(value) -> str:
    return json.dumps(reply(Practicality=value))


UNREADABLE = {
    "nothing": "",
    "prose": "I would give it four out of five on all six dimensions.",
    "refusal": "Sorry, I can't rate medical images.",
    "null score": one({"score": None, "comment": "x"}),
    "null": one(None),
    "zero": one({"score": 0, "comment": "x"}),
    "six": one({"score": 6, "comment": "x"}),
    "negative": one({"score": -1, "comment": "x"}),
    "a half": one({"score": 3.5, "comment": "x"}),
    "a float": one({"score": 4.0, "comment": "x"}),
    "text": one({"score": "4", "comment": "x"}),
    "true": one({"score": True, "comment": "x"}),
    "a list": one({"score": [4], "comment": "x"}),
    "bare number": one(4),
    "without a score": one({"comment": "x"}),
    "without a comment": one({"score": 4}),
    "null comment": one({"score": 4, "comment": None}),
    "NaN": one({"score": float("nan"), "comment": "x"}),
    "the form itself": instructions(False),
    "cut in the middle": PLAIN[: len(PLAIN) // 2],
    "cut in the last comment": PLAIN[:-5],
    "a dimension missing": json.dumps({k: v for k, v in reply().items() if k != "Overall"}),
    "two that differ": PLAIN + json.dumps(reply(scores=(4, 5, 3, 1, 2, 5))),
    "caption and dialogue differ": json.dumps(reply() | {"Dialogue Completeness": {"score": 5, "comment": "x"}}),
    "thoughts only": f"<think>{PLAIN}</think>",
    "thoughts without an end": f"<think>{PLAIN}",
    "too long": PLAIN + " " * LONGEST,
    "deep": '"Overall": ' + "[" * 20_000,
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_no_rating(case):
    with pytest.raises(BadReply) as error:
        parse_rating(UNREADABLE[case])
    assert "x" not in str(error.value).split() and "Well" not in str(error.value)


WORDS = st.text(st.sampled_from('Rate: it {as} [you]\n,`"\\ 四分'), max_size=20)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 5), min_size=6, max_size=6), WORDS, WORDS, st.booleans())
def test_any_scores_between_any_words_come_back(scores, before, after, dialogue):
    rating = parse_rating(before + json.dumps(reply(scores, dialogue)) + after)
    assert [score.score for score in rating.values()] == scores


@settings(deadline=None, max_examples=60)
@given(st.integers(0, len(PLAIN)))
def test_a_cut_reply_is_whole_or_refused_never_changed(end):
    try:
        rating = parse_rating(PLAIN[:end])
    except BadReply:
        return
    assert tuple(score.score for score in rating.values()) == SCORES


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.text(), WORDS))
def test_any_text_is_read_or_refused(text):
    with pytest.raises(BadReply):
        parse_rating(text)
