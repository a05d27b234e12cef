"""Finished answers on disk: one SQLite file, shared by runs and by processes.

Answers are added and never changed. What is committed survives a killed process, whatever it
was doing: write-ahead logging leaves the last transaction whole or not at all. Nothing is read
at the start, so a million answers open as fast as none. Answers may be removed while runs use
the file: a run that misses one asks its model again. Threads may share a store, one operation
at a time; one that is closed fails where it is still wanted. Knows no engine and no request,
only keys.
"""

import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Self

from misstep.engines.base import Completion
from misstep.errors import DataError, RunError

CACHE = "cache.sqlite"
"""What the file is called in a run directory."""
NAMES_OF_TABLES = "SELECT name FROM sqlite_master WHERE type = 'table'"
KEYS_A_QUERY = 500
ROWS_A_DELETION = 5_000
"""Removed in one transaction; a run that wants to write waits for no more."""
PAGES_A_STEP = 2_000
"""Given back in one transaction."""
SECONDS_OF_WAITING = 60
PAGES_OF_LOG = 16_000
"""64 MB of new answers before they are moved into the file, which waits for the disk."""
KILOBYTES_OF_PAGES = 16_000
SCHEMA = """
CREATE TABLE IF NOT EXISTS engines (id INTEGER PRIMARY KEY, identity TEXT UNIQUE);
CREATE TABLE IF NOT EXISTS answers (
    place INTEGER PRIMARY KEY, key BLOB, engine INTEGER, at INTEGER,
    text TEXT, tokens INTEGER, truncated INTEGER
);
CREATE UNIQUE INDEX IF NOT EXISTS answers_by_key ON answers (key);
"""
# Rows lie in the order in which they came; only the index, 20 bytes an answer, is in the order
# of keys, so that a new answer touches a page that many share.


class Holding(NamedTuple):
    """What a store holds of one engine."""

    identity: str
    answers: int
    first: datetime
    """When the oldest was kept."""
    last: datetime


