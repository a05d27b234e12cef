"""Work in threads that nobody has to wait for.

A `ThreadPoolExecutor` is left only when its threads are done, and so is the process: Ctrl-C
would wait for what a server takes its time over. Knows no engine and no request.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def as_done(
    work: Callable[[T], R], items: Sequence[T], threads: int
) -> Iterator[tuple[int, R]]:
    """What is made of each item, with its place, as it comes; the first failure ends it.

    Nothing more is begun where the caller looks no further, and what is under way is left.
    """
    waiting = deque(enumerate(items))
    came: SimpleQueue[tuple[int, R] | BaseException] = SimpleQueue()

    def run() -> None:
        while True:
            try:
                place, item = waiting.popleft()
            except IndexError:
                return
            try:
                came.put((place, work(item)))
            except BaseException as error:  # Raised where it is waited for.
                came.put(error)

    for _ in range(min(threads, len(items))):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in items:
            found = came.get()
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        waiting.clear()


def behind(work: Callable[[T], R], items: Iterable[T], most: int) -> Generator[R, None, None]:
    """What is made of each item, in order; the next ones are waited for meanwhile.

    Items are taken by the caller's thread, worked on by another, one after the other. So many
    at most wait for it, or for the caller. A failure is raised where its item's turn comes,
    and nothing after it is begun.
    """
    given: SimpleQueue[T | None] = SimpleQueue()
    came: SimpleQueue[R | BaseException] = SimpleQueue()
    over = threading.Event()

    def run() -> None:
        while (item := given.get()) is not None and not over.is_set():
            try:
                came.put(work(item))
            except BaseException as error:  # Raised where it is waited for.
                came.put(error)
                return

    def next_one() -> R:
        found = came.get()
        if isinstance(found, BaseException):
            raise found
        return found

    threading.Thread(target=run, daemon=True).start()
    waiting = 0
    try:
        for item in items:
            given.put(item)
            waiting += 1
            while waiting > most or not came.empty():
                waiting -= 1
                yield next_one()
        for _ in range(waiting):
            yield next_one()
    finally:
        over.set()
        given.put(None)
