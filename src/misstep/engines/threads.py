"""Work in threads that nobody has to wait for.

A `ThreadPoolExecutor` is left only when its threads are done, and so is the process: Ctrl-C
would wait for what a server takes its time over. Knows no engine and no request.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