class Store:
    """Answers by key; one that is only read needs no right to write."""

    def __init__(self, path: Path, only_read: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._one_at_a_time = threading.Lock()
        self._table = sqlite3.connect(
            _to_read(path) if only_read else path,
            timeout=SECONDS_OF_WAITING,
            isolation_level=None,
            check_same_thread=False,
            uri=only_read,
        )
        try:
            self._refuse_foreign(only_read)
            if not only_read:
                self._prepare()
        except sqlite3.DatabaseError as fault:
            self._table.close()
            raise self._refused(fault) from fault

    def _refused(self, fault: sqlite3.DatabaseError) -> RunError:
        """What is wrong: with the disk or the rights, or with the file itself."""
        if isinstance(fault, sqlite3.OperationalError):
            return RunError(
                f"{self.path}: the cache of model answers cannot be read or written ({fault}). "
                "See to the disk's space and the folder's rights; the answers in it are safe."
            )
        return RunError(
            f"{self.path}: expected a cache of model answers, found something else ({fault}). "
            "Move the file away; the answers in it are paid again."
        )

    def _refuse_foreign(self, only_read: bool) -> None:
        """Leave somebody else's database as it is; an empty one can be filled but not read."""
        tables = [name for (name,) in self._table.execute(NAMES_OF_TABLES)]
        if tables and "answers" not in tables:
            raise sqlite3.DatabaseError(f"a database with the table {tables[0]}")
        if not tables and only_read:
            raise sqlite3.DatabaseError("an empty database")

    def _prepare(self) -> None:
        for pragma in (
            "auto_vacuum=INCREMENTAL",
            "journal_mode=WAL",
            "synchronous=NORMAL",
            f"wal_autocheckpoint={PAGES_OF_LOG}",
            f"cache_size=-{KILOBYTES_OF_PAGES}",
        ):
            self._table.execute(f"PRAGMA {pragma}")
        if not self._table.execute(
            "SELECT 1 FROM sqlite_master WHERE name = 'answers_by_key'"
        ).fetchone():
            with self._transaction():
                for statement in SCHEMA.split(";"):
                    self._table.execute(statement)

    def look_up(self, keys: Sequence[bytes]) -> dict[bytes, Completion]:
        """The answers that there are; a key without one is left out."""
        found: dict[bytes, Completion] = {}
        for start in range(0, len(keys), KEYS_A_QUERY):
            part = keys[start : start + KEYS_A_QUERY]
            marks = ",".join("?" * len(part))
            query = f"SELECT key, text, tokens, truncated FROM answers WHERE key IN ({marks})"
            with self._explained():
                for key, text, tokens, truncated in self._table.execute(query, part):
                    found[key] = Completion(text=text, tokens=tokens, truncated=bool(truncated))
        return found

    def keep(self, identity: str, answers: Mapping[bytes, Completion]) -> None:
        """Add answers of one engine, all of them or, where the process is killed, none."""
        now = int(time.time())
        with self._transaction():
            engine = self._number(identity)
            self._table.executemany(
                "INSERT OR IGNORE INTO answers VALUES (NULL, ?, ?, ?, ?, ?, ?)",
                [
                    (key, engine, now, answer.text, answer.tokens, answer.truncated)
                    for key, answer in answers.items()
                ],
            )

    def _number(self, identity: str) -> int:
        # Looked up each time: another process may have removed the engine with its answers.
        self._table.execute("INSERT OR IGNORE INTO engines VALUES (NULL, ?)", (identity,))
        query = "SELECT id FROM engines WHERE identity = ?"
        number: int = self._table.execute(query, (identity,)).fetchone()[0]
        return number

    def holdings(self) -> list[Holding]:
        """What there is, engine by engine, the latest used first."""
        query = (
            "SELECT identity, count(*), min(at), max(at) FROM answers "
            "JOIN engines ON engines.id = engine GROUP BY engine ORDER BY max(at) DESC, engine"
        )
        with self._explained():
            return [
                Holding(identity, answers, *map(datetime.fromtimestamp, times))
                for identity, answers, *times in self._table.execute(query)
            ]

    def prune(
        self,
        engine: str | None = None,
        days: float | None = None,
        megabytes: float | None = None,
    ) -> int:
        """Remove answers and give their space back; says how many.

        Args:
            engine: only those of engines whose identity contains this.
            days: only those that are older.
            megabytes: only the oldest of these, down to this size of all.
        """
        wanted, values = ["1"], list[object]()
        if engine is not None:
            wanted.append("engine IN (SELECT id FROM engines WHERE instr(identity, ?))")
            values.append(engine)
        if days is not None:
            wanted.append("at <= ?")
            values.append(int(time.time() - days * 86_400))
        removed = 0
        while megabytes is None or self.used_bytes() > megabytes * 1e6:
            removed += (now := self._remove(" AND ".join(wanted), values))
            if not now:
                break
        self._give_back()
        return removed

    def _remove(self, which: str, values: Iterable[object]) -> int:
        some = f"SELECT place FROM answers WHERE {which} ORDER BY place LIMIT {ROWS_A_DELETION}"
        with self._transaction():
            done = self._table.execute(
                f"DELETE FROM answers WHERE place IN ({some})", tuple(values)
            )
            return done.rowcount

    def used_bytes(self) -> int:
        """The size of what is in use; the file may be larger until space is given back."""
        used = self._pragma("page_count") - self._pragma("freelist_count")
        return self._pragma("page_size") * used

    def _pragma(self, name: str) -> int:
        value: int = self._table.execute(f"PRAGMA {name}").fetchone()[0]
        return value

    def _give_back(self) -> None:
        with self._transaction():
            self._table.execute(
                "DELETE FROM engines WHERE id NOT IN (SELECT DISTINCT engine FROM answers)"
            )
        while self._pragma("freelist_count") and self._pragma("auto_vacuum"):
            self._table.execute(f"PRAGMA incremental_vacuum({PAGES_A_STEP})").fetchall()
        # Where a run reads from the log, it stays; the file shrinks when the run has ended.
        self._table.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._explained():
            try:
                self._table.execute("BEGIN IMMEDIATE")
                yield
                self._table.execute("COMMIT")
            except BaseException:
                # Where the disk is full, SQLite may have ended the transaction by itself.
                if self._table.in_transaction:
                    self._table.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of a disk's fault, or of a damaged page, what to do."""
        try:
            with self._one_at_a_time:
                yield
        except sqlite3.DatabaseError as fault:
            # What is neither is a mistake of this program, and has a class of its own.
            if type(fault) in (sqlite3.DatabaseError, sqlite3.OperationalError):
                raise self._refused(fault) from fault
            raise

    def close(self) -> None:
        """Close the file; what was kept stays."""
        with self._one_at_a_time:
            self._table.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _to_read(path: Path) -> str:
    """The file as SQLite's address, which it reads without leaving anything beside it."""
    # A log stands beside a file that is in use. Without one SQLite would make it, unless told
    # that nobody writes.
    in_use = path.with_name(f"{path.name}-wal").exists()
    return f"{path.resolve().as_uri()}?mode=ro{'' if in_use else '&immutable=1'}"


def open_existing(path: Path, only_read: bool = False) -> Store:
    """Open a store that is there, given as a file or as the directory of a run.

    Raises:
        DataError: there is none, or the file is something else.
    """
    file = path / CACHE if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"{file}: expected a cache of model answers, found no file. Name a run directory, "
            "or the cache.sqlite in it."
        )
    try:
        return Store(file, only_read)
    except RunError as fault:
        if isinstance(fault.__cause__, sqlite3.OperationalError):
            raise
        raise DataError(
            f"{file}: expected a cache of model answers, found something else "
            f"({fault.__cause__}). Name a run directory, or the cache.sqlite in it."
        ) from fault
