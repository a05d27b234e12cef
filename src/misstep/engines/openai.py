"""Any OpenAI-compatible endpoint, through the `openai` package.

What can go wrong with one request is tried again, a bounded number of times and after the
server's own Retry-After; what then still fails is a completion that carries its error, and the
others go on. What would fail for every request alike (the key, the model's name, an endpoint
that answers nobody or refuses all) ends the run instead. A setting that the endpoint says it
does not support is left out from then on. How many requests are under way at once follows what
the endpoint bears (`Pace`).

Seeds and limits are passed on; whether equal requests give equal texts is the server's affair,
and so is which weights stand behind the name. This module knows the client library and no other
engine.
"""

import random
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from misstep.engines.base import Completion, Engine, Request, failure
from misstep.engines.pace import Pace
from misstep.engines.threads import as_done
from misstep.errors import EngineError, MissingExtra
from misstep.models.endpoint import OPENAI, Endpoint, refused_key

MOST_AT_ONCE = 512
"""Requests under way at most, whatever the endpoint bears: it may stand before a fleet."""
SECONDS = 300.0
"""For one try, waiting in the server's own queue included."""
HEADERS = frozenset(
    (
        *("host", "connection", "user-agent", "accept", "accept-encoding"),
        *("content-type", "content-length", "authorization"),
        # The library's note to itself that the answer is to be given as it came.
        "x-stainless-raw-response",
    )
)
"""All that an endpoint is sent beside the request itself."""
OPENAI_HEADERS = frozenset(("openai-organization", "openai-project"))
SHOWN = 200
"""Characters of a server's message that an error keeps."""
SETTINGS = ("max_tokens", "temperature", "top_p", "seed")
NEWER_LIMIT = "max_completion_tokens"
"""What OpenAI's own models call `max_tokens`, and some others."""
UNSUPPORTED = re.compile(
    "unsupported|not support|unrecognized|unknown|not permitted|deprecated|cannot both", re.I
)
WHOLE = frozenset(
    (
        *("stop", "eos", "eos_token", "end", "end_turn", "stop_sequence", "stop_token"),
        *("completed", "done", "tool_calls", "function_call"),
    )
)
"""Reasons to end of an answer that is whole, as servers call them."""
CUT = frozenset(("length", "max_tokens", "model_length"))
WITHHELD = re.compile("content_filter|safety|recitation|blocklist|prohibited_content|spii")
SILENT_TRIES = 3
"""So often a request is tried to which a server answers, but with no choice."""
BESIDE = ("reasoning_content", "reasoning", "refusal", "tool_calls")
"""Where an answer may hold something else than its text."""
PLAIN = "Hello."
"""What nobody refuses for its own sake."""


@dataclass(frozen=True)
class Patience:
    """How often a request is tried, and how long is waited in between."""

    tries: int = 8
    first_wait: float = 0.5
    """Seconds; doubled after each try that the server gives no time for."""
    longest_wait: float = 60.0
    """A server that asks for a longer one is not waited for."""
    in_a_row: int = 16
    """So many requests without an answer, one after the other, and the endpoint is given up."""


class Fault(NamedTuple):
    """Why one try gave no answer."""

    reason: str
    kind: Literal["busy", "broken", "silent", "refused", "hopeless"]
    """`busy` and `broken` may pass, `silent` seldom does; `refused` is about this request,
    `hopeless` about all."""
    wait: float | None = None
    """Seconds that the server asks for."""


