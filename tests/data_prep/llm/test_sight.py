"""Whether images count for the endpoint: asked once, with nothing of a sample, and told where they do not.

`transformers serve` drops the images of a text model and answers as if there had been none.
"""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from data_prep.llm import Budget, BudgetReached, CallFailed, Endpoint, parts, run_jobs, speech
from data_prep.llm.messages import image_count
from data_prep.llm.sight import COUNTED, NOT_COUNTED, UNKNOWN, probes, verdict
from tests.data_prep import loopback as lo

PICTURE = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(PICTURE, "PNG")


def run(server, folder, images=True, sees=True, count=6, **options):
    """The account of `count` calls at once."""
    server.sees = sees
    settings = Endpoint(**({"model": "m", "url": server.url, "pause": 0.01, "timeout": 60.0, "attempts": 1} | options))

    async def job(client, number):
        content = parts([0, "SECRET"] if images else ["SECRET"], [PICTURE.getvalue()], 8)
        try:
            return await client.chat("vqa_rad", [speech("user", content)], max_tokens=9, temperature=0.0, seed=number)
        except CallFailed:
            return None

    return run_jobs(settings, folder, range(count), job, lambda *_: None)


@pytest.mark.parametrize(("sees", "images"), [(True, COUNTED), (False, NOT_COUNTED)])
def test_an_endpoint_that_counts_no_images_is_told_of_once(tmp_path, caplog, sees, images):
    with lo.serve([lo.say("grey")]) as server:
        account = run(server, tmp_path, sees=sees)
    assert account["images"] == images and account["counts"] == {"sent": 6 + 2} and server.before_sight == 0
    told = [message for message in caplog.messages if "counts next to no prompt tokens for an image" in message]
    assert len(told) == (not sees) and "SECRET" not in caplog.text


def test_where_no_image_is_sent_nothing_is_asked(tmp_path):
    with lo.serve([lo.say("grey")]) as server:
        assert run(server, tmp_path / "text", images=False, sees=False)["counts"] == {"sent": 6}
        run(server, tmp_path / "kept")
        account = run(server, tmp_path / "kept")
    assert account["images"] == "none sent" and account["counts"] == {"from the cache": 6}


def test_without_an_account_nothing_is_known(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(lo, "probes", lambda _: ())  # the server answers these two as all others
    for number, answer in enumerate((lo.say("grey", usage={}), lo.html, lo.status(500))):
        with lo.serve([answer]) as server:
            assert run(server, tmp_path / str(number))["images"] == UNKNOWN
    assert not caplog.messages


def test_the_two_calls_are_booked_and_hold_back_at_the_budget(tmp_path):
    with lo.serve([lo.say("grey")]) as server, pytest.raises(BudgetReached):
        run(server, tmp_path, budget=Budget(tokens=100, image_tokens=90))
    assert not server.requests and not (tmp_path / "account.json").exists()


def test_they_differ_by_the_image_alone():
    seen, blind = probes("m")
    assert image_count(seen["messages"]) == 1 and image_count(blind["messages"]) == 0
    (seen_parts,), (blind_parts,) = ([m["content"] for m in body["messages"]] for body in (seen, blind))
    assert [p for p in seen_parts if p["type"] == "text"] == blind_parts
    assert {key: seen[key] for key in seen if key != "messages"} == {
        key: blind[key] for key in blind if key != "messages"
    }
    assert json.dumps(probes("m")) == json.dumps((seen, blind))
    assert verdict(None, (1, 1)) == verdict((1, 1), None) == UNKNOWN
    assert verdict((45, 1), (9, 9)) == COUNTED  # the demo's model: 36 tokens an image
    assert verdict((9, 9), (9, 1)) == verdict((13, 1), (9, 1)) == NOT_COUNTED  # dropped; "<image>" in its place
