"""`assess` against a server that rates, errs and misbehaves: what is counted, what decides, what is sent."""

from __future__ import annotations

import base64
import io
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from data_prep.llm import Budget, BudgetReached, Endpoint
from data_prep.llm.quality.assess import MAX_CHARACTERS, TRIES, Plan, assess, shown
from data_prep.llm.quality.rubric import DIMENSIONS, KEYS
from infimed_jax.data.sample import Chat, Document, Turn
from infimed_jax.data.storage import write_samples
from infimed_jax.errors import UserError
from tests.data_prep import loopback as lo
from tests.data_prep.samples import caption, damage, picture, question

SECRET = "SECRET-PATIENT-TEXT"


def endpoint(server, **options) -> Endpoint:
    return Endpoint(**({"model": "rater", "url": server.url, "pause": 0.01, "timeout": 60.0, "attempts": 2} | options))


def rating(score: int, **changed) -> str:
    return json.dumps({d.key: {"score": score, "comment": "So."} for d in DIMENSIONS} | changed)


def text_of(body) -> str:
    return "".join(p["text"] for p in body["messages"][1]["content"] if p["type"] == "text")


@pytest.fixture
def two_sources(tmp_path):
    """40 good captions of one source, 20 questions of another whose text says how they will be rated."""
    write_samples(tmp_path / "a", [caption(i, "phantom", f"number {i} good") for i in range(40)], name="a")
    write_samples(tmp_path / "b", [question(i, "vqa_rad", question=f"number {i} poor?") for i in range(20)], name="b")
    return [tmp_path / "a", tmp_path / "b"]


def rate(body, number):
    return lo.say("```json\n" + rating(5 if "good" in text_of(body) else 2) + "\n```")


