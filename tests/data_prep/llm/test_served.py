"""The client against the true answers of `transformers serve` 5.24, which served the demo's own export.

Recorded: its chat completion, its list of models, and its refusal of a model that it does not serve.
"""

from __future__ import annotations

import pytest

from data_prep.llm import CallFailed, Endpoint, run_jobs, speech
from data_prep.llm.replies import Reply, read_reply
from infimed_jax.errors import UserError
from tests.data_prep import loopback as lo

COMPLETION = (
    b'{"id":"3be88ece-ceff-4eb9-bb56-b1a36c6ae01f","choices":[{"finish_reason":"length","index":0,"message":{"content":'
    b'"\\n\\\\boxed first glance: there there glance","role":"assistant"}}],"created":1795691586,"model":"/runs/export"'
    b',"object":"chat.completion","usage":{"completion_tokens":8,"prompt_tokens":25,"total_tokens":33}}'
)
MODELS = (
    b'{"object":"list","data":[{"owned_by":"local","id":"/runs/export","object":"model","created":0,'
    b'"status":{"value":"loaded"}}]}'
)
REFUSAL = b"{\"detail\":\"Server is pinned to '/runs/export'; requested 'export'.\"}"


def endpoint(server, **options) -> Endpoint:
    return Endpoint(**({"model": "export", "url": server.url, "pause": 0.01, "timeout": 60.0} | options))


def run(settings, folder, count):
    """The account of `count` calls, and what became of each."""

    async def job(client, number):
        messages = [speech("user", f"SECRET {number}")]
        try:
            return await client.chat("vqa_rad", messages, max_tokens=9, temperature=0.0)
        except CallFailed as failure:
            return failure.kind

    done = {}
    account = run_jobs(settings, folder, range(count), job, done.__setitem__)
    return account, [done[number] for number in range(count)]


def test_a_completion_is_read_with_its_account():
    reply, used = read_reply(COMPLETION)
    assert reply == Reply("\n\\boxed first glance: there there glance", "", "length") and used == (25, 8)


NEVER_OPENED = "\nAt first glance: lower left. Wait, let me look again: there is no lesion.\n</think>\n\n\\boxed{no}"


@pytest.mark.parametrize(
    ("reply", "whole"),
    [
        (Reply(NEVER_OPENED, "", "stop"), f"<think>{NEVER_OPENED}"),  # as by templates that open it in the prompt
        (Reply("<think>Dark.</think>no", "", "stop"), "<think>Dark.</think>no"),
        (Reply("a <think> b </think> c", "", "stop"), "a <think> b </think> c"),
        (Reply("no", "", "stop"), "no"),
        (Reply("a</think>no", "hm", "stop"), "<think>hm</think>a</think>no"),
    ],
)
def test_the_whole_reply_has_its_thoughts_in_a_block(reply, whole):
    assert reply.whole == whole


@pytest.mark.parametrize("code", [400, 404, 422])
def test_a_model_that_is_not_there_ends_the_run_with_those_that_are(tmp_path, code):
    with lo.serve([lo.status(code, REFUSAL)]) as server:
        server.models = MODELS
        with pytest.raises(UserError, match=rf"status {code} and has no model 'export': it lists '/runs/export'$"):
            run(endpoint(server, concurrency=8), tmp_path, 100)
        assert len(server.requests) <= 8 and server.looked_up == ["/v1/models"]


def test_only_names_of_a_list_are_told_and_no_more_than_a_few_of_them(tmp_path):
    names = ", ".join(f'{{"id": "m{i}{chr(92)}u001b[2J"}}' for i in range(99))
    with lo.serve([lo.status(400, REFUSAL)]) as server:
        server.models = f'{{"data": [{names}]}}'.encode()
        with pytest.raises(UserError) as error:
            run(endpoint(server), tmp_path, 1)
    assert str(error.value).isprintable() and str(error.value).endswith("'m4\\x1b[2J', …")


@pytest.mark.parametrize("models", [b"", b"<html>", b"[]", b'{"data": [7]}', b'{"data": []}', b'{"data": 0}', MODELS])
def test_without_a_list_or_with_the_model_in_it_a_refusal_is_the_calls_own_until_it_is_every_calls(tmp_path, models):
    with lo.serve([lo.status(400, REFUSAL)]) as server:
        server.models = models
        settings = endpoint(server, model="/runs/export", failures_in_a_row=4, concurrency=1)
        account, kinds = run(settings, tmp_path / "few", 3)
        assert kinds == ["status 400"] * 3 and account["counts"] == {"failed: status 400": 3, "sent": 3}
        with pytest.raises(UserError, match="refuses every call, the last: status 400; its log says why"):
            run(settings, tmp_path / "many", 100)
        assert len(server.requests) == 3 + 4
        assert len(server.looked_up) == 2  # once a run


def test_after_a_reply_refusals_are_their_samples_own_and_the_name_is_not_looked_up(tmp_path):
    with lo.serve(lambda _, number: lo.status(400, REFUSAL) if number else lo.data(COMPLETION)) as server:
        server.models = MODELS
        settings = endpoint(server, failures_in_a_row=4, concurrency=1)
        account, kinds = run(settings, tmp_path, 9)
        assert kinds[1:] == ["status 400"] * 8 and not server.looked_up
        # a kept reply is one, too
        assert run(settings, tmp_path, 9)[1] == kinds and not server.looked_up
    assert account["spent"] == {"calls": 9, "prompt_tokens": 25, "reply_tokens": 8, "cost": 0.0, "at_worst": 0}
