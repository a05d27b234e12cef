"""Records by the million without holding them: kept in temporary files, gone when closed.

A shelf holds 8 bytes a record in memory, for the place where it begins. Names that have come
before are looked up in a temporary database. This module knows what a record is and what its
file looks like while a run goes on; it knows no source and no stage.
"""

import random
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Sequence
from tempfile import SpooledTemporaryFile
from typing import Generic, Self, TypeVar, overload

from misstep.records import Record

R = TypeVar("R", bound=Record)
HELD = 1 << 20
"""Bytes that stay in memory; a longer shelf becomes a file."""


class Shelf(Sequence[R], Generic[R]):
    """Records in an order of their own, each read when it is asked for."""

    def __init__(self, kind: type[R], records: Iterable[R] = ()) -> None:
        self._kind = kind
        self._file = SpooledTemporaryFile(HELD)  # noqa: SIM115  (closed with the shelf)
        self._starts = array("Q")
        self._end = 0
        for record in records:
            self.add(record)

    def add(self, record: R) -> None:
        """Put one more record at the end."""
        self._file.seek(self._end)
        self._starts.append(self._end)
        self._end += self._file.write(record.model_dump_json().encode() + b"\n")

    def draw(self, n: int | None, seed: int) -> Self:
        """Shuffle by the seed and keep the first `n`, or all."""
        random.Random(f"draw {seed}").shuffle(self._starts)
        del self._starts[len(self) if n is None else n :]
        return self

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, place: int) -> R: ...
    @overload
    def __getitem__(self, place: slice) -> list[R]: ...
    def __getitem__(self, place: int | slice) -> R | list[R]:
        starts = self._starts[place]
        return self._read(starts) if isinstance(starts, int) else list(map(self._read, starts))

    def __iter__(self) -> Iterator[R]:
        return map(self._read, self._starts)

    def _read(self, start: int) -> R:
        self._file.seek(start)
        return self._kind.model_validate_json(self._file.readline())


class Names:
    """Which names, as `digest` gives them, have come before, and what was noted with each."""

    def __init__(self) -> None:
        # Without a path SQLite keeps a file of its own, and that only when memory runs short.
        self._table = sqlite3.connect("", isolation_level=None)
        self._table.execute("PRAGMA journal_mode=OFF")
        self._table.execute("PRAGMA synchronous=OFF")
        self._table.execute("CREATE TABLE names (name INTEGER PRIMARY KEY, note TEXT)")
        self._table.execute("BEGIN")

    def add(self, name: str, note: str | None = None) -> bool:
        """Whether the name is new; a note is taken of the first of equal names only."""
        added = self._table.execute(
            "INSERT OR IGNORE INTO names VALUES (?, ?)", (_number(name), note)
        )
        return added.rowcount == 1

    def note(self, name: str) -> str | None:
        """What was noted with a name."""
        found = self._table.execute("SELECT note FROM names WHERE name = ?", (_number(name),))
        row: tuple[str | None] | None = found.fetchone()
        return row[0] if row else None


def _number(name: str) -> int:
    """16 hexadecimal digits as SQLite's signed integer."""
    return int(name, 16) - (1 << 63)