class OpenAIEngine(Engine):
    """Answers from an endpoint, many requests at once."""

    elsewhere = True

    def __init__(
        self,
        endpoint: Endpoint,
        patience: Patience | None = None,
        pace: Pace | None = None,
        proxies: bool = True,
    ) -> None:
        """Ask nobody yet; `proxies`: whether those that the environment names are used."""
        if find_spec("openai") is None:
            raise MissingExtra("openai", "openai")
        from openai import DefaultHttpxClient, OpenAI

        self.identity = identity(endpoint)
        self.endpoint = endpoint
        self.patience = patience or Patience()
        self.pace = pace or Pace(MOST_AT_ONCE)
        # Tries are counted here: the pace must hear of those that failed.
        self._client = OpenAI(
            base_url=endpoint.url,
            api_key=endpoint.key or "none",
            max_retries=0,
            timeout=SECONDS,
            http_client=DefaultHttpxClient(
                event_hooks={"request": [self._strip]}, trust_env=proxies
            ),
        )
        self._names = dict(zip(SETTINGS, SETTINGS, strict=True))
        """What the endpoint calls each setting; one that it does not support is not there.
        Replaced and never changed: other threads read it."""
        if endpoint.host == OPENAI:
            self._names["max_tokens"] = NEWER_LIMIT
        self._lock = threading.Lock()
        self._failed = self._refused = 0
        self._end = threading.Event()

    def stream(
        self, requests: Sequence[Request], batch: int
    ) -> Iterator[list[tuple[int, Completion]]]:
        """Give answers as they come: a request's neighbours are nothing to it.

        Raises:
            EngineError: no request can succeed; what had come by then was given. Of a failure
                of one the completion tells.
        """
        del batch
        self._end.clear()
        self._refused = 0
        try:
            for answer in as_done(self._answer, requests, self.pace.most):
                yield [answer]
        except BaseException:
            self._end.set()
            self.pace.wake()
            raise
        if requests and self._refused == len(requests):
            self._ask_plainly(requests[0])

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _answer(self, request: Request) -> Completion:
        dice, number = random.Random(request.id), 1
        while not isinstance(found := self._try(request), Completion):
            if found.kind == "hopeless":
                raise EngineError(f"{self._named()}: {found.reason}")
            if found.kind == "refused" or (found.kind == "silent" and number == SILENT_TRIES):
                with self._lock:
                    self._refused += 1
                return failure(found.reason)
            rest = self._rest(found, number)
            if rest is None:
                return self._given_up(found, number)
            # Not all at once again: those that failed together would fail together.
            self._end.wait(rest * dice.uniform(1, 1.5))
            number += 1
        self._failed = 0
        return found

    def _ask_plainly(self, request: Request) -> None:
        """Find out, where all were refused, whether it was for what stands in them."""
        turns = [turn.model_copy(update={"content": PLAIN}) for turn in request.messages]
        found = self._try(request.model_copy(update={"messages": tuple(turns)}))
        if isinstance(found, Fault) and found.kind in ("refused", "hopeless"):
            raise EngineError(
                f"{self._named()}: refuses every request, and a plain one too: {found.reason}"
            )

    def _rest(self, fault: Fault, number: int) -> float | None:
        """Seconds until the next try; None where there is none."""
        patience = self.patience
        if number == patience.tries or self._end.is_set():
            return None
        doubled: float = patience.first_wait * 2.0 ** (number - 1)
        if fault.wait is not None and fault.wait > patience.longest_wait:
            return None
        # A server that asks for no wait, or a short one, need not be ready by then.
        return max(fault.wait or 0.0, min(patience.longest_wait, doubled))

    def _given_up(self, fault: Fault, tries: int) -> Completion:
        if self._end.is_set():
            return failure("the run was stopped")
        with self._lock:
            self._failed += 1
            in_a_row = self._failed
        if in_a_row >= self.patience.in_a_row:
            raise EngineError(
                f"{self._named()}: gave no answer to {in_a_row} requests in a row, each tried "
                f"up to {self.patience.tries} times; the last reason: {fault.reason}. See to "
                "the server, then run the same command again."
            )
        return failure(f"{fault.reason}, tried {tries} times")

    def _try(self, request: Request) -> Completion | Fault:
        with self._turn() as started:
            found = self._send(request)
            if isinstance(found, Completion):
                self.pace.answered(found.tokens)
            elif found.kind == "busy":
                pause = found.wait or 0.0
                self.pace.refused(started, min(pause, self.patience.longest_wait))
        return found

    @contextmanager
    def _turn(self) -> Iterator[float]:
        started = self.pace.begin(self._end)
        try:
            yield started
        finally:
            self.pace.end()

    def _send(self, request: Request) -> Completion | Fault:
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

        if self._end.is_set():
            return Fault("", "broken")
        names = self._names
        try:
            return self._ask(request)
        except APIStatusError as error:
            if self._learnt(names, error):
                return self._send(request)
            return self._status_fault(error)
        except APITimeoutError:
            return Fault(f"no answer within {SECONDS:.0f} seconds", "busy")
        except APIConnectionError as error:
            return Fault(f"the connection failed ({error.__cause__ or error})", "broken")
        except OpenAIError as error:
            return Fault(self._clean(str(error)), "broken")

    def _ask(self, request: Request) -> Completion | Fault:
        """One call; whatever the client raises is told apart by who calls this."""
        raw = self._client.chat.completions.with_raw_response.create(**self._arguments(request))
        return read(raw.content)

    def _learnt(self, sent: Mapping[str, str], error: Any) -> bool:
        """Whether the server says of a setting that it does not support it, as it was sent."""
        said = self._clean(error.message)
        words = [error.param, *re.findall(r"\w+", said)]
        named = [word for word in words if word in SETTINGS and sent.get(word) == word]
        # Of two that an endpoint does not take together the temperature is the one that counts.
        name = "top_p" if {"temperature", "top_p"} <= set(named) else next(iter(named), "")
        if error.status_code not in (400, 422) or not name or not UNSUPPORTED.search(said):
            return False
        with self._lock:
            # Of several requests that find it out together one says so.
            if self._names.get(name) == name:
                self._do_without(name)
        return True

    def _do_without(self, name: str) -> None:
        newer = {name: NEWER_LIMIT} if name == "max_tokens" else {}
        self._names = {of: called for of, called in self._names.items() if of != name} | newer
        instead = NEWER_LIMIT if newer else "its own"
        told = f"{self._named()}: does not support {name}; from now on {instead} is used."
        print(told, file=sys.stderr, flush=True)

    def _strip(self, request: Any) -> None:
        """Take off what the client adds from the environment: it may be another host's."""
        kept = HEADERS | OPENAI_HEADERS if self.endpoint.host == OPENAI else HEADERS
        for name in set(request.headers) - kept:
            del request.headers[name]
        if self.endpoint.key is None:
            request.headers.pop("authorization", None)

    def _arguments(self, request: Request) -> dict[str, Any]:
        given = request.model_dump(include={"messages", *SETTINGS})
        settings = {name: given[of] for of, name in self._names.items()}
        return {"model": self.endpoint.model, "messages": given["messages"], **settings}

    def _status_fault(self, error: Any) -> Fault:
        status: int = error.status_code
        said = self._clean(error.message)
        reason = f"status {status}: {said}"
        if status == 401:
            return Fault(refused_key(self.endpoint, status), "hopeless")
        if status == 404:
            return Fault(f"{reason}. Check the model's name and the address.", "hopeless")
        if status == 402 or error.code == "insufficient_quota":
            return Fault(f"{reason}. The account has nothing left to spend.", "hopeless")
        asked = retry_after(error.response.headers, time.time())
        if status in (429, 503):
            return Fault(reason, "busy", asked)
        if status in (408, 409, 425) or status >= 500:
            return Fault(reason, "broken", asked)
        return Fault(reason, "refused")

    def _clean(self, text: str) -> str:
        """A server's message on one line, without the key, which some of them repeat."""
        key = self.endpoint.key
        text = text.replace(key, "[key]") if key else text
        return " ".join(text.split())[:SHOWN]

    def _named(self) -> str:
        return f"model {self.endpoint.model} at {self.endpoint.url}"


