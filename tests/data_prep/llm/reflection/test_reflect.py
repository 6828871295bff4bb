"""`reflect` against a scripted model: what is kept reaches its answer, the rest is counted, nothing is sent twice."""

from __future__ import annotations

import json
import re

import pytest

from data_prep.llm import Budget, BudgetReached, Endpoint
from data_prep.llm.reflection import reflect as module
from data_prep.llm.reflection.reflect import LOOK_AGAIN, Plan, reflect, unsampled
from infimed_jax.config import Grpo
from infimed_jax.data.prompts import as_turns
from infimed_jax.data.storage import open_samples, write_samples
from infimed_jax.errors import UserError
from infimed_jax.rl.rewards import Attempt
from infimed_jax.rl.rewards.verifiable import score
from tests.data_prep import loopback as lo
from tests.data_prep.samples import caption, damage, question

SECRET = "SECRET-PATIENT-TEXT"


def endpoint(server, **options) -> Endpoint:
    return Endpoint(**({"model": "seer", "url": server.url, "pause": 0.01, "timeout": 60.0, "attempts": 2} | options))


def number_of(body) -> int:
    text = "".join(p["text"] for p in body["messages"][1]["content"] if p["type"] == "text")
    return int(re.search(r"organ is number (\d+)\?", text)[1])


def looks_again(body) -> bool:
    return body["messages"][-1]["content"] in LOOK_AGAIN.values()


def reply(answer: str, thoughts: str = "It is dark there.") -> lo.Behaviour:
    return lo.say(f"<think>{thoughts}</think>\n\\boxed{{{answer}}}")


def dataset(tmp_path, samples):
    write_samples(tmp_path / "in", samples, name="questions")
    return tmp_path / "in"


def whole(sample) -> str:
    turn = as_turns(sample)[-1]
    return f"<think>{turn.reasoning}</think>{''.join(turn.content)}"


def test_only_what_reaches_its_answer_is_kept_and_the_rest_is_counted(tmp_path):
    folder = dataset(tmp_path, [*(question(i) for i in range(6)), caption(99)])
    says = {
        0: lambda seed: reply("left lung", f"Draw {seed}."),
        1: lambda seed: reply("right lung"),
        2: lambda seed: reply("left lung") if seed == 3 else lo.say("left lung"),
        3: lambda seed: lo.say("<think>It is", finish="length"),
        4: lambda seed: lo.html,
        5: lambda seed: reply("left lung", "ok") if seed == 0 else reply("liver"),
    }
    with lo.serve(lambda body, _: says[number_of(body)](body["seed"])) as server:
        report = reflect(folder, tmp_path / "out", endpoint(server), Plan(draws=4, sparse_words=0))
    made = list(open_samples(tmp_path / "out"))
    assert [sample.id for sample in made] == [f"vqa_rad/train/{i}/reflect-0" for i in (0, 2, 5)]
    originals = {sample.id: sample for sample in open_samples(folder)}
    for sample in made:
        parent = originals[sample.meta["parent"]]
        assert (sample.images, sample.question, sample.answer) == (parent.images, parent.question, parent.answer)
        assert score(Attempt(parent, whole(sample), True), Grpo()).total == pytest.approx(1.0)
        assert sample.meta["reflection"] == "plain" and sample.meta["reasoning_by"] == "seer"
        assert "\\boxed{}" in as_turns(sample)[0].content[-1]  # the prompt asks for the form that the reply has
    assert [sample.meta["reasoning_right"] for sample in made] == ["4/4", "1/4", "1/4"]
    assert made[1].meta["reasoning_draws"] == "3" and made[1].reasoning == "It is dark there."
    assert report["left_out"] == {"no question with a gold answer": 1}
    assert report["alike"] == 2 and unsampled(report) == ""  # questions 1 and 3; 4 had no reply
    assert report["questions"] == 6 and report["reached"] == 3 and report["samples"] == 3
    assert report["patterns"] == {"plain": 3}
    assert report["failed"] == {"endpoint: HTML instead of JSON": 1}
    assert report["rejected"] == {
        "cut by the limit": 4, "endpoint: HTML instead of JSON": 4, "not in the asked form": 3, "wrong answer": 7
    }  # fmt: skip
    assert report["sources"] == {"vqa_rad": {"questions": 6, "reached": 3, "draws": 24, "draws_right": 6}}
    assert sum(report["rejected"].values()) + 6 == 24
    assert json.loads((tmp_path / "out.json").read_text()) == report


def test_an_endpoint_that_takes_no_temperature_is_told(tmp_path):
    folder = dataset(tmp_path, [question(i) for i in range(3)])
    with lo.serve(lambda body, _: lo.html if number_of(body) == 2 else reply("left lung")) as server:
        report = reflect(folder, tmp_path / "out", endpoint(server), Plan(draws=3, sparse_words=0))
        assert report["alike"] == 2 and "all draws of each of 2 questions are the same" in unsampled(report)
        one = reflect(folder, tmp_path / "one", endpoint(server), Plan(draws=1, sparse_words=0))
        assert one["alike"] == 0 and unsampled(one) == ""
    with lo.serve([reply("liver")]) as server, pytest.raises(UserError, match=r"answer: 9\): all draws .* the same"):
        reflect(folder, tmp_path / "wrong", endpoint(server), Plan(draws=3))
    with lo.serve([lo.status(400)]) as server, pytest.raises(UserError, match=r"400: 3\): fix that and run the same"):
        reflect(folder, tmp_path / "refused", endpoint(server), Plan(draws=3))


