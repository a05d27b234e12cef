"""A cache around any engine: a finished model call is never paid twice.

Answers are kept by engine identity and request. What is missing goes to the engine, and each
part of its answer is kept before the next is waited for. Most engines answer in batches of
fixed size: a process killed at any moment leaves whole batches, so the next run forms the same
batches and gets the same texts. A completion that carries an error is handed on and not kept:
the next run asks again. The engine itself is opened at the first miss only, and may rest where
the next stage that asks the same model finds it. One that needs the GPUs for itself is closed
while another is on them, and opened again at its next miss.
"""

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

from misstep.engines import turns
from misstep.engines.base import AT_ONCE, BATCH, Completion, Engine, Request
from misstep.engines.store import Store
from misstep.errors import RunError

Notify = Callable[[int, int], None]
MANY = 16 * AT_ONCE
"""Requests of a call to an engine on a GPU, with which a judge may take turns, and to an
endpoint, which has little to do while the last answers of a call are waited for."""


class Chosen(NamedTuple):
    """An engine that is not loaded yet."""

    identity: str
    """What the engine will be called, so that a cache can be asked before it is loaded."""
    why: str
    """One line: which engine, and for what reason."""
    open: Callable[[], Engine]
    at_once: int = AT_ONCE
    """Requests that a call should hold at most."""
    alone: bool = False
    """Whether it takes this machine's GPUs for itself."""
    elsewhere: bool = False
    """Whether other machines do the work."""

    def on_gpu(self) -> "Chosen":
        """The same, where it runs on a GPU."""
        return self._replace(at_once=MANY, alone=True)


class Rest:
    """Where the engine that was used last waits for who asks the same model next.

    A judge that is the model itself has no need to wait: it takes over the engine in use.
    """

    def __init__(self) -> None:
        self.users: WeakSet[CachedEngine] = WeakSet()
        self._engine: Engine | None = None

    def take(self, identity: str) -> Engine | None:
        """A loaded engine; another one that waits is closed, since two may not fit."""
        for user in self.users:
            if user.identity == identity and (loaded := user.hand_over()):
                return loaded
        engine, self._engine = self._engine, None
        if engine is None or engine.identity == identity:
            return engine
        engine.close()
        return None

    def leave(self, engine: Engine, on_gpu: bool) -> None:
        """Have an engine wait, in the place of the one before; who needs the GPU ends it."""
        self.give_up()
        self._engine = engine
        if on_gpu:
            turns.take(self)

    def give_up(self) -> None:
        """Close the engine that waits, if any."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


class CachedEngine(Engine):
    """Answers from the cache where it can, from the engine where it must."""

    def __init__(
        self, chosen: Chosen, path: Path, batch: int = BATCH, rest: Rest | None = None
    ) -> None:
        """Open the cache; without a place to rest the engine is closed with it."""
        self.identity, self.at_once = chosen.identity, chosen.at_once
        self.elsewhere = chosen.elsewhere
        self.batch = batch
        self.paid = 0
        """Requests that reached the engine."""
        self._chosen, self._rest = chosen, rest
        self._engine: Engine | None = None
        # A client of an endpoint is opened in no time, and may be busy in another thread.
        if rest is not None and not self.elsewhere:
            rest.users.add(self)
        self._answered = 0
        self.notify: Notify | None = None
        """Called with the requests that were missing: those answered, and all so far."""
        self._store = Store(path)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        keys = [self._key(request) for request in requests]
        known = self._store.look_up(keys)
        missing = {k: r for k, r in zip(keys, requests, strict=True) if k not in known}
        if missing:
            waiting = list(missing)
            for part in self._pay(list(missing.values())):
                answers = {waiting[place]: answer for place, answer in part}
                self._keep(answers)
                known |= answers
        return [known[key] for key in keys]

    def close(self) -> None:
        if self._rest is not None and self in self._rest.users and (loaded := self.hand_over()):
            self._rest.leave(loaded, self._chosen.alone)
        self.give_up()
        self._store.close()

    def hand_over(self) -> Engine | None:
        """The engine, if it is loaded: no longer this one's."""
        engine, self._engine = self._engine, None
        return engine

    def give_up(self) -> None:
        """Close the engine until it is needed again; the cache stays open."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _key(self, request: Request) -> bytes:
        # Half a hash still tells more requests apart than there will ever be.
        content = f"{self.identity}\n{request.model_dump_json()}"
        return sha256(content.encode()).digest()[:16]

    def _pay(self, requests: list[Request]) -> Iterator[list[tuple[int, Completion]]]:
        if self._rest is not None and self._engine is None:
            # Before the turn is taken: whose turn is over closes what it has.
            self._engine = self._rest.take(self.identity)
        if self._chosen.alone:
            turns.take(self)
        if self._engine is None:
            self._engine = self._opened()
        self.paid += len(requests)
        return self._engine.stream(requests, self.batch)

    def _opened(self) -> Engine:
        engine = self._chosen.open()
        if engine.identity != self.identity:
            engine.close()
            raise RunError(
                f"the engine is {engine.identity}, expected {self.identity}: the model's "
                "files changed while the run was going on. Run the same command again."
            )
        return engine

    def _keep(self, answers: dict[bytes, Completion]) -> None:
        whole = {key: answer for key, answer in answers.items() if answer.error is None}
        self._store.keep(self.identity, whole)
        self._answered += len(answers)
        if self.notify:
            self.notify(self._answered, self.paid)
