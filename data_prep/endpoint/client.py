"""One chat call: from the cache, or sent within the budget, retried with back-off, and read with suspicion."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import random
import ssl
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit
from weakref import WeakValueDictionary

import httpx2

from data_prep.endpoint.account import Account
from data_prep.endpoint.cache import Cache
from data_prep.endpoint.messages import Message, image_count, text_bytes
from data_prep.endpoint.replies import FailedAttempt, Reply, read_reply, read_usage, retry_after
from data_prep.endpoint.settings import Endpoint
from data_prep.endpoint.sight import NOT_COUNTED, UNKNOWN, probes, verdict
from data_prep.sources import SOURCES
from infimed_jax.errors import UserError
from infimed_jax.files import to_json

log = logging.getLogger(__name__)
MAX_REPLY_BYTES = 2**24
"""Of one HTTP reply: far above any text that a model writes."""

UNUSABLE = {
    401: "check the API key",
    402: "the account there has no money left",
    403: "check the API key and what it may do",
    404: "check the address, which usually ends in /v1, and the model's name",
    405: "check the address",
}
"""Answers that every other call would get too: they end the run."""
UNKNOWN_MODEL = ("status 400", "status 404", "status 422")
"""Answers to a model's name that the server does not know, among others: transformers serve gives 400."""


