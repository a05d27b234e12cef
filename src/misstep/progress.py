"""How far long work has come: a bar in a terminal, a plain line now and then elsewhere.

Also the engines of a command, which say why they were chosen and how far they are.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from misstep.engines.cached import CachedEngine, Chosen, Rest

SECONDS_BETWEEN_LINES = 15.0


class Progress(Protocol):
    """What the pipeline tells its reader."""

    def say(self, text: str) -> None:
        """One line that stays."""

    def update(self, what: str, done: int, total: int) -> None:
        """How much of one piece of work is done."""


class Silent:
    """Says nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def update(self, what: str, done: int, total: int) -> None:
        """Nothing."""


class Lines:
    """Plain lines on standard error, a few a minute."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def say(self, text: str) -> None:
        """One line that stays."""
        print(text, file=sys.stderr, flush=True)

    def update(self, what: str, done: int, total: int) -> None:
        """A line at the end of the work, and one every few seconds before."""
        now = time.monotonic()
        if done >= total or now - self._last.get(what, now) > SECONDS_BETWEEN_LINES:
            self.say(f"  {what}: {done} of {total}")
            self._last[what] = now
        self._last.setdefault(what, now)


class Bars:
    """Rich progress bars, one for each piece of work."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        self.live = RichProgress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, int] = {}

    def say(self, text: str) -> None:
        """One line above the bars."""
        self.live.console.print(text, markup=False, highlight=False)

    def update(self, what: str, done: int, total: int) -> None:
        """Move one bar; a new name makes a new bar."""
        from rich.progress import TaskID

        if what not in self._tasks:
            self._tasks[what] = int(self.live.add_task(what, total=total))
        self.live.update(TaskID(self._tasks[what]), completed=done, total=total)


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars where standard error is a terminal, else plain lines."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    bars = Bars()
    with bars.live:
        yield bars


class Engines:
    """The engines of a command, behind one cache; each reason for one is said once.

    One of them may wait for its next use, until it is told to rest no longer.
    """

    def __init__(self, cache: Path, progress: Progress) -> None:
        self.cache = cache
        self.progress = progress
        self._rest = Rest()
        self._said: set[str] = set()

    @contextmanager
    def opened(self, chosen: Chosen, what: str) -> Iterator[CachedEngine]:
        """A cached engine that loads its model at the first answer that is not there yet.

        `what` is how its progress is called.
        """
        if chosen.why not in self._said:
            self.progress.say(f"Engine: {chosen.why}")
            self._said.add(chosen.why)
        with CachedEngine(chosen, self.cache, rest=self._rest) as engine:
            engine.notify = partial(self.progress.update, what)
            yield engine

    def close(self) -> None:
        """Close the engine that waits, if any; the next one that is opened may wait again."""
        self._rest.give_up()
