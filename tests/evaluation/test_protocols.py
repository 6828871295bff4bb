"""The three protocols against tables of MedEvalKit's documented behaviour, quirks included."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infimed_jax.data.sample import Question
from infimed_jax.evaluation.benchmark import benchmark_of
from infimed_jax.evaluation.protocols import PROTOCOLS, ask, grade


def by(protocol):
    """The protocol as it grades a sample of its benchmark."""
    return lambda sample, reply, finished: grade(sample, reply, finished, protocol, benchmark_of(sample))


STRICT, FIXED, FIRST = (by(name) for name in ("strict", "medevalkit-fixed", "medevalkit-2025-06"))
ORGANS = ("lung", "liver", "left kidney")


def question(kind, answer, options=(), benchmark="vqa_rad", **meta):
    meta |= {"benchmark": benchmark} if benchmark else {}
    return Question("q", "mine", "t", (), kind, "Q?", answer, options, meta=meta)


def test_the_protocols_are_three():
    assert set(PROTOCOLS) == {"strict", "medevalkit-fixed", "medevalkit-2025-06"}


@pytest.mark.parametrize(
    ("reply", "gold", "strict", "fixed", "first"),
    [
        ("yes", "yes", True, True, True),
        ("Yes.", "yes", True, True, True),
        ("No", "yes", False, False, False),
        ("normal", "no", False, True, False),  # "no" is a part of "normal"
        ("abnormal", "no", False, True, False),
        ("yes, a nodule", "yes", True, False, False),  # "no" is a part of "nodule"
        ("Yes, it is", "yes", True, True, False),
        ("Yes. It is", "yes", True, True, True),
        ("Yesterday", "yes", False, True, False),
        ("I say yes", "yes", False, True, False),
        ("yes or no", "yes", False, False, False),
        ("", "no", False, False, False),
        ("\\boxed{yes}", "yes", True, True, True),
        ("\\boxed{no} \\boxed{yes}", "yes", False, True, True),
        ("no <answer>yes</answer>", "yes", True, True, True),
        ("Is it no? Final answer: yes", "yes", True, True, False),
        ("not \\boxed", "no", False, False, False),  # the helper says "None", whose "No" has a capital
        ("<think>no</think>\\boxed{yes}", "yes", True, True, True),
        ("<think>no</think>yes", "yes", True, False, False),
    ],
)
def test_yes_no(reply, gold, strict, fixed, first):
    sample = question("yes_no", gold)
    assert (STRICT(sample, reply, True).correct, FIXED(sample, reply, True).correct) == (strict, fixed)
    assert FIRST(sample, reply, True).correct is first


@pytest.mark.parametrize(
    ("reply", "fixed"),
    [
        ("Yes", True),
        ("yes.", True),
        ("Yes it is", False),  # SLAKE's capital "Yes" goes to the closed rule, equal text
        (" yes", False),
        ("y\nes", True),
        ("The answer is yes", False),  # the blank after the marker stays
        ("answer:yes", True),
        ("\\boxed{ Yes }", True),  # the box is stripped by its helper
    ],
)
def test_slake_scores_yes_and_no_as_closed_text(reply, fixed):
    assert FIXED(question("yes_no", "yes", benchmark="slake"), reply, True).correct is fixed


def test_first_release_leaves_slake_to_the_judge_so_to_exact_match():
    sample = question("yes_no", "yes", benchmark="slake")
    assert FIRST(sample, "Yes", True).correct
    assert not FIRST(sample, "yes.", True).correct
    assert "without a judge" in FIRST(sample, "Yes", True).rule


@pytest.mark.parametrize(
    ("reply", "letter", "rule"),
    [
        ("B", "B", "choice by letter"),
        ("b.", "B", "choice by letter"),
        ("B. liver", "B", "choice by letter"),
        ("B\n\nbecause it is brown: like a lung", "B", "choice by letter"),
        ("It is brown\n\nB. liver", "B", "choice by letter"),
        ("\\boxed{B}", "B", "choice by letter"),
        ("Answer: B", "B", "choice by letter"),
        ("<answer>B</answer>", "B", "choice by letter"),
        ("Answer: A. But: B", "A", "choice by letter"),  # before the first full stop, after the last colon
        ("liver", "B", "choice by similarity"),  # the options are "A. lung", "B. liver", "C. left kidney"
        ("B: liver", "B", "choice by similarity"),
        ("the liver", "B", "choice by similarity"),
        ("(B)", "B", "choice by similarity"),
        ("B)", "B", "choice by similarity"),
        ("D", "C", "choice by similarity"),  # no letter of this question; "left kidney" has a d
        ("", "A", "choice by similarity"),
        ("?", "A", "choice by similarity"),  # no option has a character of it, so the first
        ("left kidneys", "C", "choice by similarity"),
    ],
)
def test_choice_is_never_unparsed(reply, letter, rule):
    for gold in "ABC":
        for judge in (FIXED, FIRST):
            verdict = judge(question("choice", gold, ORGANS), reply, True)
            assert (verdict.parsed, verdict.correct, verdict.status) == (letter, gold == letter, "ok")
            assert verdict.rule == rule


def test_choice_strict_reads_what_compat_does_not_and_the_other_way():
    sample = question("choice", "B", ORGANS)
    assert STRICT(sample, "Option B", True).correct and not FIXED(sample, "Option B", True).correct
    assert FIXED(sample, "livers", True).correct and not STRICT(sample, "livers", True).correct
    assert STRICT(sample, "", True).status == "unparsed"


def test_choices_are_compared_as_their_file_writes_them():
    plain = question("choice", "B", ("B", "A"))
    assert not FIXED(plain, "A", True).correct
    bare = replace(plain, meta=plain.meta | {"options_shown": '["B", "A"]'})
    assert FIXED(bare, "A", True).correct  # an option that reads like the gold letter counts
    assert not STRICT(bare, "A", True).correct
    cells = replace(bare, options=("lung", "liver"), meta=plain.meta | {"options_shown": '["liver", "lung"]'})
    verdict = FIXED(cells, "lung", True)
    assert (verdict.parsed, verdict.rule, verdict.correct) == ("B", "choice by text", True)


@pytest.mark.parametrize(
    ("benchmark", "letter"), [("omnimedvqa", "B"), ("medxpertqa", "B"), ("pmc_vqa", "A"), ("", "A")]
)
def test_two_benchmarks_take_the_tag_out_of_a_choice_first(benchmark, letter):
    reply = "A\n\nNo: <answer>B</answer>"
    assert FIXED(question("choice", "B", ORGANS, benchmark), reply, True).parsed == letter
    assert FIRST(question("choice", "B", ORGANS, benchmark), reply, True).parsed == "B"


@pytest.mark.parametrize(
    ("reply", "fixed", "first"),
    [
        ("A\n\nWait: \\boxed{B}", "A", "B"),  # the first release takes the box, the later one the first paragraph
        ("\\boxed{A}\n\nB", "B", "A"),
        ("\\boxed{A} or \\boxed{B}", "B", "B"),
        ("not boxed\n\nB", "B", "C"),  # without a box its helper says "None", which is most like "C. left kidney"
    ],
)
def test_the_first_release_takes_a_choice_s_box_before_its_paragraphs(reply, fixed, first):
    for benchmark in ("omnimedvqa", "pmc_vqa", ""):
        sample = question("choice", "B", ORGANS, benchmark)
        assert (FIXED(sample, reply, True).parsed, FIRST(sample, reply, True).parsed) == (fixed, first)


@pytest.mark.parametrize(
    ("reply", "strict", "fixed"),
    [
        ("Liver", True, True),
        ("liver.", True, False),  # open text keeps its full stop
        ("the liver", True, False),
        (" liver\n", True, True),  # VQA-RAD strips before the rule
        ("\\boxed{Liver}", True, True),
        ("The answer is liver", True, False),  # the blank after the marker stays
        ("The answer is:liver", True, False),
        ("Answer:liver", True, True),
        ("**Answer**:liver", True, True),  # the longer marker goes first, colon and all
        ("Answer:lung, answer:liver", False, True),  # what follows the last marker
        ("lung", False, False),
        ("liver lung", False, False),
    ],
)
def test_open_questions_by_exact_match(reply, strict, fixed):
    sample = question("open", "Liver")
    assert STRICT(sample, reply, True).correct is strict
    for judge in (FIXED, FIRST):
        verdict = judge(sample, reply, True)
        assert verdict.correct is fixed
        assert verdict.rule == "open, exact match without a judge"


@pytest.mark.parametrize(
    ("reply", "fixed"),
    [
        ("Left Lung", True),
        ("left lung.", True),
        ("left\nlung", False),
        ("left lung, lower", False),
        ("leftlung", False),
    ],
)
def test_closed_questions_by_equal_text(reply, fixed):
    assert FIXED(question("closed", "Left lung", benchmark="slake"), reply, True).correct is fixed


def test_answer_tags_are_joined_by_blanks():
    sample = question("open", "left lung")
    reply = "<answer>left</answer> or <answer>lung</answer>"
    assert FIXED(sample, reply, True).correct and FIRST(sample, reply, True).correct
    assert not STRICT(sample, reply, True).correct


@pytest.mark.parametrize(
    ("benchmark", "kind", "answer_type", "compat"),
    [
        ("vqa_rad", "closed", "CLOSED", "open"),
        ("vqa_rad", "yes_no", "CLOSED", "yes_no"),
        ("vqa_rad", "open", "OPEN", "open"),
        ("slake", "yes_no", "CLOSED", "closed"),
        ("slake", "closed", "CLOSED", "closed"),
        ("slake", "open", "OPEN", "open"),
        ("slake", "yes_no", "OPEN", "open"),
        ("slake", "yes_no", "", "closed"),
        ("path_vqa", "yes_no", "", "yes_no"),
        ("path_vqa", "closed", "CLOSED", "open"),
    ],
)
def test_compat_asks_vqa_rad_by_its_answers_and_slake_by_its_types(benchmark, kind, answer_type, compat):
    sample = question(kind, "yes", benchmark=benchmark, **({"answer_type": answer_type} if answer_type else {}))
    assert ask(sample, "strict", benchmark_of(sample)) == sample
    for protocol in ("medevalkit-fixed", "medevalkit-2025-06"):
        assert ask(sample, protocol, benchmark_of(sample)) == replace(sample, kind=compat)
    assert FIXED(sample, "yes.", True).correct is (compat != "open")  # there a full stop is an error


def test_cut_replies_are_counted_apart_and_only_strict_calls_them_wrong():
    sample = question("yes_no", "yes")
    assert (STRICT(sample, "yes", False).correct, STRICT(sample, "yes", False).status) == (False, "truncated")
    assert (FIXED(sample, "yes", False).correct, FIXED(sample, "yes", False).status) == (True, "truncated")


SAMPLES = [
    question("yes_no", "no"),
    question("yes_no", "no", benchmark="slake"),
    question("choice", "C", ORGANS),
    *(question("choice", "C", ORGANS, name) for name in ("pmc_vqa", "omnimedvqa", "mmmu_med", "")),
    question("closed", "lung"),
    question("open", "left lung"),
]


@given(st.text(), st.booleans(), st.sampled_from(SAMPLES), st.sampled_from(sorted(PROTOCOLS)))
def test_any_reply_gets_a_verdict(reply, finished, sample, protocol):
    verdict = by(protocol)(sample, reply, finished)
    assert isinstance(verdict.correct, bool)
    assert verdict.status in ("ok", "unparsed", "truncated", "unread")
    assert not (verdict.correct and verdict.status in ("unparsed", "unread"))
    assert (verdict.parsed is None) >= (verdict.status == "unread")


@given(st.sampled_from(SAMPLES), st.sampled_from(sorted(PROTOCOLS)))
def test_the_bare_gold_answer_is_right_everywhere(sample, protocol):
    assert by(protocol)(sample, sample.answer, True).correct
    assert by(protocol)(sample, f"\\boxed{{{sample.answer}}}", True).correct
