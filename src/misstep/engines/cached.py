"""A cache around any engine: a finished model call is never paid twice.

Answers are kept in one SQLite file by engine identity and request. Misses go to the engine in
batches of fixed size, and each batch is stored in one transaction: a process killed at any
moment leaves whole batches, so the next run forms the same batches and gets the same texts. A
completion that carries an error is handed on and not kept: the next run asks again. The engine
itself is opened at the first miss only.
"""

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

from misstep.engines.base import Completion, Engine, Request
from misstep.errors import RunError
from misstep.records import digest

Opener = Callable[[], Engine]
Notify = Callable[[int, int], None]
KEYS_A_QUERY = 500


class CachedEngine(Engine):
    """Answers from the cache where it can, from the engine where it must."""

    def __init__(self, identity: str, opener: Opener, path: Path, batch: int = 128) -> None:
        self.identity = identity
        self.batch = batch
        self.paid = 0
        """Requests that reached the engine."""
        self._opener = opener
        self._engine: Engine | None = None
        self.notify: Notify | None = None
        """Called after each batch with the requests answered and those that were missing."""
        self._table = _open_table(path)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        keys = [digest([self.identity, r.id]) for r in requests]
        known = self._look_up(keys)
        missing = {k: r for k, r in zip(keys, requests, strict=True) if k not in known}
        waiting = list(missing)
        for start in range(0, len(waiting), self.batch):
            chunk = waiting[start : start + self.batch]
            answers = self._pay([missing[key] for key in chunk])
            self._store(chunk, answers)
            known.update(zip(chunk, answers, strict=True))
            if self.notify:
                self.notify(start + len(chunk), len(waiting))
        return [known[key] for key in keys]

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._table.close()

    def _pay(self, requests: list[Request]) -> list[Completion]:
        if self._engine is None:
            engine = self._opener()
            if engine.identity != self.identity:
                engine.close()
                raise RunError(
                    f"the engine is {engine.identity}, expected {self.identity}: the model's "
                    "files changed while the run was going on. Run the same command again."
                )
            self._engine = engine
        self.paid += len(requests)
        return self._engine.generate(requests)

    def _look_up(self, keys: list[str]) -> dict[str, Completion]:
        found: dict[str, Completion] = {}
        for start in range(0, len(keys), KEYS_A_QUERY):
            part = keys[start : start + KEYS_A_QUERY]
            marks = ",".join("?" * len(part))
            query = f"SELECT key, completion FROM completions WHERE key IN ({marks})"
            for key, text in self._table.execute(query, part):
                found[key] = Completion.model_validate_json(text)
        return found

    def _store(self, keys: list[str], answers: list[Completion]) -> None:
        rows = [
            (key, answer.model_dump_json())
            for key, answer in zip(keys, answers, strict=True)
            if answer.error is None
        ]
        with self._table:
            self._table.executemany("INSERT OR IGNORE INTO completions VALUES (?, ?)", rows)


def _open_table(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = sqlite3.connect(path, timeout=60)
    try:
        # Write-ahead logging survives a killed process and lets several runs share the file.
        table.execute("PRAGMA journal_mode=WAL")
        table.execute("PRAGMA synchronous=NORMAL")
        table.execute(
            "CREATE TABLE IF NOT EXISTS completions (key TEXT PRIMARY KEY, completion TEXT)"
        )
    except sqlite3.DatabaseError as fault:
        table.close()
        raise RunError(
            f"{path}: expected a cache of model answers, found something else ({fault}). "
            "Move the file away; the answers in it are paid again."
        ) from fault
    return table
