"""The way to an endpoint and back: the openai package's client, of which only transport and types are used.

Retries, the budget and the cache are `client`'s, since each attempt is booked before it is sent. No redirect is
followed, no reply is read past a bound, and nothing but the request and the named key is sent: no header of the
package's own, and none from the environment.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import ssl
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import httpx2
import openai

from data_prep.llm.replies import FailedAttempt, retry_after
from data_prep.llm.settings import Endpoint

if TYPE_CHECKING:
    from openai._response import AsyncAPIResponse

MAX_REPLY_BYTES = 2**24
"""Bound on one HTTP reply: far above any text that a model writes."""
UNUSABLE = {
    401: "check the API key",
    402: "the account there has no money left",
    403: "check the API key and what it may do",
    404: "check the address, which usually ends in /v1, and the model's name",
    405: "check the address",
}
"""Answers that every other call would get too: they end the run."""
_HEADERS = {"host", "connection", "accept", "content-type", "content-length"}
"""What stays of a request's headers: the package adds facts about this machine, and OPENAI_CUSTOM_HEADERS."""
_UNSET = "unset"
"""For what the package would otherwise take from OPENAI_* variables; not sent."""


class _PlainClient(httpx2.AsyncClient):
    """Sends requests with the headers above and `key`, follows no redirect, and reads no refusal's body."""

    key = ""

    async def send(
        self, request: httpx2.Request, *, stream: bool = False, auth: Any = None, follow_redirects: Any = None
    ) -> httpx2.Response:
        kept = {name: value for name, value in request.headers.items() if name in _HEADERS}
        kept |= {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        sent = httpx2.Request(
            request.method, request.url, headers=kept, stream=request.stream, extensions=request.extensions
        )
        response = await super().send(sent, stream=True, follow_redirects=False)
        response.request = request  # the package looks for headers of its own there
        if response.status_code != 200:  # it would read the body to its end, however long
            await response.aclose()
        return response


class Transport:
    """One connection pool to `endpoint`. UserError where its key is not set."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        for name in ("httpx2", "httpcore2", "openai"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they log addresses, headers and requests
        most = endpoint.concurrency
        http = _PlainClient(
            verify=_certificates(),
            timeout=endpoint.timeout,
            trust_env=endpoint.external,  # a proxy from the environment must not see what stays in the house
            limits=httpx2.Limits(max_connections=most, max_keepalive_connections=most),
        )
        http.key = endpoint.key()
        self._openai = openai.AsyncOpenAI(
            api_key=_UNSET,
            admin_api_key=_UNSET,
            organization=_UNSET,
            project=_UNSET,
            webhook_secret=_UNSET,
            base_url=endpoint.base_url,
            max_retries=0,
            http_client=http,
        )

    async def close(self) -> None:
        await self._openai.close()

    async def complete(self, body: dict[str, Any]) -> bytes:
        """The answer's body. Raises FailedAttempt."""
        try:
            async with (
                asyncio.timeout(self._endpoint.timeout),  # the client's own timeouts start anew with every byte
                self._openai.chat.completions.with_streaming_response.create(**body) as response,
            ):
                return await _read(response)
        except openai.APIStatusError as error:
            raise self._refused(error.response) from None
        except (TimeoutError, httpx2.HTTPError, httpx2.InvalidURL, openai.OpenAIError) as error:
            raise _broken(error) from None

    async def models(self) -> list[str]:
        """Names of the endpoint's models; empty where it has no list, or none that can be read."""
        try:
            async with (
                asyncio.timeout(self._endpoint.timeout),
                self._openai.models.with_streaming_response.list() as response,
            ):
                return [str(model["id"]) for model in json.loads(await _read(response))["data"]]
        except (TimeoutError, httpx2.HTTPError, openai.OpenAIError, FailedAttempt):
            return []
        except (ValueError, RecursionError, KeyError, TypeError):  # no JSON, or another shape
            return []

    def _refused(self, response: httpx2.Response) -> FailedAttempt:
        status = response.status_code
        if status in UNUSABLE:
            return FailedAttempt(f"status {status}", charged=False, fix=UNUSABLE[status])
        if 300 <= status < 400:
            target = _target(self._endpoint.chat_url, response.headers.get("location", ""))
            kind = "redirected" if target == self._endpoint.name else "redirected to another host"
            return FailedAttempt(f"{kind} (not followed)", retry=False, charged=False)
        if status in (429, 503):
            wait = retry_after(response.headers.get("retry-after", ""))
            return FailedAttempt(f"status {status}", charged=False, wait=wait)
        if status >= 500 or status == 408:
            return FailedAttempt(f"status {status}")  # it may have been computed, and billed, before it failed
        if status in (409, 425):
            return FailedAttempt(f"status {status}", charged=False)
        return FailedAttempt(f"status {status}", retry=False, charged=False, own=True)


def _broken(error: Exception) -> FailedAttempt:
    """The failure of an attempt that got no whole answer."""
    if isinstance(error, (TimeoutError, httpx2.TimeoutException, openai.APITimeoutError)):
        return FailedAttempt("timed out")
    match error.__cause__ if isinstance(error, openai.APIConnectionError) else error:
        case httpx2.ConnectError() as cause:
            return FailedAttempt(
                "certificate refused" if "CERTIFICATE" in str(cause) else "connection refused", charged=False
            )
        case httpx2.RemoteProtocolError() as cause:
            cut = "complete message body" in str(cause)  # h11 has no class of its own for a body that ends early
            return FailedAttempt("reply cut" if cut else "no HTTP reply")
        case httpx2.TransportError():
            return FailedAttempt("connection broken")
        case httpx2.DecodingError():
            return FailedAttempt("reply in a broken encoding")
    return FailedAttempt("request failed", retry=False, own=True)


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes a tenth of a second."""
    return httpx2.create_ssl_context()


async def _read(response: AsyncAPIResponse[Any]) -> bytes:
    if response.status_code != 200:
        raise FailedAttempt(f"status {response.status_code}", retry=False, charged=False, own=True)
    pieces, size = [], 0
    async for piece in response.iter_bytes():
        size += len(piece)
        if size > MAX_REPLY_BYTES:
            raise FailedAttempt("reply too large", retry=False, own=True)
        pieces.append(piece)
    return b"".join(pieces)


def _target(url: str, location: str) -> str:
    """Host and port that a redirect points to."""
    try:
        return urlsplit(urljoin(url, location)).netloc
    except ValueError:
        return ""
