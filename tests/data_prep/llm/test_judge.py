"""The judge of open questions: what it is shown, what it is believed, and what it does to a score."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from data_prep.llm import Budget, Endpoint
from data_prep.llm.judge import expected_tokens, judge, judged_text, open_questions
from infimed_jax.config import Sampling
from infimed_jax.data.sample import Question
from infimed_jax.errors import UserError
from infimed_jax.evaluation.respondents import Predictions, Terms
from infimed_jax.evaluation.run import evaluate
from tests.data_prep import loopback as lo

GIVEN = {
    "0": "lung",  # equal
    "1": "pulmonary tissue",  # means the same
    "2": "<think>lung</think>The heart.",  # other
    "3": "",
    "4": "Lung. No heart.",
    "5": "yes",
}


@pytest.fixture
def result(tmp_path):
    def make(protocol: str = "strict", given=GIVEN):
        samples = [
            Question(f"slake/test/{n}", "slake", "test", (), kind="yes_no" if n == "5" else "open", question="Where?",
                     answer="yes" if n == "5" else "lung", alternatives=("lungs",) if n == "0" else (),
                     meta={"image_id": n}) for n in GIVEN
        ]  # fmt: skip
        file = tmp_path / "p.jsonl"
        file.write_text("".join(json.dumps({"id": f"slake/test/{n}", "response": t}) + "\n" for n, t in given.items()))
        return evaluate(samples, Predictions(file), Terms(Sampling(), protocol))

    return make


def shown(body) -> dict:
    return json.loads(body["messages"][1]["content"])


def honest(body, number):
    return lo.say(json.dumps({"same": shown(body)["reply"] in ("lung", "pulmonary tissue")}))


def endpoint(server: lo.Server, **settings) -> Endpoint:
    return Endpoint("judge", server.url, **{"attempts": 1, "pause": 0.0, "failures_in_a_row": 99} | settings)


def test_open_questions_are_judged_beside_the_rule(result, tmp_path):
    evaluation = result()
    records = open_questions(evaluation)
    assert [record.id[-1] for record in records] == ["0", "1", "2", "3", "4"]
    with lo.serve(honest) as server:
        judged, account = judge(records, "strict", endpoint(server), tmp_path / "calls")
        again, _ = judge(records, "strict", endpoint(server), tmp_path / "calls")
        assert len(server.requests) == 4  # an empty reply needs no call, and the second time all come from the cache
    assert judged.verdicts == again.verdicts == ((True,), (True,), (False,), (False,), (False,))
    summary = judged.summary
    assert (summary["accuracy"], summary["rule_accuracy"], summary["agreement"], summary["null"]) == (0.4, 0.2, 0.8, 0)
    assert account["counts"]["sent"] == 4
    (first,) = (body for body in server.requests if shown(body)["reply"] == "lung")
    assert shown(first) == {"question": "Where?", "references": ["lung", "lungs"], "reply": "lung"}
    assert {"id": "slake/test/1", "judge": [True], "rule": False} in judged.rows()
    assert "heart" in next(shown(b)["reply"] for b in server.requests if "heart" in shown(b)["reply"])
    assert all("think" not in shown(b)["reply"] for b in server.requests)


@pytest.mark.parametrize(
    "lie",
    [
        lo.say("true"), lo.say('{"same": "true"}'), lo.say('{"same": 1}'), lo.say('{"same": true, "same ": false}'),
        lo.say('{"same": true} because'), lo.say(""), lo.say("[" * 9999), lo.say('{"same": true}', finish="length"),
        lo.status(500), lo.html, lo.cut_json, lo.reset,
    ],
)  # fmt: skip
def test_what_is_no_verdict_is_null_and_neither_right_nor_wrong(lie, result, tmp_path):
    records = open_questions(result(given={"0": "lung", "1": "heart"}))[:2]
    with lo.serve(lambda body, number: lie if shown(body)["reply"] == "heart" else honest(body, number)) as server:
        judged, _ = judge(records, "strict", endpoint(server), tmp_path / "calls")
    assert judged.verdicts == ((True,), (None,))
    assert (judged.summary["accuracy"], judged.summary["null"]) == (1.0, 1)


def test_a_judge_that_never_answers_in_time_gives_no_score(result, tmp_path):
    records = open_questions(result(given={"0": "lung"}))[:1]
    with lo.serve([lo.hang]) as server:
        judged, _ = judge(records, "strict", endpoint(server, timeout=0.2), tmp_path / "calls")
    assert judged.verdicts == ((None,),) and judged.summary["accuracy"] is None


def test_repeats_are_drawn_and_their_spread_is_given(result, tmp_path):
    records = open_questions(result(given={"0": "lung"}))[:1]
    with lo.serve(lambda body, number: lo.say(json.dumps({"same": body["seed"] != 1}))) as server:
        judged, _ = judge(records, "strict", endpoint(server), tmp_path / "calls", repeats=3)
    assert {(body["seed"], body["temperature"]) for body in server.requests} == {(0, 0.7), (1, 0.7), (2, 0.7)}
    assert judged.verdicts == ((True, False, True),)
    assert judged.summary["spread"] == [0.0, 1.0] and judged.summary["accuracy"] == pytest.approx(2 / 3)


def test_the_first_release_hands_over_what_stands_before_the_first_full_stop(result):
    record = open_questions(result("medevalkit-2025-06"))[4]
    assert judged_text(record, "medevalkit-2025-06") == "Lung"
    assert judged_text(record, "medevalkit-fixed") == "Lung. No heart."


def test_the_cost_is_known_before_the_first_call(result, tmp_path):
    records = open_questions(result())
    expected = expected_tokens(records, "strict", repeats=2)
    with lo.serve(honest) as server:
        judge(records, "strict", endpoint(server), tmp_path / "calls", repeats=2)
    sent = sum(len(m["content"].encode()) for body in server.requests for m in body["messages"]) / 4
    assert sent == pytest.approx(expected, rel=0.1)


def test_sources_that_may_not_leave_are_not_judged_outside(result, tmp_path):
    outside = Endpoint("m", "https://1.2.3.4/v1", budget=Budget(tokens=10**6))
    records = [replace(record, source="mimic_cxr") for record in open_questions(result())]
    with pytest.raises(UserError, match="mimic_cxr"):
        judge(records, "strict", outside, tmp_path)
