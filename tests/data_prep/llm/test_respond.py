"""An endpoint that answers an evaluation: what it is sent, what it may not be sent, and what happens when it fails."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.llm import Budget, Endpoint
from data_prep.llm.respond import EndpointRespondent
from infimed_jax.config import Sampling
from infimed_jax.data.sample import Question
from infimed_jax.errors import UserError
from infimed_jax.evaluation.respondents import Terms
from infimed_jax.evaluation.run import evaluate
from tests.data_prep import loopback as lo
from tests.tiny import png

TERMS = Terms(Sampling(max_tokens=9))
SAMPLES = [
    Question(f"slake/test/{n}", "slake", "test", (png(n, 20, 30),), kind="yes_no", question=f"Q{n}?", answer="yes")
    for n in range(4)
]


def ask(server: lo.Server, folder: Path, terms: Terms = TERMS, **endpoint):
    named = Endpoint("m", server.url, **{"attempts": 1, "pause": 0.0, "concurrency": 2} | endpoint)
    return evaluate(SAMPLES, EndpointRespondent(named, folder / "calls", terms), terms, folder=folder / "out")


def asked(body) -> str:
    """The text of a call; an image's Base64 may hold any letters."""
    return "".join(part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")


def by_question(body, number):
    """Yes to Q0 and Q2, cut at Q3."""
    text = asked(body)
    return lo.say("No", finish="length") if "Q3" in text else lo.say("yes" if "Q0" in text or "Q2" in text else "no")


def test_each_question_is_sent_as_it_is_worded_with_its_image_anew(tmp_path):
    with lo.serve(by_question) as server:
        result = ask(server, tmp_path)
    assert [(r.correct, r.status) for r in result.records] == [
        (True, "ok"), (False, "ok"), (True, "ok"), (False, "truncated")
    ]  # fmt: skip
    sent = {body["messages"][0]["content"][1]["text"]: body for body in server.requests}
    words = "\nQ2?\nPlease output 'yes' or 'no'(no extra output)."
    (message,) = sent[words]["messages"]
    assert (message["role"], sent[words]["max_tokens"], sent[words]["temperature"]) == ("user", 9, 0.0)
    url = message["content"][0]["image_url"]["url"]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))), np.float64)
    original = np.asarray(Image.open(io.BytesIO(SAMPLES[2].images[0])), np.float64)
    assert shown.shape == original.shape and np.abs(shown - original).mean() < 4  # of JPEG, on noise
    assert not list((tmp_path / "out").glob("calls*"))


def test_the_blind_control_sends_no_image_and_reasoning_asks_for_a_box(tmp_path):
    with lo.serve([lo.say("yes")]) as server:
        ask(server, tmp_path, replace(TERMS, image=False, reasoning=True))
    contents = [body["messages"][0]["content"] for body in server.requests]
    assert all([part["type"] for part in content] == ["text"] for content in contents)
    assert all("boxed" in content[0]["text"] for content in contents)


def test_replies_that_came_are_kept_where_others_fail(tmp_path):
    healthy = []

    def answer(body, number):
        return lo.say("yes") if healthy or "Q1" not in asked(body) else lo.status(400)

    with lo.serve(answer) as server:
        with pytest.raises(UserError, match=r"not answer 1 questions \(1 status 400\); .* asks these again"):
            ask(server, tmp_path)
        before = len(server.requests)
        healthy.append(True)
        result = ask(server, tmp_path)
        assert len(server.requests) == before + 1
    assert [r.correct for r in result.records] == [True] * 4


def test_a_source_that_may_not_leave_is_never_sent_outside(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.llm.jobs.ChatClient", None)  # no call is made
    outside = Endpoint("m", "https://1.2.3.4/v1", budget=Budget(tokens=10**6))
    secret = [replace(sample, source="mimic_cxr", id=f"mimic_cxr/test/{n}") for n, sample in enumerate(SAMPLES)]
    with pytest.raises(UserError, match="mimic_cxr"):
        evaluate(secret, EndpointRespondent(outside, tmp_path, TERMS), TERMS)


@pytest.mark.parametrize("setting", ["top_p", "presence_penalty", "repetition_penalty"])
def test_settings_that_no_call_carries_are_refused(tmp_path, setting):
    terms = replace(TERMS, sampling=replace(TERMS.sampling, **{setting: 0.5}))
    with pytest.raises(UserError, match=rf"sampling\.{setting}=0\.5: an endpoint is asked with temperature"):
        EndpointRespondent(Endpoint("m"), tmp_path, terms)
