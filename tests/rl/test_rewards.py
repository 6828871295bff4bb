"""The reward's form check and its table of attacks; accuracy comes from the one answer grammar."""

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infimed_jax.config import Grpo
from infimed_jax.data.sample import Question
from infimed_jax.rl.rewards import Attempt, load_reward
from infimed_jax.rl.rewards.verifiable import well_formed

GRPO = Grpo()


class Earned(NamedTuple):
    total: float
    accuracy: float
    format: float


def score(reply, finished, question, grpo):
    (earned,) = load_reward(grpo.reward)([Attempt(question, reply, finished)], grpo)
    return Earned(earned.total, **earned.parts)


def sample(kind="yes_no", answer="yes", options=()):
    return Question(
        id="t/train/0", source="t", split="train", images=(), kind=kind, question="Q?", answer=answer, options=options
    )


YES = sample()
CHOICE = sample("choice", "B", ("liver", "spleen", "kidney", "left lung"))
OPEN = sample("open", "left lower lobe")


@pytest.mark.parametrize(
    ("question", "reply"),
    [
        (YES, "<think>The heart is large.</think>\n\n\\boxed{yes}"),
        (YES, "<think>\nThe heart is large.\n</think>\n\n\\boxed{Yes}.\n"),
        (CHOICE, "<think>It is the spleen.</think>\\boxed{B}"),
        (OPEN, "<think>Opacity.</think>\\boxed{left lower lobe}"),
    ],
)
def test_a_right_reply_in_the_asked_form_earns_all(question, reply):
    assert score(reply, True, question, GRPO) == (pytest.approx(1.0), 1.0, 1.0)


def test_the_two_parts_are_weighed_as_published():
    assert score("<think>No.</think>\\boxed{no}", True, YES, GRPO) == (pytest.approx(0.1), 0.0, 1.0)
    unformed = score("</think>\\boxed{yes}", True, YES, GRPO)
    assert unformed == (pytest.approx(0.9), 1.0, 0.0)
    other = Grpo(accuracy_weight=0.5, format_weight=0.5)
    assert score("<think>No.</think>\\boxed{no}", True, YES, other).total == 0.5


def test_a_truncated_reply_earns_nothing():
    for reply in ("<think>a</think>\\boxed{yes}", "<think>so yes", "\\boxed{yes}", "yes"):
        assert score(reply, False, YES, GRPO) == (0.0, 0.0, 0.0)


