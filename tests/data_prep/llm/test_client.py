"""The chat client against a server that misbehaves: each fault has its name and its count, and no text gets out."""

from __future__ import annotations

import asyncio
import email.utils
import io
import json
import logging
import os
import subprocess
import sys
import time

import pytest
from PIL import Image

from data_prep.llm import Budget, BudgetReached, CallFailed, Endpoint, check_sources, parts, run_jobs, speech
from data_prep.llm import client as client_module
from data_prep.llm.client import ChatClient
from data_prep.llm.replies import Reply, retry_after
from data_prep.llm.transport import UNUSABLE
from infimed_jax.errors import UserError
from tests.data_prep import loopback as lo

SECRET = "SECRET-PATIENT-TEXT"
MESSAGES = [speech("user", SECRET)]


def endpoint(server, **options) -> Endpoint:
    defaults = {"model": "m", "url": server.url, "pause": 0.01, "timeout": 60.0, "attempts": 3}
    return Endpoint(**(defaults | options))


def ask(settings: Endpoint, folder, messages=MESSAGES, source="vqa_rad", seed=0, max_tokens=100):
    """(reply or CallFailed's kind, the client's counts)."""

    async def run():
        async with ChatClient(settings, folder) as client:
            try:
                reply = await client.chat(source, messages, max_tokens=max_tokens, temperature=0.0, seed=seed)
            except CallFailed as failure:
                return failure.kind, dict(client.counts)
            return reply, dict(client.counts)

    folder.mkdir(exist_ok=True)
    return asyncio.run(run())


def test_a_call_says_what_was_asked_and_returns_what_was_said(tmp_path):
    with lo.serve([lo.say("yes", reasoning_content="hm")]) as server:
        reply, counts = ask(endpoint(server), tmp_path)
        assert reply == Reply("yes", "hm", "stop") and reply.whole == "<think>hm</think>yes"
        assert counts == {"sent": 1}
        (body,) = server.requests
    assert body == {"model": "m", "messages": MESSAGES, "max_tokens": 100, "temperature": 0.0, "seed": 0}


def test_content_may_come_in_parts(tmp_path):
    content = [{"type": "text", "text": "a"}, {"type": "other"}, {"type": "text", "text": "b"}]
    with lo.serve([lo.say(content)]) as server:
        assert ask(endpoint(server), tmp_path)[0].text == "ab"


