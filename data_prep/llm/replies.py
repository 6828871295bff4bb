"""What came back from an attempt: the model's reply with its account, or what is wrong instead."""

from __future__ import annotations

import email.utils
import json
import time
from dataclasses import dataclass
from typing import Any


class FailedAttempt(Exception):
    """One attempt failed."""

    def __init__(
        self,
        kind: str,
        *,
        retry: bool = True,
        charged: bool = True,
        own: bool = False,
        wait: float = 0.0,
        fix: str = "",
    ) -> None:
        """`retry`: it may pass. `charged`: it may cost. `own`: only this request is at fault. `wait`: seconds that the
        endpoint asks for. `fix`: what the user must do, where every other call would fail alike.
        """
        super().__init__(kind)
        self.kind, self.retry, self.charged, self.own, self.wait, self.fix = kind, retry, charged, own, wait, fix


@dataclass(frozen=True)
class Reply:
    """A model's reply."""

    text: str
    reasoning: str
    """Thoughts that the server returns apart from the text; empty where there are none, or where they stand in it."""
    finish: str
    """The server's `finish_reason`: `stop`, `length` (cut by the limit), `content_filter`, …; empty if it gave none."""

    @property
    def whole(self) -> str:
        """The text with its thoughts, if any, in a think block, also where the prompt's template had opened it."""
        if self.reasoning:
            return f"<think>{self.reasoning}</think>{self.text}"
        opened = "</think>" in self.text and "<think>" not in self.text
        return f"<think>{self.text}" if opened else self.text


def read_reply(data: bytes) -> tuple[Reply, tuple[int, int] | None]:
    """A chat completion's JSON, and (prompt, reply) tokens where the endpoint counts them.

    Raises FailedAttempt with what it is instead.
    """
    value = _json(data)
    try:
        choice = value["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason") or ""
        text = _text(message.get("content"))
        reasoning = _text(message.get("reasoning_content") or message.get("reasoning"))
        if not isinstance(finish, str):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        raise FailedAttempt("not a chat completion") from None
    if not (text.strip() or reasoning.strip() or finish == "content_filter"):
        raise FailedAttempt("empty reply")
    return Reply(text, reasoning, finish), _usage(value)


def read_usage(data: bytes) -> tuple[None, tuple[int, int] | None]:
    """As `read_reply`, of a call of which only the account counts. Raises FailedAttempt."""
    return None, _usage(_json(data))


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        start = data.lstrip()[:1]
        kind = "reply cut" if start == b"{" else "HTML instead of JSON" if start == b"<" else "no JSON"
        raise FailedAttempt(kind) from None


def _text(content: Any) -> str:
    """Message content: text, nothing, or a list of parts. TypeError for anything else."""
    if content is None:
        return ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str):
        raise TypeError
    return content.encode("utf-8", "replace").decode()  # JSON may smuggle in lone surrogates


def _usage(value: Any) -> tuple[int, int] | None:
    """Tokens as the endpoint counts them; None where that is absent or absurd, and the worst case stays booked."""
    usage = value.get("usage") if isinstance(value, dict) else None
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
    valid = bool(counts) and all(type(count) is int and 0 <= count < 10**9 for count in counts) and counts[0] > 0
    return (counts[0], counts[1]) if valid else None


def retry_after(value: str) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 where it is neither, or past."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError, TypeError):
            return 0.0
    return seconds if 0 < seconds < float("inf") else 0.0