def test_damaged_records_are_named_counted_and_not_asked(tmp_path):
    folder = dataset(tmp_path, [question(i) for i in range(3)])
    damage(folder)
    with lo.serve(lambda body, _: reply("left lung")) as server:
        report = reflect(folder, tmp_path / "out", endpoint(server), Plan(draws=1, sparse_words=0), max_bad_records=0.5)
    assert [s.meta["parent"] for s in open_samples(tmp_path / "out")] == ["vqa_rad/train/1", "vqa_rad/train/2"]
    assert report["left_out"] == {"unreadable record": 1}
    assert report["unreadable_records"] == [f"{open_samples(folder).name} record 0"]


def test_the_gold_answer_is_never_told(tmp_path):
    folder = dataset(tmp_path, [question(0, answer="hepatomegaly")])
    with (
        lo.serve([reply("liver")]) as server,
        pytest.raises(UserError, match=r"no reply .* reached its answer .wrong answer: 4"),
    ):
        reflect(folder, tmp_path / "out", endpoint(server))
    assert len({body["seed"] for body in server.requests}) == 4
    for body in server.requests:
        assert "hepatomegaly" not in json.dumps(body) and body["temperature"] == 1.0
        assert [p["type"] for p in body["messages"][1]["content"]] == ["image_url", "text"]


