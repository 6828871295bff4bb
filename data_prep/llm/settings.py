"""Which endpoint is asked, how patiently, for how much, and whether it lies outside of the house."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from infimed_jax.errors import UserError

LOCAL = "http://127.0.0.1:8000/v1"
"""Where vLLM and SGLang's OpenAI-compatible servers usually listen."""

Reach = Literal["loopback", "private", "external"]


@dataclass(frozen=True)
class Budget:
    """What may be spent, over all runs that share a cache folder; 0 is no bound.

    A call is only sent if its worst case still fits: prompt bytes (no byte-level tokenizer makes more tokens than
    bytes), `image_tokens` an image, and the reply's limit.
    """

    tokens: int = 0
    """Maximum prompt and reply tokens, over all runs with this cache; 0: no bound."""
    cost: float = 0.0
    """Maximum money, over all runs with this cache, in the currency of the prices; needs both; 0: no bound."""
    prompt_price: float = 0.0
    """Price of a million prompt tokens."""
    reply_price: float = 0.0
    """Price of a million reply tokens."""
    image_tokens: int = 4096
    """Most tokens that the endpoint counts for one image."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.cost, self.prompt_price, self.reply_price, self.image_tokens) < 0:
            raise UserError("budgets, prices and image tokens must not be negative")
        if self.cost and not (self.prompt_price and self.reply_price):
            raise UserError("a budget in money needs the prices of a million prompt and reply tokens")

    def price(self, prompt: int, reply: int) -> float:
        return (prompt * self.prompt_price + reply * self.reply_price) / 1e6


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server. UserError where it cannot be asked, or must not be."""

    model: str
    url: str = LOCAL
    """Base address, with or without `/chat/completions`."""
    private: bool = False
    """The user's word that a server in a private network is the house's own; otherwise it counts as external."""
    key_variable: str = ""
    """Name of the environment variable with the API key; empty sends none."""
    concurrency: int = 8
    """Calls in flight at once."""
    timeout: float = 180.0
    """Seconds that a call may take, from connecting to the last byte: a slow stream cannot hold it open."""
    attempts: int = 5
    """Attempts of one call, the first included."""
    pause: float = 1.0
    """Seconds before the second attempt; doubles, with jitter, up to `longest_pause`."""
    longest_pause: float = 60.0
    """Seconds; also the bound on a server's own Retry-After."""
    failures_in_a_row: int = 20
    """Failed calls, with no success between, after which the run ends: the endpoint is down."""
    image_side: int = 1024
    """Maximum longer side of an image that is sent, pixels."""
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise UserError("the endpoint needs the name of a model")
        if min(self.concurrency, self.attempts, self.failures_in_a_row, self.image_side) < 1 or self.timeout <= 0:
            raise UserError("concurrency, attempts, failures in a row, image side and timeout must be positive")
        if min(self.pause, self.longest_pause) < 0:
            raise UserError("pauses must not be negative")
        if self.external and self.parsed.scheme != "https":
            raise UserError(f"endpoint {self.name} lies outside: it must be asked over https")
        if self.external and not (self.budget.tokens or self.budget.cost):
            raise UserError(f"endpoint {self.name} lies outside: give a budget in tokens or money")

    @cached_property
    def parsed(self) -> SplitResult:
        # The address itself is not repeated in these errors: it may hold credentials.
        try:
            url = urlsplit(self.url.strip())
            valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise UserError("the endpoint's address must look like http://127.0.0.1:8000/v1")
        if url.username is not None or url.password is not None or url.query or url.fragment:
            raise UserError("the endpoint's address must hold no user, password, query or fragment: keys come from "
                            "the environment variable that you name")  # fmt: skip
        return url

    @property
    def name(self) -> str:
        """Host and port, as errors and reports name it."""
        return self.parsed.netloc

    @cached_property
    def base_url(self) -> str:
        """The address before `/chat/completions`."""
        path = self.parsed.path.rstrip("/").removesuffix("/chat/completions")
        return f"{self.parsed.scheme}://{self.parsed.netloc}{path}"

    @property
    def chat_url(self) -> str:
        """Where a chat is completed."""
        return f"{self.base_url}/chat/completions"

    @cached_property
    def reach(self) -> Reach:
        """Where the server stands. A name counts as what the outermost of its addresses is."""
        host = str(self.parsed.hostname)
        try:
            found = [ipaddress.ip_address(host)]
        except ValueError:
            if host == "localhost":
                return "loopback"
            try:
                found = [ipaddress.ip_address(row[4][0]) for row in socket.getaddrinfo(host, None)]
            except (OSError, UnicodeError) as error:
                raise UserError(f"endpoint {self.name}: the host has no address: check its name") from error
        if all(address.is_loopback for address in found):
            return "loopback"
        inside = all((a.is_private or a.is_loopback) and not a.is_unspecified for a in found)
        return "private" if inside else "external"

    @cached_property
    def external(self) -> bool:
        return not (self.reach == "loopback" or (self.reach == "private" and self.private))

    def key(self) -> str:
        """The API key, or the empty string. UserError, which never shows it: not set, or no plain text."""
        if not self.key_variable:
            return ""
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise UserError(f"the environment variable {self.key_variable} is not set: it must hold the API key")
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(f"the environment variable {self.key_variable} holds no API key: only plain letters may")
        return key
