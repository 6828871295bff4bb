"""One chat call: from the cache, or sent within the budget, retried with back-off, and read with suspicion."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from data_prep.llm.account import Account
from data_prep.llm.cache import Cache
from data_prep.llm.messages import Message, image_count, text_bytes
from data_prep.llm.replies import FailedAttempt, Reply, read_reply, read_usage
from data_prep.llm.settings import Endpoint
from data_prep.llm.sight import NOT_COUNTED, UNKNOWN, probes, verdict
from data_prep.llm.transport import Transport
from data_prep.sources import SOURCES
from infimed_jax.errors import UserError

log = logging.getLogger(__name__)
UNKNOWN_MODEL = ("status 400", "status 404", "status 422")
"""Answers to a model's name that the server does not know, among others: transformers serve gives 400."""


BY_ENDPOINT = "endpoint: "
"""How a step's reason begins where a call failed, so that the next run asks again."""


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
        self._transport = Transport(endpoint)

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._transport.close()

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
        if image_count(body["messages"]):
            await self._look()
        for attempt in range(self.endpoint.attempts):
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            try:
                reply, _ = await self._attempt(body, read_reply)
            except FailedAttempt as failure:
                if failure.kind in UNKNOWN_MODEL:
                    await self._check_model(failure.kind)
                if failure.fix:
                    raise UserError(f"endpoint {self.endpoint.name} answers {failure.kind}: {failure.fix}") from None
                if not failure.retry or attempt + 1 == self.endpoint.attempts:
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
                try:
                    _, used = await self._attempt(body, read_usage)
                except FailedAttempt:
                    return  # the calls themselves will fail alike
                counted.append(used)
            self.sight = verdict(*counted)
            if self.sight == NOT_COUNTED:
                log.warning(
                    "warning: endpoint %s counts next to no prompt tokens for an image: its model may never see them, "
                    "for servers of text models drop them silently; serve a vision-language model",
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
                self._listed = await self._transport.models()
        if self._listed and self.endpoint.model not in self._listed:
            few = ", ".join(repr(name[:200]) for name in self._listed[:5]) + (", …" if len(self._listed) > 5 else "")
            raise UserError(
                f"endpoint {self.endpoint.name} answers {kind} and has no model {self.endpoint.model!r}: it lists {few}"
            ) from None

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
            fix = (
                "give it a longer --timeout or a lower --concurrency" if kind == "timed out" else "see its log, fix it"
            )
            raise UserError(
                f"endpoint {self.endpoint.name} failed {self._failures} calls in a row, the last: {kind}; replies so "
                f"far are kept: {fix} and run the same command"
            ) from None

    async def _attempt(
        self, body: dict[str, Any], read: Callable[[bytes], tuple[Any, tuple[int, int] | None]]
    ) -> tuple[Any, tuple[int, int] | None]:
        """What `read` makes of the reply, whose second part is (prompt, reply) tokens where the endpoint counts them.

        Booked at its worst case before it is sent. Raises FailedAttempt; what was refused (4xx, 503) or never left is
        taken to cost nothing, but a server that fails with another 5xx may have billed the call.
        """
        async with self.account.booked(self._most(body), body["max_tokens"]) as booking:
            self.counts["sent"] += 1
            try:
                value, booking.used = read(await self._transport.complete(body))
            except FailedAttempt as failure:
                booking.used = None if failure.charged else (0, 0)
                raise
        return value, booking.used


def check_cleared(endpoint: Endpoint, source: str) -> None:
    """UserError where data of `source` may not be sent to `endpoint`; a source that is not known is not cleared."""
    if endpoint.external and not (source in SOURCES and SOURCES[source].allow_external_api):
        raise UserError(
            f"source {source} is not cleared for endpoints outside, and {endpoint.name} is one: use a local endpoint"
        )
