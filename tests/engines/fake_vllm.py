"""Stands in for the `vllm` command: the same options and protocol, and no model.

It answers with the tokens of the prompt and then the first stop token. FAKE_VLLM makes it
misbehave: `dies` at its start, with the last words of FAKE_VLLM_SAYS; `leaves` at the first
request. What it was told goes to the file that FAKE_VLLM_TOLD names.
"""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def tell(what: dict[str, Any]) -> None:
    with Path(os.environ["FAKE_VLLM_TOLD"]).open("a") as file:
        file.write(json.dumps(what) + "\n")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.reply(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tell({"path": self.path, "call": call})
        if os.environ.get("FAKE_VLLM") == "leaves":
            print("CUDA out of memory", flush=True)
            os._exit(3)
        ids = [*call["prompt"], call["stop_token_ids"][0]][: call["max_tokens"]]
        self.reply(200, {"choices": [{"index": 0, "text": "not read", "token_ids": ids}]})

    def reply(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    if sys.argv[1:] == ["--version"]:
        print("INFO loading\n0.0.fake")
        sys.exit()
    if os.environ.get("FAKE_VLLM") == "dies":
        print(os.environ["FAKE_VLLM_SAYS"])
        sys.exit(1)
    tell({"pid": os.getpid(), "arguments": sys.argv[1:]})
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