def test_sources_are_rated_decided_and_shown(tmp_path, two_sources):
    with lo.serve(rate) as server:
        result = assess(two_sources, tmp_path / "out", endpoint(server), Plan(samples=15))
        assert len(server.requests) == 30
    decision = json.loads((tmp_path / "out/decision.json").read_text())
    assert decision == {
        "sources": {
            "phantom": {"keep": True, "reason": "mean Overall 5.00 is at least 3", "mean_overall": 5.0, "n": 15},
            "vqa_rad": {"keep": False, "reason": "mean Overall 2.00 is below 3", "mean_overall": 2.0, "n": 15},
        },
        "threshold": 3.0,
    }
    for name, score, size in (("phantom", 5, 40), ("vqa_rad", 2, 20)):
        row = result["sources"][name]
        assert (row["n"], row["drawn"], row["samples"], row["unrated"]) == (15, 15, size, {})
        assert set(row["dimensions"]) == set(KEYS)
        for values in row["dimensions"].values():
            assert values["counts"] == [15 * (score == s) for s in (1, 2, 3, 4, 5)] and values["mean"] == score
    lines = [json.loads(line) for line in (tmp_path / "out/ratings.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == 30 and all(line["rating"]["Overall"]["score"] for line in lines)
    assert json.loads((tmp_path / "out/assessment.json").read_text()) == result
    page = (tmp_path / "out/report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    (chart,) = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    ElementTree.fromstring(chart)
    assert chart.count(">100%</text>") == 12  # six panels of two bars, each one score's alone
    assert all(f">{name} (n = 15)</text>" in chart for name in ("phantom", "vqa_rad"))


def test_a_second_run_sends_nothing_and_another_threshold_decides_anew(tmp_path, two_sources):
    with lo.serve(rate) as server:
        first = assess(two_sources, tmp_path / "out", endpoint(server), Plan(samples=15))
        page = (tmp_path / "out/report.html").read_text()
        second = assess(two_sources, tmp_path / "out", endpoint(server), Plan(samples=15, threshold=1.5))
        assert len(server.requests) == 30
    assert first["account"]["counts"] == {"sent": 32} and second["account"]["counts"] == {"from the cache": 30}
    # two looked whether images count, and only where one is sent
    assert (first["account"]["images"], second["account"]["images"]) == ("counted", "none sent")
    assert second["account"]["spent"] == first["account"]["spent"]
    assert all(row["keep"] for row in json.loads((tmp_path / "out/decision.json").read_text())["sources"].values())
    assert page != (tmp_path / "out/report.html").read_text()


def test_a_run_that_was_stopped_sends_only_what_is_left(tmp_path, two_sources):
    def costly(body, number):
        return lo.say(rating(4), usage={"prompt_tokens": 3000, "completion_tokens": 100})

    with lo.serve(costly) as server:
        tight = endpoint(server, concurrency=1, budget=Budget(tokens=30_000))
        with pytest.raises(BudgetReached):
            assess(two_sources, tmp_path / "out", tight, Plan(samples=15))
        sent = len(server.requests)
        assert 0 < sent < 30 and not (tmp_path / "out/decision.json").exists()
        assess(two_sources, tmp_path / "out", endpoint(server), Plan(samples=15))
        assert len(server.requests) == 30


def test_what_is_sent_is_the_sample_its_pixels_and_the_rubric_of_its_kind(tmp_path):
    exif = Image.Exif()
    exif[270] = SECRET  # the image's description
    big = picture(3, side=64, format="JPEG", exif=exif, comment=SECRET.encode())
    assert SECRET.encode() in big
    turns = (Turn("user", ("What is ", 1, " and ", 0, "?")), Turn("assistant", ("Lungs.",), "Let me see."))
    sample = Chat("vqa_rad/train/0", "vqa_rad", "train", (big, picture(1)), turns)
    write_samples(tmp_path / "d", [sample, caption(1)], name="d")
    with lo.serve([lo.say(rating(3))]) as server:
        assess([tmp_path / "d"], tmp_path / "out", endpoint(server, image_side=32), Plan())
        first, second = sorted(server.requests, key=lambda body: "Dialogue" not in body["messages"][0]["content"])
    assert SECRET not in json.dumps(first) and first["temperature"] == 0
    system, user = first["messages"]
    assert "Dialogue Completeness" in system["content"] and "Caption Completeness" not in system["content"]
    assert "Caption Completeness" in second["messages"][0]["content"]
    texts = [p["text"] if p["type"] == "text" else "*" for p in user["content"]]
    assert "".join(texts) == (
        "<sample>\n\n[user]\nWhat is * and *?\n[assistant]\n(thoughts: Let me see.)\nLungs.\n</sample>"
    )
    sent = [
        Image.open(io.BytesIO(base64.b64decode(p["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))))
        for p in user["content"] if p["type"] == "image_url"
    ]  # fmt: skip
    assert [image.size for image in sent] == [(12, 12), (32, 32)]
    original = np.asarray(Image.open(io.BytesIO(picture(1))), np.float64)
    assert np.abs(np.asarray(sent[0], np.float64) - original).mean() < 8  # the same pixels, but for JPEG on pure noise
    for image in sent:
        assert not image.getexif() and "comment" not in image.info


def test_bad_replies_are_asked_for_again_then_set_aside_and_never_zero(tmp_path):
    write_samples(tmp_path / "d", [caption(i, text=f"number {i};") for i in range(8)], name="d")
    null = rating(4, Overall={"score": None, "comment": "?"})

    def answer(body, number):
        if "number 0;" in text_of(body):
            return lo.say(null)
        if "number 1;" in text_of(body):  # corrects itself
            return lo.say(rating(4) if len(body["messages"]) > 2 else null[:60])
        return lo.say(rating(4))

    with lo.serve(answer) as server:
        result = assess([tmp_path / "d"], tmp_path / "out", endpoint(server), Plan())
        asked = [body for body in server.requests if "number 0;" in text_of(body)]
        assert len(asked) == TRIES and len(server.requests) == TRIES + 2 + 6
    complaint = asked[-1]["messages"][-1]["content"]
    assert [m["role"] for m in asked[-1]["messages"]] == ["system", "user", "assistant", "user"]
    assert "no whole number from 1 to 5" in complaint
    row = result["sources"]["vqa_rad"]
    assert row["unrated"] == {"reply: a score is no whole number from 1 to 5, or lacks its comment": 1}
    assert row["n"] == 7 and row["mean_overall"] == 4.0 and row["dimensions"]["Overall"]["counts"] == [0, 0, 0, 7, 0]


def test_replies_that_the_limit_cut_are_named_so_and_what_is_kept_is_not_to_be_asked_again(tmp_path):
    write_samples(tmp_path / "d", [caption(i, text=f"number {i};") for i in range(4)], name="d")

    def answer(body, number):  # thoughts parted from the text by the server, and whole though at the limit
        cut = lo.say(None, finish="length", reasoning_content="Let me see")
        return cut if "number 3;" not in text_of(body) else lo.say(rating(4), finish="length")

    with lo.serve(answer) as server, pytest.raises(UserError) as error:
        assess([tmp_path / "d"], tmp_path / "out", endpoint(server), Plan())
    assert "only 1 of 4 samples could be rated (3 by reply: cut by the limit of tokens)" in str(error.value)
    assert str(error.value).endswith("try another --model or --max-tokens: replies are kept")
    assert "cut by the limit" in server.requests[-1]["messages"][-1]["content"]
    assert all(message["content"] for body in server.requests for message in body["messages"])  # some refuse empty ones


def test_every_reason_for_no_rating_is_named_and_too_few_ratings_decide_nothing(tmp_path, capsys):
    bad_image = Document("vqa_rad/train/9", "vqa_rad", "train", (b"<html>",), ((0, "x"),))
    write_samples(tmp_path / "d", [*(caption(i, text=f"{SECRET} {i};") for i in range(4)), bad_image], name="d")
    faults = {"0;": lo.html, "1;": lo.say("", finish="content_filter"), "2;": lo.status(400, SECRET.encode())}

    def answer(body, number):
        return next((fault for mark, fault in faults.items() if f"{SECRET} {mark}" in text_of(body)), lo.say(rating(5)))

    (tmp_path / "out").mkdir()
    (tmp_path / "out/decision.json").write_text('{"of": "an earlier run"}')
    with lo.serve(answer) as server, pytest.raises(UserError) as error:
        assess([tmp_path / "d"], tmp_path / "out", endpoint(server), Plan())
    assert "no decision is written: vqa_rad: only 1 of 5 samples could be rated (1 by endpoint:" in str(error.value)
    assert str(error.value).endswith("run the same command again")
    assert not (tmp_path / "out/decision.json").exists()
    row = json.loads((tmp_path / "out/assessment.json").read_text())["sources"]["vqa_rad"]
    assert row["unrated"] == {
        "endpoint: HTML instead of JSON": 1,
        "endpoint: status 400": 1,
        "image: not a supported image": 1,
        "reply: refused by the endpoint's filter": 1,
    }
    assert row["keep"] is None and "no rating" not in row["reason"]
    output = "".join(capsys.readouterr()) + str(error.value) + (tmp_path / "out/report.html").read_text()
    assert SECRET not in output


def test_a_damaged_record_has_its_name_among_the_ratings_and_none_itself(tmp_path):
    write_samples(tmp_path / "d", [caption(i) for i in range(6)], name="d")
    damage(tmp_path / "d")
    with lo.serve(lambda body, _: lo.say(rating(4))) as server:
        result = assess([tmp_path / "d"], tmp_path / "out", endpoint(server), Plan())
    assert result["sources"]["vqa_rad"]["unrated"] == {"unreadable record": 1}
    lines = [json.loads(line) for line in (tmp_path / "out/ratings.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["d record 0", *(f"vqa_rad/train/{i}" for i in range(1, 6))]
    assert [line["rating"] is None for line in lines] == [True] + [False] * 5


def test_long_samples_are_cut_for_the_rater_and_counted(tmp_path):
    long = caption(0, text="word " * 10_000)
    content, cut = shown(long)
    assert cut and sum(len(p) for p in content if isinstance(p, str)) < MAX_CHARACTERS + 100
    assert shown(caption(1))[1] is False
    write_samples(tmp_path / "d", [long, caption(1)], name="d")
    with lo.serve([lo.say(rating(5))]) as server:
        result = assess([tmp_path / "d"], tmp_path / "out", endpoint(server), Plan())
    assert result["sources"]["vqa_rad"]["cut"] == 1


def test_the_interval_is_that_of_the_mean_and_doubt_is_told(tmp_path):
    write_samples(tmp_path / "d", [caption(i, text=f"number {i};") for i in range(20)], name="d")
    scores = [1 + (7 * i) % 5 for i in range(20)]

    def answer(body, number):
        return lo.say(rating(scores[int(re.search(r"number (\d+);", text_of(body))[1])]))

    with lo.serve(answer) as server:
        row = assess([tmp_path / "d"], tmp_path / "out", endpoint(server), Plan())["sources"]["vqa_rad"]
    half = 1.96 * np.std(scores, ddof=1) / np.sqrt(20)
    assert row["dimensions"]["Overall"]["interval"] == pytest.approx([3 - half, 3 + half])
    assert row["keep"] and "its 95 % interval [2.36, 3.64] holds both" in row["reason"]


def test_a_source_that_is_not_cleared_is_refused_before_anything_is_read_or_sent(tmp_path):
    write_samples(tmp_path / "d", [caption(0, "mimic")], name="d")
    outside = Endpoint(model="m", url="https://8.8.8.8/v1", budget=Budget(tokens=10**6))
    with pytest.raises(UserError, match="source mimic is not cleared"):
        assess([tmp_path / "d"], tmp_path / "out", outside, Plan())
    assert not (tmp_path / "out").exists()


def test_a_dataset_given_twice_is_refused(tmp_path):
    write_samples(tmp_path / "d", [caption(0)], name="d")
    with pytest.raises(UserError, match="given twice"):
        assess([tmp_path / "d", tmp_path / "d"], tmp_path / "out", Endpoint("m"), Plan())


@pytest.mark.parametrize("options", [{"samples": 0}, {"threshold": 0.5}, {"threshold": 6}, {"least_rated": 0.0}])
def test_impossible_plans_are_refused(options):
    with pytest.raises(UserError):
        Plan(**options)
