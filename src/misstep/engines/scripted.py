"""A scripted engine for tests and dry runs: no model, the same path as the real ones."""

from collections.abc import Callable, Sequence

from misstep.engines.base import Completion, Engine, Request
from misstep.records import digest

Script = Callable[[Request], str]


def echo(request: Request) -> str:
    """Repeat the last message; with a temperature, also the seed, so that samples differ."""
    text = request.messages[-1].content
    return f"{text} ({request.seed})" if request.temperature else text


class ScriptedEngine(Engine):
    """Answers with a function of the request and counts the requests that reached it."""

    def __init__(self, script: Script = echo, name: str = "scripted") -> None:
        self.script = script
        self.identity = f"scripted:{digest(name)}"
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.requests.extend(requests)
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Completion:
        words = self.script(request).split(" ")
        kept = words[: request.max_tokens]
        return Completion(
            text=" ".join(kept), tokens=len(kept), truncated=len(kept) < len(words)
        )
