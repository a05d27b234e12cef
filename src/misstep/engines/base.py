"""The engine contract: requests in, one completion a request out, in the same order.

Callers know nothing of the backend. A request carries its own seed, so that several samples of
one prompt are several requests; an engine that can promise it gives the same text for the same
request whatever else is in the batch. An engine's `identity` names weights, adapter, precision
and backend by content: it is part of the cache key, so stale weights cannot answer.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Self

from misstep.models.rendering import Renderer
from misstep.records import Message, Record

AT_ONCE = 4096
"""Requests in one call, where an engine asks for no more: many batches, few megabytes."""


BATCH = 128
"""Requests that an engine answers together where the caller does not say."""


class Request(Record):
    """One conversation to be continued by the model."""

    messages: tuple[Message, ...]
    max_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy decoding; the seed then changes nothing."""
    top_p: float = 1.0
    seed: int = 0


class Completion(Record):
    """A model's continuation of a conversation, special tokens removed."""

    text: str
    tokens: int
    """Generated tokens, the end token included."""
    truncated: bool = False
    """Whether it stopped at `max_tokens`."""
    error: str | None = None
    """Why there is no answer to this request; the text is then empty. An engine whose requests
    fail one by one says so here, one that fails as a whole raises."""


def failure(reason: str) -> Completion:
    """A completion that tells why there is none."""
    return Completion(text="", tokens=0, error=reason)


def in_order(parts: Iterable[Sequence[tuple[int, Completion]]]) -> list[Completion]:
    """All that a stream of parts gives, by place."""
    found = dict(pair for part in parts for pair in part)
    return [found[place] for place in range(len(found))]


def completed(renderer: Renderer, ids: Sequence[int]) -> Completion:
    """What generated tokens say, up to the end of the turn."""
    text = renderer.decode(ids)
    end = renderer.next_turn(text)
    if end is None:
        ended = bool(ids) and ids[-1] in renderer.stop_ids
        return Completion(text=text, tokens=len(ids), truncated=not ended)

    def shows_end(count: int) -> bool:
        return renderer.next_turn(renderer.decode(ids[:count])) is not None

    # What was generated beyond it depends on the engine, and is not counted.
    tokens = bisect_left(range(len(ids)), True, key=shows_end)
    return Completion(text=text[:end], tokens=tokens)


CONTEXT = "the model's context"


def too_long(prompt: int, request: Request, most: int | None, what: str) -> Completion | None:
    """The record of a request that does not fit, with its answer, into so many tokens; or None.

    Beyond them a model's answer, or a judge's verdict, is that of a model that nobody trained.
    """
    if most is None or prompt + request.max_tokens <= most:
        return None
    return failure(
        f"the prompt ({prompt} tokens) and its answer ({request.max_tokens} at most) exceed "
        f"{what} of {most} tokens"
    )


class Engine:
    """A model that answers batches of requests."""

    identity: str
    """Names weights, adapter, precision and backend; equal identity, equal answers."""
    at_once: int = AT_ONCE
    """Requests that a call should hold at most. An engine whose start is dear asks for more."""
    elsewhere: bool = False
    """Whether other machines do the work: this one has time meanwhile."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer every request, in order. An engine has its own way of this or of `stream`.

        Raises:
            EngineError: the backend could not answer.
        """
        return in_order(self.stream(requests, BATCH))

    def stream(
        self, requests: Sequence[Request], batch: int
    ) -> Iterator[list[tuple[int, Completion]]]:
        """Answer in parts, each ready to be kept: completions with their requests' places.

        An engine whose answers do not depend on their neighbours may give each as it comes.
        Others answer batches of fixed size: what is left of them after an interruption forms
        the same batches again.

        Raises:
            EngineError: the backend could not answer; the parts before are whole.
        """
        for start in range(0, len(requests), batch):
            yield list(enumerate(self.generate(requests[start : start + batch]), start))

    def close(self) -> None:
        """Give back the memory that the model holds; the engine cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
