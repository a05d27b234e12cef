"""A real server behind a proxy that spoils a share of all tries: is each request answered once?

`transformers serve` answers with a small model. Between it and our engine a proxy refuses (429
with Retry-After), fails (500), keeps silent until the client gives up, or breaks the JSON in
the middle. Every answer that reaches us is compared with what the server said to that prompt.
Prints JSON: requests, tries, faults by kind, how many were answered, how many answers are
another request's, how many are kept, how many had to be asked a second time, the seconds.

    python benchmarks/faulty_endpoint.py --requests 2000 --share 0.3

Needs `pip install 'transformers[serving]' 'misstep[openai]'`.
"""

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from misstep.data.suites import attacked_prompts
from misstep.engines import openai
from misstep.engines.base import Request
from misstep.engines.cached import CachedEngine, Chosen
from misstep.engines.store import Store
from misstep.models.endpoint import Endpoint
from misstep.models.locate import locate
from misstep.models.weights import load_tokenizer, load_weights
from misstep.records import Message

KINDS = ("429", "500", "timeout", "broken JSON")
SECONDS = 6.0
"""After which the client gives a try up; misstep's own limit is 300."""


class Spoiler:
    """What the proxy does with each try, and what it has seen."""

    def __init__(self, port: int, share: float) -> None:
        self.port = port
        self.share = share
        self.dice = random.Random(0)
        self.tries = 0
        self.faults: Counter[str] = Counter()
        self.said: dict[str, str] = {}
        """The last thing that the server said to each prompt."""
        self.lock = threading.Lock()

    def fault(self) -> str | None:
        """What is to go wrong with the next try, if anything."""
        with self.lock:
            self.tries += 1
            spoiled = self.dice.random() < self.share
            kind = self.dice.choice(KINDS) if spoiled else None
            self.faults.update([kind] if kind else [])
            return kind

    def ask(self, body: bytes) -> tuple[int, bytes]:
        """The server's own answer."""
        server = http.client.HTTPConnection("127.0.0.1", self.port)
        server.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        answer = server.getresponse()
        content = answer.read()
        server.close()
        if answer.status == 200:
            prompt = json.loads(body)["messages"][-1]["content"]
            said = json.loads(content)["choices"][0]["message"]["content"]
            with self.lock:
                self.said[prompt] = said
        return answer.status, content


@contextmanager
def proxy(spoiler: Spoiler) -> Iterator[str]:
    """An address at which the spoiled server is found."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, b'{"object": "list", "data": []}')

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            fault = spoiler.fault()
            if fault == "429":
                self._send(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "1"})
            elif fault == "500":
                self._send(500, b'{"error": {"message": "out of order"}}')
            elif fault == "timeout":
                time.sleep(SECONDS + 1)
                self.close_connection = True
            else:
                status, content = spoiler.ask(body)
                self._send(status, content[: len(content) // 2] if fault else content)

        def _send(self, status: int, body: bytes, more: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in (more or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


@contextmanager
def transformers_serve(folder: Path) -> Iterator[int]:
    """The port of `transformers serve` with the embedded model, once it answers."""
    model = locate("smollm2-135m")
    load_weights(model).save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    command = Path(sys.executable).with_name("transformers")
    where = ("--host", "127.0.0.1", "--port", str(port), "--device", "cpu")
    quiet = ("--default-seed", "0", "--log-level", "error")
    # What it prints is no part of our JSON.
    process = subprocess.Popen(
        [command, "serve", str(folder), *where, *quiet], stdout=sys.stderr
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield port
    finally:
        process.terminate()
        process.wait()


def wait_for(url: str, process: "subprocess.Popen[bytes]", minutes: float = 5) -> None:
    """Return when the address answers.

    Raises:
        RuntimeError: the server ended, or the time is over.
    """
    until = time.monotonic() + 60 * minutes
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"{url}: expected a server, found none")


def asked(count: int) -> list[Request]:
    """The suite's attacks, made different by a number."""
    attacks = islice(attacked_prompts("goal-hijacking", "train", "seen", 0), count)
    return [
        Request(
            messages=(Message(role="user", content=f"Case {number}. {prompt.text}"),),
            max_tokens=4,
            temperature=0,
        )
        for number, prompt in enumerate(attacks)
    ]


def through_faults(count: int, share: float) -> dict[str, Any]:
    """Ask everything through the proxy, then everything again from the cache."""
    openai.SECONDS = SECONDS
    requests = asked(count)
    with TemporaryDirectory(prefix="misstep-faults-") as name:
        folder = Path(name)
        with transformers_serve(folder / "model") as port:
            spoiler = Spoiler(port, share)
            with proxy(spoiler) as url:
                cache = folder / "cache.sqlite"
                endpoint = Endpoint(str(folder / "model"), url)
                identity = openai.OpenAIEngine(endpoint).identity

                def cached() -> CachedEngine:
                    opened = partial(openai.OpenAIEngine, endpoint)
                    return CachedEngine(Chosen(identity, "", opened, at_once=count), cache)

                started = time.monotonic()
                with cached() as engine:
                    answers = engine.generate(requests)
                seconds = time.monotonic() - started
                with cached() as engine:
                    again = engine.generate(requests)
                    paid_again = engine.paid
                with Store(cache) as store:
                    kept = sum(holding.answers for holding in store.holdings())
    texts = [request.messages[-1].content for request in requests]
    right = [spoiler.said.get(t) == a.text for t, a in zip(texts, answers, strict=True)]
    return {
        "requests": count,
        "tries": spoiler.tries,
        "faults": dict(spoiler.faults.most_common()),
        "share_of_tries_spoiled": round(spoiler.faults.total() / spoiler.tries, 3),
        "answered": sum(answer.error is None for answer in answers),
        "not_what_the_server_said": right.count(False),
        "kept_in_the_cache": kept,
        "asked_again_by_a_second_run": paid_again,
        "second_run_says_the_same": [a.text for a in again] == [a.text for a in answers],
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--share", type=float, default=0.3, help="of all tries, spoiled")
    given = parser.parse_args()
    print(json.dumps(through_faults(given.requests, given.share), indent=2))