FAULTS = {
    "html": (lo.html, "HTML instead of JSON"),
    "cut by its length": (lo.cut_by_length, "reply cut"),
    "cut in a chunk": (lo.cut_chunk, "reply cut"),
    "cut JSON": (lo.cut_json, "reply cut"),
    "no JSON": (lo.data(b"OK"), "no JSON"),
    "deep JSON": (lo.data(b"[" * 100_000), "no JSON"),
    "JSON of another kind": (lo.data(b'{"detail": "x"}'), "not a chat completion"),
    "a list": (lo.data(b"[1]"), "not a chat completion"),
    "no choices": (lo.data(b'{"choices": []}'), "not a chat completion"),
    "a number for text": (lo.say(7), "not a chat completion"),
    "null": (lo.say(None), "empty reply"),
    "blank": (lo.say(" \n"), "empty reply"),
    "reset": (lo.reset, "connection broken"),
    "no HTTP": (lo.no_http, "no HTTP reply"),
    "server error": (lo.status(500, b"trace: " + SECRET.encode()), "status 500"),
    "bad gateway": (lo.status(502, b"<html>"), "status 502"),
    "too many": (lo.status(429), "status 429"),
    "broken gzip": (lo.data(b"no gzip", {"Content-Encoding": "gzip"}), "reply in a broken encoding"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_may_pass_is_tried_again_and_named(tmp_path, fault):
    behaviour, kind = FAULTS[fault]
    with lo.serve([behaviour, behaviour, lo.say("fine")]) as server:
        reply, counts = ask(endpoint(server), tmp_path / "passes")
        assert reply == Reply("fine", "", "stop")
        assert counts == {"sent": 3, f"again: {kind}": 2}
    with lo.serve([behaviour]) as server:
        reply, counts = ask(endpoint(server), tmp_path / "stays")
        assert reply == kind
        assert counts == {"sent": 3, f"again: {kind}": 2, f"failed: {kind}": 1}
        assert len(server.requests) == 3
    assert not list((tmp_path / "stays").glob("*/*.json"))  # a failure is no reply to be kept


@pytest.mark.parametrize("behaviour", [lo.hang, lo.trickle, lo.trickle_headers])
def test_an_endpoint_that_never_ends_is_left(tmp_path, behaviour):
    with lo.serve([behaviour]) as server:
        reply, counts = ask(endpoint(server, timeout=0.2, attempts=2), tmp_path)
    assert reply == "timed out" and counts == {"sent": 2, "again: timed out": 1, "failed: timed out": 1}


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (lo.status(400, SECRET.encode()), "status 400"),
        (lo.status(413), "status 413"),
        (lo.status(302, Location="http://elsewhere.example/v1"), "redirected to another host (not followed)"),
        (lo.status(307, Location="/v2/chat/completions"), "redirected (not followed)"),
        (lo.status(308, Location="http://[broken"), "redirected to another host (not followed)"),
        (lo.bomb, "reply too large"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(tmp_path, behaviour, kind):
    with lo.serve([behaviour]) as server:
        reply, counts = ask(endpoint(server), tmp_path)
        assert (reply, counts) == (kind, {"sent": 1, f"failed: {kind}": 1})
        assert len(server.requests) == 1


@pytest.mark.parametrize("code", UNUSABLE)
def test_what_every_call_would_get_ends_the_run(tmp_path, code):
    with lo.serve([lo.status(code, SECRET.encode())]) as server:
        with pytest.raises(UserError, match=f"127.0.0.1.*status {code}.*check|money") as error:
            ask(endpoint(server), tmp_path)
        assert SECRET not in str(error.value) and len(server.requests) == 1


def test_nobody_listening_is_named(tmp_path):
    with lo.serve([lo.say("")]) as server:
        gone = endpoint(server)
    reply, _ = ask(gone, tmp_path)
    assert reply == "connection refused"
    assert json.loads((tmp_path / "account.json").read_text())["prompt_tokens"] == 0


def test_a_dead_endpoint_ends_the_run_after_some_failures(tmp_path):
    async def job(client, number):
        try:
            return await client.chat("vqa_rad", MESSAGES, max_tokens=9, temperature=0.0, seed=number)
        except CallFailed as failure:
            return failure.kind

    with lo.serve([lo.html]) as server:
        settings = endpoint(server, attempts=1, failures_in_a_row=4, concurrency=1)
        with pytest.raises(UserError, match="failed 4 calls in a row, the last: HTML instead of JSON"):
            run_jobs(settings, tmp_path, range(1000), job, lambda *_: None)
        assert len(server.requests) == 4
    # a success between starts the count anew
    with lo.serve(lambda body, number: lo.say("fine") if number % 3 == 2 else lo.html) as server:
        settings = endpoint(server, attempts=1, failures_in_a_row=3, concurrency=1)
        done = {}
        account = run_jobs(settings, tmp_path / "b", range(9), job, done.__setitem__)
    assert account["counts"] == {"failed: HTML instead of JSON": 6, "sent": 9}
    assert len(done) == 9


def test_retry_after_is_obeyed_up_to_a_bound(tmp_path):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    behaviours = [lo.status(429, Retry_After="7"), lo.status(503, Retry_After="9999"), lo.say("fine")]
    with lo.serve(behaviours) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module.asyncio, "sleep", sleep)
        reply, _ = ask(endpoint(server, pause=1.0, longest_pause=30.0), tmp_path)
    assert reply.text == "fine"
    backed_off = [w for w in waits if w in (7.0, 30.0)]
    assert backed_off == [7.0, 30.0]
    assert max(waits) == 30.0


def test_back_off_doubles_with_jitter(tmp_path):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    with lo.serve([lo.status(500)]) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module.asyncio, "sleep", sleep)
        ask(endpoint(server, pause=1.0, longest_pause=3.0, attempts=5), tmp_path)
    pauses = [w for w in waits if w > 0]
    assert len(pauses) == 4
    for pause, longest in zip(pauses, (1, 2, 3, 3), strict=True):
        assert min(longest / 2, longest) <= pause <= longest or pause == 3.0


def test_retry_after_reads_numbers_dates_and_nonsense():
    assert retry_after("3") == 3 and retry_after("0.5") == 0.5
    for text in ("", "-4", "nan", "inf", "soon", "Mon, 99 Foo", "Mon, 01 Jan 2001 00:00:00 GMT"):
        assert retry_after(text) == 0
    later = email.utils.formatdate(time.time() + 50, usegmt=True)
    assert 45 < retry_after(later) <= 50


def test_a_second_run_sends_nothing_and_says_the_same(tmp_path):
    with lo.serve(lambda body, number: lo.say(f"reply {number}")) as server:
        first, _ = ask(endpoint(server), tmp_path)
        second, counts = ask(endpoint(server), tmp_path)
        assert first == second and counts == {"from the cache": 1} and len(server.requests) == 1
        # whatever differs in the request is another one
        for changed in ({"messages": [speech("user", "other")]}, {"seed": 1}, {"max_tokens": 99}):
            assert ask(endpoint(server), tmp_path, **changed)[0] != first
        assert ask(endpoint(server, model="other"), tmp_path)[0] != first
        assert len(server.requests) == 5


def test_a_damaged_cache_entry_is_asked_for_again(tmp_path):
    with lo.serve([lo.say("fine")]) as server:
        ask(endpoint(server), tmp_path)
        (entry,) = tmp_path.glob("*/*.json")
        other = json.dumps(json.loads(entry.read_text()) | {"value": {"answer": "of another version"}}).encode()
        for damage in (b"", entry.read_bytes()[:-9], b'{"key": "other", "value": {}}', b"\xff\xfe", other):
            entry.write_bytes(damage)
            assert ask(endpoint(server), tmp_path)[0].text == "fine"
        assert len(server.requests) == 6
        assert json.loads(entry.read_text())["value"]["text"] == "fine"


def test_equal_requests_at_once_are_sent_once_and_others_no_more_than_allowed_at_a_time(tmp_path):
    async def job(client, number):
        return await client.chat("vqa_rad", MESSAGES, max_tokens=9, temperature=1.0, seed=number % 12)

    def slow(body, number):
        def behave(handler):
            handler.state.closing.wait(0.05)
            handler.reply(200, lo.completion(f"seed {body['seed']}"))

        return behave

    done = []
    with lo.serve(slow) as server:
        account = run_jobs(endpoint(server, concurrency=4), tmp_path, range(24), job, lambda n, r: done.append((n, r)))
        assert 2 <= server.most_at_once <= 4
        assert sorted(body["seed"] for body in server.requests) == list(range(12))
    assert sorted((n, r.text) for n, r in done) == [(n, f"seed {n % 12}") for n in range(24)]
    assert account["counts"] == {"from the cache": 12, "sent": 12}
    assert account["spent"] == {"calls": 12, "prompt_tokens": 132, "reply_tokens": 84, "cost": 0.0, "at_worst": 0}
    assert not list(tmp_path.rglob("*.part"))


def spend(settings, folder, count):
    """Run `count` calls one after the other; the account, or BudgetReached."""

    async def job(client, number):
        return await client.chat("vqa_rad", MESSAGES, max_tokens=50, temperature=0.0, seed=number)

    return run_jobs(settings, folder, range(count), job, lambda *_: None)


WORST = 16 + len(SECRET) + 50
"""Tokens of one such call at its worst."""
SIGHT = 45 + 9
"""Prompt tokens of the two calls that ask whether images count, as the server counts them."""


def test_the_budget_in_tokens_is_never_passed_over_all_runs(tmp_path):
    with lo.serve([lo.say("fine")]) as server:  # 18 tokens a call, as counted by the endpoint
        settings = endpoint(server, concurrency=1, budget=Budget(tokens=WORST + 18))
        with pytest.raises(BudgetReached, match="budget of 103 tokens is reached"):
            spend(settings, tmp_path, 10)
        assert len(server.requests) == 2
        with pytest.raises(BudgetReached):  # the second run has the first one's account, and its replies
            spend(settings, tmp_path, 10)
        assert len(server.requests) == 2
        more = endpoint(server, concurrency=1, budget=Budget(tokens=WORST + 18 * 9))
        account = spend(more, tmp_path, 10)
        assert account["counts"] == {"from the cache": 2, "sent": 8}
    assert account["spent"]["prompt_tokens"] + account["spent"]["reply_tokens"] == 180


def test_the_budget_in_money_is_never_passed(tmp_path):
    prices = dict(prompt_price=1000.0, reply_price=2000.0)
    each, worst = (11 * 1000 + 7 * 2000) / 1e6, (35 * 1000 + 50 * 2000) / 1e6
    with lo.serve([lo.say("fine")]) as server:
        settings = endpoint(server, concurrency=1, budget=Budget(cost=worst + 3.5 * each, **prices))
        with pytest.raises(BudgetReached, match=r"may cost 0\.1350"):
            spend(settings, tmp_path, 10)
        assert len(server.requests) == 4
    spent = json.loads((tmp_path / "account.json").read_text())
    assert spent["cost"] == pytest.approx(4 * each) and spent["cost"] < settings.budget.cost


def test_calls_in_flight_are_waited_for_before_the_budget_counts_as_reached(tmp_path):
    def slow(body, number):
        def behave(handler):
            handler.state.closing.wait(0.01)
            handler.reply(200, lo.completion("fine"))  # 18 tokens, booked at 85 while it flies

        return behave

    budget = Budget(tokens=18 * 9 + WORST)  # room for ten calls, one at a time
    with lo.serve(slow) as server:
        account = spend(endpoint(server, concurrency=8, budget=budget), tmp_path / "ten", 10)
        assert account["spent"]["calls"] == 10 and account["spent"]["at_worst"] == 0 and server.most_at_once > 1
        with pytest.raises(BudgetReached, match="180 are spent"):
            spend(endpoint(server, concurrency=8, budget=budget), tmp_path / "eleven", 40)
        assert len(server.requests) == 20


def test_concurrent_calls_cannot_pass_the_budget_together(tmp_path):
    with lo.serve([lo.say("fine", usage={"prompt_tokens": 35, "completion_tokens": 50})]) as server:  # the worst case
        settings = endpoint(server, concurrency=8, budget=Budget(tokens=WORST * 5 + 1))
        with pytest.raises(BudgetReached):
            spend(settings, tmp_path, 40)
        assert len(server.requests) == 5


@pytest.mark.parametrize("usage", [{}, [], "many", {"prompt_tokens": -5, "completion_tokens": 1}, {"prompt_tokens": 1}])
def test_without_a_usable_account_the_worst_case_stays_booked(tmp_path, usage):
    with lo.serve([lo.say("fine", usage=usage)]) as server:
        account = spend(endpoint(server), tmp_path, 2)
    assert account["spent"] == {
        "calls": 2, "prompt_tokens": 70, "reply_tokens": 100, "cost": 0.0, "at_worst": 2
    }  # fmt: skip


@pytest.mark.parametrize(
    ("behaviour", "booked"), [(lo.status(503), 0), (lo.status(400), 0), (lo.reset, WORST), (lo.cut_json, WORST)]
)
def test_only_a_call_that_was_refused_costs_nothing(tmp_path, behaviour, booked):
    with lo.serve([behaviour]) as server:
        ask(endpoint(server, attempts=1), tmp_path, max_tokens=50)
    spent = json.loads((tmp_path / "account.json").read_text())
    assert spent["prompt_tokens"] + spent["reply_tokens"] == booked and spent["calls"] == 1


@pytest.mark.parametrize("code", [500, 502, 504])
def test_a_server_error_may_have_been_billed(tmp_path, code):
    """Such an attempt stays booked at its worst case, so retries of it cannot pass the budget."""
    with lo.serve([lo.status(code)]) as server:
        with pytest.raises(BudgetReached):
            spend(endpoint(server, attempts=5, budget=Budget(tokens=3 * WORST + 1)), tmp_path, 1)
        assert len(server.requests) == 3
    spent = json.loads((tmp_path / "account.json").read_text())
    assert spent["prompt_tokens"] + spent["reply_tokens"] == 3 * WORST and spent["at_worst"] == 3


def test_images_are_booked(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    messages = [speech("user", parts(["x", 0], [picture.getvalue()], 8))]
    with lo.serve([lo.reset]) as server:
        ask(endpoint(server, attempts=1, budget=Budget(image_tokens=1000)), tmp_path, messages=messages, max_tokens=50)
    assert json.loads((tmp_path / "account.json").read_text())["prompt_tokens"] == 16 + 1 + 1000 + SIGHT


def test_a_damaged_account_is_not_taken_for_nothing_spent(tmp_path):
    (tmp_path / "account.json").write_text('{"calls": 3')
    with lo.serve([lo.say("fine")]) as server:
        with pytest.raises(UserError, match=r"account\.json is damaged"):
            spend(endpoint(server), tmp_path, 1)
        assert not server.requests


def test_the_key_comes_from_the_environment_and_stays_there(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("THE_KEY", "sk-geheim")
    with lo.serve([lo.reset, lo.status(500), lo.say("fine")]) as server:
        settings = endpoint(server, key_variable="THE_KEY")
        assert ask(settings, tmp_path)[0].text == "fine"
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-geheim"}
    with lo.serve([lo.status(401)]) as server, pytest.raises(UserError) as error:
        ask(endpoint(server, key_variable="THE_KEY"), tmp_path / "b")
    files = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    for text in (str(error.value), repr(settings), caplog.text, files):
        assert "geheim" not in text and SECRET not in text
    assert "Authorization" not in caplog.text


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "new\nline", "schlüssel"])
def test_an_unusable_key_is_named_by_its_variable_alone(tmp_path, monkeypatch, value):
    monkeypatch.delenv("THE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("THE_KEY", value)
    with lo.serve([lo.say("fine")]) as server:
        with pytest.raises(UserError, match="THE_KEY") as error:
            ask(endpoint(server, key_variable="THE_KEY"), tmp_path)
        assert not server.requests
    assert not (value or "").strip() or value not in str(error.value)


def test_no_proxy_from_the_environment_sees_a_local_call(tmp_path, monkeypatch):
    with lo.serve([lo.say("proxied")]) as proxy, lo.serve([lo.say("direct")]) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        assert ask(endpoint(server), tmp_path)[0].text == "direct"
        assert not proxy.requests


def test_nothing_from_openai_variables_is_used_or_sent(tmp_path, monkeypatch, caplog):
    """Among them OPENAI_LOG, with which the package would log what is asked."""
    caplog.set_level(logging.DEBUG)
    names = ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "WEBHOOK_SECRET")
    for name in names:
        monkeypatch.setenv(f"OPENAI_{name}", "sk-foreign")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Foreign: sk-foreign\nAuthorization: Bearer sk-foreign")
    monkeypatch.setenv("OPENAI_LOG", "debug")
    with lo.serve([lo.say("foreign")]) as foreign, lo.serve([lo.say("ours")]) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", foreign.url)
        assert ask(endpoint(server), tmp_path / "without")[0].text == "ours"
        monkeypatch.setenv("THE_KEY", "sk-named")
        assert ask(endpoint(server, key_variable="THE_KEY"), tmp_path / "with")[0].text == "ours"
        assert not foreign.requests
    without, named = ({name.lower(): value for name, value in headers.items()} for headers in server.headers)
    assert without.keys() == {
        "host", "connection", "accept", "accept-encoding", "content-type", "content-length"
    }  # fmt: skip
    assert named == without | {"authorization": "Bearer sk-named", "host": named["host"]}
    assert SECRET not in caplog.text


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(tmp_path, monkeypatch, code):
    monkeypatch.setenv("THE_KEY", "sk-geheim")
    with lo.serve([lo.say("elsewhere")]) as other:
        with lo.serve([lo.status(code, Location=f"{other.url}/chat/completions")]) as server:
            kind, _ = ask(endpoint(server, key_variable="THE_KEY"), tmp_path)
        assert kind == "redirected to another host (not followed)" and not other.requests


def test_what_is_not_cleared_never_leaves(tmp_path, monkeypatch):
    budget = Budget(tokens=10**6)
    outside = Endpoint(model="m", url="https://8.8.8.8/v1", budget=budget, attempts=1)
    monkeypatch.setattr("httpx2.AsyncClient.send", lambda *_, **__: pytest.fail("sent"))
    for source in ("mimic", "no_such_source"):
        with pytest.raises(UserError, match=f"{source} is not cleared for endpoints outside, and 8.8.8.8 is one"):
            ask(outside, tmp_path, source=source)
        with pytest.raises(UserError, match=source):
            check_sources(outside, ["vqa_rad", source])
    check_sources(outside, ["vqa_rad"])
    assert not list(tmp_path.glob("*/*.json")) and not (tmp_path / "account.json").exists()


def test_without_the_package_its_extra_is_named():
    code = "import sys\nsys.modules['openai'] = None\nimport data_prep.llm"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("needs the openai package: pip install 'infimed-jax[llm]'")


def test_a_full_disk_is_reported_and_leaves_nothing_half(tmp_path, monkeypatch):
    def full(source, target):
        if str(target).endswith(".json") and "account" not in str(target):
            raise OSError(28, os.strerror(28), str(target))
        return real(source, target)

    real = os.replace
    monkeypatch.setattr(os, "replace", full)
    with lo.serve([lo.say("fine")]) as server, pytest.raises(OSError, match="No space left"):
        spend(endpoint(server), tmp_path, 1)
    assert not list(tmp_path.rglob(".*.part")) and not list(tmp_path.glob("*/*.json"))
