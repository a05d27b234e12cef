"""A real HTTP server for tests, with an OpenAI-compatible endpoint that can misbehave."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Call = dict[str, Any]
"""The body of a request to chat/completions."""
Reply = dict[str, Any] | bytes | None
"""An answer, raw bytes in place of JSON, or None to drop the connection."""


@dataclass
class Served:
    """What the server does, and what it has seen."""

    reply: Callable[[Call], tuple[int, Reply, dict[str, str]]]
    """Status, body and headers for a call; `tries` says how often it came before."""
    url: str = ""
    key: str | None = None
    """The key that is asked for; none where left out."""
    calls: list[Call] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    """The most calls that were under way together."""
    running: int = 0
    tries: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def number(self, call: Call) -> int:
        """How many calls with this text there were, this one included."""
        with self.lock:
            self.tries[text_of(call)] += 1
            return self.tries[text_of(call)]


def text_of(call: Call) -> str:
    return str(call["messages"][-1]["content"])


def answer(text: str, tokens: int | None = None, finish: str = "stop") -> dict[str, Any]:
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text},
            }
        ],
        "usage": {
            "prompt_tokens": 1,
            "completion_tokens": len(text.split()) if tokens is None else tokens,
            "total_tokens": 2,
        },
    }


def echo(call: Call) -> tuple[int, Reply, dict[str, str]]:
    return 200, answer(text_of(call)), {}


def after(seconds: float, call: Call) -> tuple[int, Reply, dict[str, str]]:
    time.sleep(seconds)
    return echo(call)


@contextmanager
def serve(
    reply: Callable[[Call], tuple[int, Reply, dict[str, str]]] = echo,
    key: str | None = None,
    port: int = 0,
    listing: Callable[[Mapping[str, str]], int] | None = None,
) -> Iterator[Served]:
    """A server; `listing` gives the status of its list of models, by the headers."""
    state = Served(reply, key=key)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # /models
            status = 200 if self._known() else 401
            if listing is not None:
                status = listing(dict(self.headers))
            self._send(status, {"object": "list", "data": []}, {})

        def do_POST(self) -> None:
            call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.calls.append(call)
                state.headers.append(dict(self.headers))
                state.running += 1
                state.at_once = max(state.at_once, state.running)
            try:
                status, body, headers = (
                    state.reply(call)
                    if self._known()
                    else (401, {"error": {"message": f"no such key: {state.key}"}}, {})
                )
            finally:
                with state.lock:
                    state.running -= 1
            self._send(status, body, headers)

        def _known(self) -> bool:
            return state.key is None or self.headers["Authorization"] == f"Bearer {state.key}"

        def _send(self, status: int, body: Reply, headers: dict[str, str]) -> None:
            if body is None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def handle(self) -> None:
            with suppress(ConnectionError, ValueError, OSError):
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
