"""An OpenAI-compatible server on the loopback interface that can misbehave in every way that a socket allows."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from data_prep.llm.sight import probes

Behaviour = Callable[["Handler"], None]


@dataclass
class Server:
    url: str
    answer: Callable[[dict[str, Any], int], Behaviour]
    """(request body, its number from 0) to what is done about it."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    sees: bool = True
    """Images count among a prompt's tokens."""
    before_sight: int = 0
    """Requests that came before the last of the two that ask whether they do."""
    models: bytes = b""
    """What is said of the models; none: there is no list."""
    looked_up: list[str] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body in (seen_and_blind := probes(body["model"])):  # no call of a test's own
            self.state.before_sight = len(self.state.requests)
            tokens = 9 + 36 * (self.state.sees and body == seen_and_blind[0])
            return self.reply(200, completion("", {"prompt_tokens": tokens, "completion_tokens": 1}))
        with self.state.lock:
            number = len(self.state.requests)
            self.state.requests.append(body)
            self.state.headers.append(dict(self.headers))
            self.state.at_once += 1
            self.state.most_at_once = max(self.state.most_at_once, self.state.at_once)
        try:
            self.state.answer(body, number)(self)
        except OSError:  # the client has left
            self.close_connection = True
        finally:
            with self.state.lock:
                self.state.at_once -= 1

    def do_GET(self) -> None:
        self.state.looked_up.append(self.path)
        self.reply(200 if self.state.models else 404, self.state.models)

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def completion(text: Any, usage: Any = None, finish: Any = "stop", **message: Any) -> bytes:
    usage = {"prompt_tokens": 11, "completion_tokens": 7} if usage is None else usage
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def say(text: Any, **options: Any) -> Behaviour:
    return lambda handler: handler.reply(200, completion(text, **options))


def data(content: bytes, headers: dict[str, str] | None = None) -> Behaviour:
    return lambda handler: handler.reply(200, content, headers)


def status(code: int, body: bytes = b"{}", **headers: str) -> Behaviour:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.reply(code, body, names)


def html(handler: Handler) -> None:
    handler.reply(200, b"<!doctype html><html><body>Please log in</body></html>", {"Content-Type": "text/html"})


def hang(handler: Handler) -> None:
    handler.state.closing.wait(30)


def trickle(handler: Handler) -> None:
    """Never silent for long, never done: a time limit between bytes would not end it."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.state.closing.wait(0.02):
        handler.wfile.write(b" ")


def trickle_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while not handler.state.closing.wait(0.02):
        handler.wfile.write(b"y")


def cut_by_length(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(completion("half")[:40])
    handler.close_connection = True


def cut_chunk(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"64\r\n" + completion("half")[:40])
    handler.close_connection = True


def cut_json(handler: Handler) -> None:
    """Half a reply that looks whole to HTTP."""
    handler.reply(200, completion("half")[:60])


def reset(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def no_http(handler: Handler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    handler.close_connection = True


def bomb(handler: Handler) -> None:
    handler.reply(200, gzip.compress(b" " * 2**25), {"Content-Encoding": "gzip"})


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serve(answer: Callable[[dict[str, Any], int], Behaviour] | list[Behaviour]) -> Iterator[Server]:
    """A running server; `answer` decides by request, or is a list used up in order (its last for all that follow)."""
    if isinstance(answer, list):
        behaviours = answer
        answer = lambda body, number: behaviours[min(number, len(behaviours) - 1)]  # noqa: E731
    state = Server("", answer)
    handler = type("Bound", (Handler,), {"state": state})
    server = _Quiet(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