def test_sparse_sources_get_patterns_and_others_none(tmp_path):
    long_answer = "a homogeneous opacity in the left lower lobe with an effusion"
    folder = dataset(
        tmp_path,
        [*(question(i) for i in range(30)), *(question(100 + i, "slake", answer=long_answer) for i in range(5))],
    )

    def answer(body, _):
        number, seed = number_of(body), body["seed"]
        if looks_again(body):
            return reply("left lung", f"The second look at {number}.")
        if number >= 100:
            return reply(long_answer, f"Draw {seed} of {number}.")
        # 0-9: one wrong, one right. 10-19: all right. 20-29: one right, the rest without form
        right = {0: seed == 1, 1: True, 2: seed == 2}[number // 10]
        text = f"Draw {seed} of {number}."
        if number >= 20 and not right:
            return lo.say(text)
        return reply("left lung" if right else f"liver {seed}", text)

    with lo.serve(answer) as server:
        report = reflect(folder, tmp_path / "out", endpoint(server), Plan(draws=3))
        asked_again = [body for body in server.requests if looks_again(body)]
    assert report["reflective_sources"] == ["vqa_rad"]
    assert report["median_answer_words"] == {"slake": 11, "vqa_rad": 2}
    made = {sample.meta["parent"]: sample for sample in open_samples(tmp_path / "out")}
    assert len(made) == 35
    seen = {0: set(), 1: set(), 2: set()}
    for parent, sample in made.items():
        number, pattern, thoughts = int(parent.rsplit("/")[-1]), sample.meta["reflection"], sample.reasoning
        draws = [int(draw) for draw in sample.meta["reasoning_draws"].split(",")]
        assert score(Attempt(sample, whole(sample), True), Grpo()).total == pytest.approx(1.0)
        if number >= 100:
            assert pattern == "plain" and thoughts == f"Draw {draws[0]} of {number}."
            continue
        seen[number // 10].add(pattern)
        first = thoughts.index(f"Draw {draws[0]} of {number}.")
        second = f"The second look at {number}." if pattern == "reexamined" else f"Draw {draws[1]} of {number}."
        assert first == 0 and thoughts.index(second) > first
        if pattern == "corrected":
            assert draws[1] == 1 and f"liver {draws[0]}" in thoughts[: thoughts.index(second)]
    assert seen == {0: {"corrected", "reexamined"}, 1: {"verified", "reexamined"}, 2: {"reexamined"}}
    # to look again, the model is shown its own right chain, and the image once more
    assert len(asked_again) == report["patterns"]["reexamined"]
    for body in asked_again:
        assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
        assert f"of {number_of(body)}.</think>\\boxed{{left lung}}" in body["messages"][2]["content"]


def test_a_second_look_that_contradicts_or_fails_is_not_used(tmp_path):
    folder = dataset(tmp_path, [question(i) for i in range(12)])

    def answer(body, _):
        if looks_again(body):
            return reply("right lung", "Now I doubt it.") if number_of(body) % 2 else lo.html
        return reply("left lung", "Always the same.")  # equal chains verify nothing

    with lo.serve(answer) as server:
        report = reflect(folder, tmp_path / "out", endpoint(server), Plan(draws=2))
    assert report["patterns"] == {"plain": 12}
    assert report["account"]["counts"]["failed: HTML instead of JSON"] == 6


def test_several_samples_of_a_question_are_the_best_first(tmp_path):
    folder = dataset(tmp_path, [question(0)])
    with lo.serve(lambda body, _: reply("left lung", f"Draw {body['seed']}.")) as server:
        report = reflect(folder, tmp_path / "out", endpoint(server), Plan(draws=4, keep=3))
    made = list(open_samples(tmp_path / "out"))
    assert [sample.id.rsplit("/")[-1] for sample in made] == ["reflect-0", "reflect-1", "reflect-2"]
    assert made[0].meta["reflection"] in ("verified", "reexamined") and report["samples"] == 3
    assert len({sample.reasoning for sample in made}) == 3


def test_a_second_run_sends_nothing_and_a_stopped_one_goes_on(tmp_path):
    folder = dataset(tmp_path, [question(i) for i in range(8)])

    def answer(body, _):
        return lo.say(f"<think>Draw {body['seed']}.</think>\\boxed{{left lung}}",
                      usage={"prompt_tokens": 3000, "completion_tokens": 100})  # fmt: skip

    plan = Plan(draws=3, sparse_words=0)
    with lo.serve(answer) as server:
        with pytest.raises(BudgetReached):
            reflect(folder, tmp_path / "out", endpoint(server, budget=Budget(tokens=40_000)), plan)
        sent = len(server.requests)
        assert 0 < sent < 24 and not (tmp_path / "out").exists()
        first = reflect(folder, tmp_path / "out", endpoint(server), plan)
        assert len(server.requests) == 24
        assert reflect(folder, tmp_path / "out", endpoint(server), plan) == first  # done: not even the cache is read
        fresh = reflect(folder, tmp_path / "again", endpoint(server), plan, cache=tmp_path / "out.cache")
        assert len(server.requests) == 24
        assert fresh["fingerprint"] == first["fingerprint"]
        other = reflect(folder, tmp_path / "out", endpoint(server), Plan(draws=4, sparse_words=0))
        assert len(server.requests) == 24 + 8 and other["samples"] == 8


def test_what_the_endpoint_failed_at_is_asked_again_by_the_same_command(tmp_path):
    folder = dataset(tmp_path, [question(i) for i in range(4)])
    up = []
    with lo.serve(lambda body, _: lo.html if number_of(body) == 2 and not up else reply("left lung")) as server:
        first = reflect(folder, tmp_path / "out", endpoint(server), Plan(draws=2, sparse_words=0))
        assert first["samples"] == 3 and first["failed"] == {"endpoint: HTML instead of JSON": 1}
        up.append(True)
        sent = len(server.requests)
        second = reflect(folder, tmp_path / "out", endpoint(server), Plan(draws=2, sparse_words=0))
        assert second["samples"] == 4 and second["failed"] == {} and len(server.requests) == sent + 2
    assert len(open_samples(tmp_path / "out")) == 4


def test_an_output_with_other_files_is_refused_before_anything_is_sent(tmp_path):
    folder = dataset(tmp_path, [question(0)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with lo.serve([reply("left lung")]) as server:
        with pytest.raises(UserError, match="holds other files"):
            reflect(folder, tmp_path / "out", endpoint(server))
        assert not server.requests


def test_answers_that_no_box_can_hold_and_other_oddities_are_left_out_by_reason(tmp_path):
    odd = [
        question(0, answer="a } b"),
        question(1),
        question(2, answer="\u200b?"),
        question(3, images=(b"no image",)),
    ]
    folder = dataset(tmp_path, odd)
    with lo.serve([reply("left lung")]) as server:
        report = reflect(folder, tmp_path / "out", endpoint(server), Plan(draws=2, sparse_words=0))
    assert report["left_out"] == {"answer that no box can hold": 2}
    assert report["failed"] == {"image: not a supported image": 1} and report["samples"] == 1


def test_nothing_to_ask_and_nowhere_to_send_are_told(tmp_path, monkeypatch):
    folder = dataset(tmp_path, [caption(0, "mimic")])
    local = Endpoint("m", "http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="has no question to reason about"):
        reflect(folder, tmp_path / "out", local)
    monkeypatch.setattr(module, "run_jobs", lambda *_: pytest.fail("sent"))
    outside = Endpoint("m", "https://8.8.8.8/v1", budget=Budget(tokens=10))
    with pytest.raises(UserError, match="source mimic is not cleared"):
        reflect(folder, tmp_path / "out", outside)


def test_no_text_gets_into_the_report_or_the_output(tmp_path, capsys):
    folder = dataset(tmp_path, [question(0, question=f"{SECRET} organ is number 0?"), question(1)])
    with lo.serve(lambda body, _: reply("left lung", SECRET) if number_of(body) else lo.status(500)) as server:
        reflect(folder, tmp_path / "out", endpoint(server))
    assert SECRET not in "".join(capsys.readouterr()) + (tmp_path / "out.json").read_text()


@pytest.mark.parametrize(
    "options", [{"draws": 0}, {"keep": 0}, {"max_tokens": 0}, {"temperature": 0.0}, {"sparse_words": -1}]
)
def test_impossible_plans_are_refused(options):
    with pytest.raises(UserError):
        Plan(**options)
