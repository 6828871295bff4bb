"""Chains and patterns: what is accepted is what the reward accepts, and a pattern says what its parts said."""

import random

import pytest

from data_prep.llm import Reply
from data_prep.llm.reflection.chains import Chain, boxed, corrected, holds, read_chain, reexamined, verified
from infimed_jax.config import Grpo
from infimed_jax.rl.rewards import Attempt
from infimed_jax.rl.rewards.verifiable import score
from tests.data_prep.samples import question

OPEN = question(0)
CHOICE = question(1, kind="choice", answer="B", options=("liver", "spleen"))
YES = question(2, kind="yes_no", answer="yes")

REPLIES = [
    ("<think>It is dark.</think>\\boxed{left lung}", ""),
    ("<think>It is dark.</think>\n\n\\boxed{The Left Lung}.", ""),
    ("<think>It is dark.</think>\\boxed{right lung}", "wrong answer"),
    ("<think>It is dark.</think>left lung", "not in the asked form"),
    ("\\boxed{left lung}", "not in the asked form"),
    ("<think>It is dark.</think>\\boxed{left lung} \\boxed{right lung}", "not in the asked form"),
    ("<think></think>\\boxed{left lung}", "not in the asked form"),
    ("<think>left lung \\boxed{left lung}", "not in the asked form"),
    ("Sorry, I can't help with medical images.", "not in the asked form"),
    ("", "not in the asked form"),
]


@pytest.mark.parametrize(("text", "reason"), REPLIES)
def test_a_chain_is_accepted_where_the_reward_is_whole(text, reason):
    chain, why = read_chain(Reply(text, "", "stop"), 3, OPEN)
    assert why == reason
    assert (score(Attempt(OPEN, text, True), Grpo()).total == pytest.approx(1.0)) == (reason == "")
    if reason in ("", "wrong answer"):
        assert chain == Chain(3, "It is dark.", "left lung" if not reason else "right lung")
    else:
        assert chain is None


def test_thoughts_may_come_apart_from_the_text():
    assert read_chain(Reply("\n\\boxed{left lung}", "It is dark.", "stop"), 0, OPEN)[1] == ""
    assert read_chain(Reply("<think>a</think>\\boxed{left lung}", "b", "stop"), 0, OPEN)[1] == "not in the asked form"


@pytest.mark.parametrize(("finish", "reason"), [("length", "cut by the limit"),
                                                ("content_filter", "refused by the endpoint's filter")])  # fmt: skip
def test_a_cut_or_filtered_reply_is_none_whatever_it_holds(finish, reason):
    assert read_chain(Reply(REPLIES[0][0], "", finish), 0, OPEN) == (None, reason)


def test_an_answer_that_is_no_option_is_no_chain():
    text = "<think>It is dark.</think>\\boxed{%s}"
    assert read_chain(Reply(text % "E", "", "stop"), 0, CHOICE) == (None, "no answer of the question's kind")
    assert read_chain(Reply(text % "A or B", "", "stop"), 0, CHOICE)[0] is None
    assert read_chain(Reply(text % "spleen", "", "stop"), 0, CHOICE)[0].answer == "B"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(
    ("sample", "false", "spoken"),
    [(OPEN, "right {left} lung", ("right {left} lung", "left lung")), (CHOICE, "A", ("A (liver)", "B (spleen)")),
     (YES, "no", ("no", "yes"))],
)  # fmt: skip
def test_patterns_hold_their_parts_in_order_and_pass_the_reward(seed, language, sample, false, spoken):
    rng = random.Random(seed)
    answer = sample.answer
    wrong, right, third = (
        Chain(0, "First {right} thoughts.", false),
        Chain(2, "Second.", answer),
        Chain(1, "3.", answer),
    )
    for made, parts, draws in (
        (
            corrected(sample, wrong, right, language, rng),
            (wrong.thoughts, spoken[0], right.thoughts, spoken[1]),
            (0, 2),
        ),
        (verified(sample, third, right, language, rng), (third.thoughts, right.thoughts, spoken[1]), (1, 2)),
        (reexamined(sample, right, third, language, rng), (right.thoughts, third.thoughts, spoken[1]), (2, 1)),
    ):
        places = [made.reasoning.find(part) for part in parts]
        last = made.reasoning.rfind(parts[-1])
        assert -1 not in places and places[:-1] == sorted(places[:-1]) and last > places[-2]
        assert made.draws == draws and holds(sample, made)
        assert score(Attempt(sample, boxed(made.reasoning, answer), True), Grpo()).total == pytest.approx(1.0)


def test_yes_and_no_are_spoken_in_the_question_s_language():
    sample = question(3, kind="yes_no", answer="no", meta={"language": "zh"})
    made = corrected(sample, Chain(0, "一", "yes"), Chain(1, "二", "no"), "zh", random.Random(0))
    assert "是" in made.reasoning and "否" in made.reasoning and "yes" not in made.reasoning
