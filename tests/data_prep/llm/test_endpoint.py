"""Which endpoints are inside, which outside, and which are none."""

import socket

import pytest

from data_prep.llm import Budget, Endpoint
from infimed_jax.errors import UserError

TOKENS = Budget(tokens=1000)


@pytest.mark.parametrize(
    ("host", "reach"),
    [
        ("127.0.0.1", "loopback"),
        ("127.8.8.8", "loopback"),
        ("[::1]", "loopback"),
        ("localhost", "loopback"),
        ("10.1.2.3", "private"),
        ("192.168.0.9", "private"),
        ("172.16.0.1", "private"),
        ("[fd00::1]", "private"),
        ("8.8.8.8", "external"),
        ("0.0.0.0", "external"),
        ("172.32.0.1", "external"),
        ("[2001:4860:4860::8888]", "external"),
    ],
)
def test_reach_of_addresses(host, reach):
    url = f"https://{host}:8000/v1"
    ours, plain = Endpoint("m", url, private=True, budget=TOKENS), Endpoint("m", url, budget=TOKENS)
    assert ours.reach == plain.reach == reach
    assert plain.external == (reach != "loopback")  # a private network counts as outside until the user says otherwise
    assert ours.external == (reach == "external")


@pytest.mark.parametrize(
    ("addresses", "reach"),
    [
        (["127.0.0.1", "::1"], "loopback"),
        (["10.0.0.1"], "private"),
        (["10.0.0.1", "93.184.216.34"], "external"),
        (["127.0.0.1", "93.184.216.34"], "external"),
        (["127.0.0.1", "10.0.0.1"], "private"),
    ],
)
def test_a_name_is_what_the_outermost_of_its_addresses_is(monkeypatch, addresses, reach):
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [(0, 0, 0, "", (a, 0)) for a in addresses])
    assert Endpoint("m", "https://llm.example/v1", budget=TOKENS).reach == reach


def test_a_name_without_an_address_is_told(monkeypatch):
    def unknown(host, port):
        raise socket.gaierror(-2, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match=r"llm\.example.*no address"):
        Endpoint("m", "http://llm.example/v1")


def test_outside_needs_https_and_a_budget():
    with pytest.raises(UserError, match="https"):
        Endpoint("m", "http://8.8.8.8/v1", budget=TOKENS)
    with pytest.raises(UserError, match="budget"):
        Endpoint("m", "https://8.8.8.8/v1")
    assert Endpoint("m", "https://8.8.8.8/v1", budget=Budget(cost=1, prompt_price=1, reply_price=1)).external


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8000", "ftp://127.0.0.1/", "http://", "http://[::1", "file:///etc/passwd", "http://127.0.0.1:x/",
     "http://127.0.0.1:99999/", "http://me:geheim@127.0.0.1/v1", "http://127.0.0.1/v1?key=geheim",
     "http://127.0.0.1/v1#geheim"],
)  # fmt: skip
def test_what_is_no_address_is_refused_and_never_repeated(url):
    with pytest.raises(UserError) as error:
        Endpoint("m", url)
    assert "geheim" not in str(error.value)


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/chat/completions", "/v1/chat/completions/"])
def test_the_address_may_be_the_base_or_whole(path):
    assert Endpoint("m", "http://127.0.0.1:8000" + path).chat_url == "http://127.0.0.1:8000/v1/chat/completions"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"model": " "}, "model"),
        ({"model": "m", "concurrency": 0}, "concurrency"),
        ({"model": "m", "attempts": 0}, "attempts"),
        ({"model": "m", "timeout": 0.0}, "timeout"),
        ({"model": "m", "pause": -1.0}, "pauses"),
    ],
)
def test_impossible_settings_are_refused(options, word):
    with pytest.raises(UserError, match=word):
        Endpoint(**options)


def test_impossible_budgets_are_refused():
    with pytest.raises(UserError, match="negative"):
        Budget(tokens=-1)
    with pytest.raises(UserError, match="prices"):
        Budget(cost=1.0, prompt_price=1.0)