ATTACKS = {
    "nothing": (YES, ""),
    "blanks": (YES, " \n\t "),
    "empty box": (YES, "<think></think>\\boxed{}"),
    "blank box": (YES, "<think> </think>\\boxed{ }"),
    "both answers": (YES, "<think></think>\\boxed{yes or no}"),
    "both answers, slash": (YES, "\\boxed{yes/no}"),
    "two boxes": (YES, "<think></think>\\boxed{no} \\boxed{yes} \\boxed{no}"),
    "two boxes, right one first": (YES, "<think></think>\\boxed{yes}\\boxed{no}"),
    "answer inside the thoughts only": (YES, "<think>yes</think>"),
    "box inside the thoughts only": (YES, "<think>\\boxed{yes}</think>"),
    "box inside thoughts without end": (YES, "<think>\\boxed{yes}"),
    "word that contains the answer": (YES, "<think></think>\\boxed{yesterday}"),
    "zero-width characters alone": (YES, "<think>\u200b</think>\\boxed{\u200b\u2060}"),
    "all letters": (CHOICE, "<think></think>\\boxed{A, B, C, D}"),
    "all letters in one word": (CHOICE, "<think></think>\\boxed{ABCD}"),
    "a wrong letter with the right text behind": (CHOICE, "<think></think>\\boxed{A} spleen"),
    "all options": (CHOICE, "<think></think>\\boxed{liver spleen kidney left lung}"),
    "the right letter before a wrong one": (CHOICE, "<think></think>\\boxed{B} \\boxed{C}"),
    "letter beyond the options": (CHOICE, "<think></think>\\boxed{E}"),
    "substring of the gold answer": (OPEN, "<think></think>\\boxed{lobe}"),
    "one letter of the gold answer": (OPEN, "<think></think>\\boxed{l}"),
    "gold answer inside a list": (OPEN, "<think></think>\\boxed{left lower lobe, right lower lobe, both lungs}"),
    "punctuation": (OPEN, "<think></think>\\boxed{...}"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_earn_nothing(attack):
    question, reply = ATTACKS[attack]
    assert score(reply, True, question, GRPO) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "reply",
    [
        "\\boxed{yes}",
        "yes",
        "<think>a</think>",
        "<think>a</think>yes",
        "<think>a</think><think>b</think>\\boxed{yes}",
        "<think><think>a</think></think>\\boxed{yes}",
        "<think>a<think>b</think>\\boxed{yes}",
        "</think>a<think>\\boxed{yes}",
        "<think>a</think>\\boxed{yes}<think>b</think>",
        "<think>a</think>The answer is \\boxed{yes}",
        "<think>a</think>\\boxed{yes} or \\boxed{no}",
        "<think>a</think>\\boxed{yes} or {no}",
        "<think>a</think>\\boxed{\\boxed{yes}}",
        "<think>a</think>\\boxed{yes}}",
        "<think>a</think>\\boxed{{yes}",
        "<think>a</think>\\boxed yes",
        "<think>a</think>\\boxed{}",
        "<think></think>\\boxed{yes}",
        "<think>...</think>\\boxed{yes}",
        "<think>a</think>\\boxed{yes\u200b}",
        "<think>a\u202e</think>\\boxed{yes}",
        "<Think>a</Think>\\boxed{yes}",
        "<think>a</think>\\boxed{yes}<|im_end|>",
        "hello <think>a</think>\\boxed{yes}",
    ],
)
def test_other_forms_earn_no_format(reply):
    assert not well_formed(reply)
    assert score(reply, True, YES, GRPO).format == 0


@pytest.mark.parametrize(
    "hedge", ["\\boxed{%s}\\boxed{%s}", "%s, \\boxed{%s}", "\\boxed{\\boxed{%s}\\boxed{%s}}", "%s or %s"]
)
def test_naming_several_answers_wins_for_one_of_them_at_most(hedge):
    reply = "<think></think>" + hedge % ("no", "yes")
    assert sum(score(reply, True, sample(answer=gold), GRPO).accuracy for gold in ("yes", "no")) <= 1


def test_braces_inside_the_box_are_balanced():
    assert well_formed("<think>a</think>\\boxed{\\text{yes}}")
    assert well_formed("<think>f {x}</think>\\boxed{3 cm}.")


def test_a_very_long_reply_is_scored_in_linear_time():
    long = "<think>" + "the lung is clear. \\boxed{ { " * 50_000 + "</think>\\boxed{yes}"
    assert score(long, True, YES, GRPO).accuracy == 1
    # a pattern that backtracks would not come back from these
    assert not well_formed("<think>" + "</think>" * 50_000)
    assert not well_formed("<think>a</think>" + "\\boxed{" * 50_000)


@pytest.mark.parametrize(
    ("question", "answers"), [(YES, ["yes", "no"]), (CHOICE, list("ABCD")), (OPEN, ["left lower lobe", "right lobe"])]
)
def test_changing_the_answer_changes_the_reward(question, answers):
    totals = {a: score(f"<think>It shows.</think>\\boxed{{{a}}}", True, question, GRPO).total for a in answers}
    assert {a for a, total in totals.items() if total > 0.5} == {question.answer}
    # and the same reply to a question with another gold answer is wrong
    for answer in answers:
        other = sample(question.kind, answer, question.options)
        accuracy = score(f"<think>It shows.</think>\\boxed{{{question.answer}}}", True, other, GRPO).accuracy
        assert accuracy == (answer == question.answer)


def test_the_constant_control_pays_everything_alike_and_still_measures():
    control = Grpo(reward="constant")
    assert score("", False, YES, control) == (1.0, 0.0, 0.0)
    assert score("<think>a</think>\\boxed{yes}", True, YES, control) == (1.0, 1.0, 1.0)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("yesno <think></think>\\boxed{}.\n\u200b是")), st.booleans())
def test_any_text_gets_a_reward_between_0_and_1(reply, finished):
    reward = score(reply, finished, YES, GRPO)
    assert 0 <= reward.total <= 1 and {reward.accuracy, reward.format} <= {0.0, 1.0}
    assert finished or reward.total == 0