def identity(endpoint: Endpoint) -> str:
    """What an engine for this endpoint will be called; asks nobody."""
    return f"openai {endpoint.model}@{endpoint.url}"


class _Part(BaseModel):
    type: str
    text: str = ""


class _Message(BaseModel):
    content: str | list[_Part] | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    refusal: Any = None
    tool_calls: Any = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content if part.type == "text")
        return self.content or ""

    @property
    def instead(self) -> str | None:
        """What came in place of a text, or None: an empty text is one, too."""
        said = next((name for name in BESIDE if getattr(self, name)), None)
        return said or ("nothing" if self.content is None else None)


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    completion_tokens: int | None = None


class _Answer(BaseModel):
    """What is read of an answer; servers add much of their own."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None


def read(content: bytes) -> Completion | Fault:
    """An answer's completion; its tokens are 0 where the server does not count them."""
    try:
        answer = _Answer.model_validate_json(content)
    except ValidationError:
        return Fault(f"expected an answer in JSON, found {content[:80]!r}", "broken")
    if not answer.choices:
        # As some do where a prompt is blocked, or with an error in the place of an answer.
        return Fault(f"expected an answer, found no choice: {content[:80]!r}", "silent")
    choice = answer.choices[0]
    reason = (choice.finish_reason or "stop").casefold()
    if WITHHELD.match(reason):
        return Fault("withheld by the endpoint's content filter", "refused")
    if reason not in WHOLE | CUT:
        return Fault(f"expected a whole answer, found finish_reason {reason}", "broken")
    text, truncated = choice.message.text, reason in CUT
    if not text and truncated:
        # What was hidden has taken up all of it.
        return Fault("expected a text, found none within max_tokens: ask for more", "refused")
    if not text and (instead := choice.message.instead):
        return Fault(f"expected a text, found {instead}", "refused")
    tokens = answer.usage.completion_tokens if answer.usage else None
    return Completion(text=text, tokens=tokens or 0, truncated=truncated)


def retry_after(headers: Any, now: float) -> float | None:
    """Seconds that a server asks to wait, given as milliseconds, seconds or a date."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        try:
            if value is not None:
                return max(0.0, float(value) * unit)
        except ValueError:
            continue
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - now)
    except (KeyError, ValueError, TypeError):
        return None