class CallFailed(Exception):
    """A call had no usable reply after all its attempts; `kind` is a fixed phrase, so that reports can count it."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


_REPLY_FIELDS = {field.name for field in fields(Reply)}


class ChatClient:
    """Asks `endpoint`, with its cache and account in `folder`. An async context; use it inside one event loop.

    `counts` says what happened: `from the cache`, `sent`, `again: …` (retries) and `failed: …`, each by its kind.
    """

    def __init__(self, endpoint: Endpoint, folder: Path) -> None:
        self.endpoint = endpoint
        self.cache = Cache(folder)
        self.account = Account(folder, endpoint.budget)
        self.counts: Counter[str] = Counter()
        self._places = asyncio.Semaphore(endpoint.concurrency)
        self._asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._not_before = 0.0  # monotonic; a server that says "too many" says it to all calls
        self.sight = ""
        """Whether the endpoint takes notice of images, once one was sent."""
        self._looking = asyncio.Lock()
        self._failures = 0
        self._answered = False  # by a model, ever
        self._listing = asyncio.Lock()
        self._listed: list[str] | None = None  # the endpoint's models, once it was asked for them
        for name in ("httpx2", "httpcore2"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they log addresses and headers
        key = endpoint.key()
        self._http = httpx2.AsyncClient(
            headers={"Accept": "application/json", "Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
            verify=_certificates(),
            timeout=endpoint.timeout,
            follow_redirects=False,
            trust_env=endpoint.external,  # a proxy from the environment must not see what stays in the house
            limits=httpx2.Limits(max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency),
        )

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def chat(
        self, source: str, messages: Sequence[Message], *, max_tokens: int, temperature: float, seed: int = 0
    ) -> Reply:
        """The model's reply; `source` is whose text and images the messages hold. Another `seed` is another draw.

        Raises CallFailed; BudgetReached; UserError where the source may not be sent there, or the endpoint is of no
        use to any call.
        """
        check_cleared(self.endpoint, source)
        body = {
            "model": self.endpoint.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        key = Cache.key(self.endpoint.chat_url, body)
        async with self._asking.setdefault(key, asyncio.Lock()):  # equal requests at once are sent once
            entry = self.cache.get(key)
            if entry is not None and entry.keys() == _REPLY_FIELDS:
                self.counts["from the cache"] += 1
                self._failures, self._answered = 0, True  # what alone is left of the last run need not end this one
                return Reply(**entry)
            async with self._places:
                reply = await self._call(body)
            self.cache.put(key, asdict(reply))
            return reply

    def _most(self, body: dict[str, Any]) -> int:
        """Tokens that the endpoint may count for the prompt."""
        messages = body["messages"]
        return text_bytes(messages) + image_count(messages) * self.endpoint.budget.image_tokens

    async def _call(self, body: dict[str, Any]) -> Reply:
        payload = to_json(body).encode()
        if image_count(body["messages"]):
            await self._look()
        for attempt in range(self.endpoint.attempts):
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            try:
                reply, _ = await self._attempt(payload, self._most(body), body["max_tokens"], read_reply)
            except FailedAttempt as failure:
                if failure.kind in UNKNOWN_MODEL:
                    await self._check_model(failure.kind)
                if failure.mend:
                    raise UserError(f"endpoint {self.endpoint.name} answers {failure.kind}: {failure.mend}") from None
                if not failure.again or attempt + 1 == self.endpoint.attempts:
                    self._failed(failure.kind, of_endpoint=not failure.own)
                    raise CallFailed(failure.kind) from None
                self.counts[f"again: {failure.kind}"] += 1
                await self._back_off(attempt, failure)
                continue
            self._failures, self._answered = 0, True
            return reply
        raise AssertionError("attempts is at least 1")

    async def _look(self) -> None:
        """Once, before the first image is sent: a picture of ours with a question, and the question alone."""
        async with self._looking:
            if self.sight:
                return
            self.sight, counted = UNKNOWN, []
            for body in probes(self.endpoint.model):
                payload = to_json(body).encode()
                try:
                    _, used = await self._attempt(payload, self._most(body), body["max_tokens"], read_usage)
                except FailedAttempt:
                    return  # the calls themselves will tell
                counted.append(used)
            self.sight = verdict(*counted)
            if self.sight == NOT_COUNTED:
                log.warning(
                    "warning: endpoint %s counts next to no prompt tokens for an image: its model may never see them, "
                    "for servers of text models drop them unsaid; serve a vision-language model",
                    self.endpoint.name,
                )

    async def _check_model(self, kind: str) -> None:
        """UserError where the endpoint lists its models and ours is none: then every call will be refused alike.

        Asked once, and before the first reply alone: after one the model's name is not at fault.
        """
        async with self._listing:
            if self._answered:
                return
            if self._listed is None:
                self._listed = await self._models()
        if self._listed and self.endpoint.model not in self._listed:
            few = ", ".join(repr(name[:200]) for name in self._listed[:5]) + (", …" if len(self._listed) > 5 else "")
            raise UserError(
                f"endpoint {self.endpoint.name} answers {kind} and has no model {self.endpoint.model!r}: it lists {few}"
            ) from None

    async def _models(self) -> list[str]:
        """Names of the endpoint's models; empty where it has no list, or none that can be read."""
        try:
            async with (
                asyncio.timeout(self.endpoint.timeout),
                self._http.stream("GET", self.endpoint.models_url) as response,
            ):
                listed = json.loads(await _read(response))["data"] if response.status_code == 200 else []
            return [str(model["id"]) for model in listed]
        except (TimeoutError, httpx2.HTTPError, FailedAttempt, ValueError, RecursionError, KeyError, TypeError):
            return []

    async def _back_off(self, attempt: int, failure: FailedAttempt) -> None:
        endpoint = self.endpoint
        pause = endpoint.pause * 2**attempt * random.uniform(0.5, 1.0)  # jitter: calls that failed together part
        pause = min(max(pause, failure.wait), endpoint.longest_pause)
        if failure.wait:
            self._not_before = max(self._not_before, time.monotonic() + pause)
        await asyncio.sleep(pause)

    def _failed(self, kind: str, of_endpoint: bool) -> None:
        """Count a call that has failed; UserError after too many in a row that are the endpoint's fault.

        Before the first reply all are: what it refuses so often is in every call.
        """
        self.counts[f"failed: {kind}"] += 1
        self._failures += of_endpoint or not self._answered
        if self._failures >= self.endpoint.failures_in_a_row:
            if not of_endpoint:
                raise UserError(
                    f"endpoint {self.endpoint.name} refuses every call, the last: {kind}; its log says why: it may not "
                    "know the API key, or its model may take no images, or too few tokens for them and a reply "
                    "(--max-tokens, --image-side)"
                ) from None
            mend = (
                "give it a longer --timeout or a lower --concurrency" if kind == "timed out" else "see its log, mend it"
            )
            raise UserError(
                f"endpoint {self.endpoint.name} failed {self._failures} calls in a row, the last: {kind}; replies so "
                f"far are kept: {mend} and run the same command"
            ) from None

    async def _attempt(
        self,
        payload: bytes,
        prompt: int,
        limit: int,
        read: Callable[[bytes], tuple[Any, tuple[int, int] | None]],
    ) -> tuple[Any, tuple[int, int] | None]:
        """What is `read` of the reply, whose second part are (prompt, reply) tokens where the endpoint counts them.

        Booked at `prompt` and `limit` tokens meanwhile. Raises FailedAttempt; only refusals (429, 5xx and other 4xx)
        and calls that never left are taken to cost nothing.
        """
        async with self.account.booked(prompt, limit) as booking:
            self.counts["sent"] += 1
            try:
                value, booking.used = read(await self._fetch(payload))
            except FailedAttempt as failure:
                booking.used = None if failure.charged else (0, 0)
                raise
        return value, booking.used

    async def _fetch(self, payload: bytes) -> bytes:
        """The body of the answer. Raises FailedAttempt."""
        try:
            async with (
                asyncio.timeout(self.endpoint.timeout),  # the client's own timeouts start anew with every byte
                self._http.stream(
                    "POST", self.endpoint.chat_url, content=payload, headers={"Content-Type": "application/json"}
                ) as response,
            ):
                self._check_status(response)
                return await _read(response)
        except (TimeoutError, httpx2.TimeoutException):
            raise FailedAttempt("timed out") from None
        except httpx2.ConnectError as error:
            kind = "certificate refused" if "CERTIFICATE" in str(error) else "connection refused"
            raise FailedAttempt(kind, charged=False) from None
        except httpx2.RemoteProtocolError as error:
            cut = "complete message body" in str(error)  # h11 has no class of its own for a body that ends early
            raise FailedAttempt("reply cut" if cut else "no HTTP reply") from None
        except httpx2.TransportError:
            raise FailedAttempt("connection broken") from None
        except httpx2.DecodingError:
            raise FailedAttempt("reply in a broken encoding") from None
        except (httpx2.HTTPError, httpx2.InvalidURL):
            raise FailedAttempt("request failed", again=False, own=True) from None

    def _check_status(self, response: httpx2.Response) -> None:
        status = response.status_code
        if status == 200:
            return
        if status in UNUSABLE:
            raise FailedAttempt(f"status {status}", charged=False, mend=UNUSABLE[status])
        if 300 <= status < 400:
            same = _target(self.endpoint.chat_url, response.headers.get("location", "")) == self.endpoint.parsed.netloc
            kind = "redirected" if same else "redirected to another host"
            raise FailedAttempt(f"{kind} (not followed)", again=False, charged=False)
        if status == 429 or status == 503:
            wait = retry_after(response.headers.get("retry-after", ""))
            raise FailedAttempt(f"status {status}", charged=False, wait=wait)
        if status >= 500 or status in (408, 409, 425):
            raise FailedAttempt(f"status {status}", charged=False)
        raise FailedAttempt(f"status {status}", again=False, charged=False, own=True)


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes a tenth of a second."""
    return httpx2.create_ssl_context()


def check_cleared(endpoint: Endpoint, source: str) -> None:
    """UserError where data of `source` may not be sent to `endpoint`; a source that is not known is not cleared."""
    if endpoint.external and not (source in SOURCES and SOURCES[source].allow_external_api):
        raise UserError(
            f"source {source} is not cleared for endpoints outside, and {endpoint.name} is one: use a local endpoint"
        )


async def _read(response: httpx2.Response) -> bytes:
    pieces, size = [], 0
    async for piece in response.aiter_bytes():
        size += len(piece)
        if size > MAX_REPLY_BYTES:
            raise FailedAttempt("reply too large", again=False, own=True)
        pieces.append(piece)
    return b"".join(pieces)


def _target(url: str, location: str) -> str:
    """Host and port that a redirect points to."""
    try:
        return urlsplit(urljoin(url, location)).netloc
    except ValueError:
        return ""
