"""How many requests are under way at an endpoint at once.

The number grows by half as long as that brings more tokens a second, so that a queue at the
server, which only makes answers late, ends the growth. Where it brought nothing, the number
goes back one step, and the next trial comes some windows later. A refusal for want of capacity
halves it, once for all the requests that were under way together, and nobody begins before the
server's time is over. This module knows numbers and clocks; it knows no request.
"""

import threading
import time
from collections.abc import Callable

FIRST = 4
GAIN = 1.1
"""By so much must the rate rise for a larger number to be kept."""
WINDOW = 2
"""A rate is measured over so many answers for each request under way."""
HOLD = 8
"""Windows between a trial that brought nothing and the next trial."""
REST = 2
"""Windows between a refusal and the next trial. Few: where refusals come whatever the number,
more would keep it at one."""


class Pace:
    """Lets requests begin, hears how they end, and adapts."""

    def __init__(
        self, most: int, first: int = FIRST, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.most = most
        self.limit = min(first, most)
        """Requests that may be under way now."""
        self._clock = clock
        self._changed = threading.Condition()
        self._running = 0
        self._waiting = 0
        self._not_before = 0.0
        self._cut = float("-inf")
        self._smaller: tuple[int, float] | None = None
        """The step before the last growth, and its rate."""
        self._hold = 0
        self._begin_window()

    def begin(self, end: threading.Event | None = None) -> float:
        """Wait for a turn and take it; gives the time at which it was taken."""
        with self._changed:
            self._waiting += 1
            while not (end and end.is_set()):
                pause = self._not_before - self._clock()
                if pause <= 0 and self._running < self.limit:
                    break
                self._changed.wait(pause if pause > 0 else None)
            self._waiting -= 1
            self._running += 1
            return self._clock()

    def end(self) -> None:
        """Give a turn back."""
        with self._changed:
            self._running -= 1
            # One turn for one of those that wait: hundreds would wake for nothing.
            self._changed.notify()

    def wake(self) -> None:
        """Wake those that wait, so that they see that it is over."""
        with self._changed:
            self._changed.notify_all()

    def answered(self, tokens: int) -> None:
        """Count an answer; at the end of a window judge the number."""
        with self._changed:
            if not self._waiting:
                # The last answers come one by one: their rate says nothing about the number.
                self._begin_window()
                return
            self._answers += 1
            # An endpoint that counts no tokens is judged by its answers.
            self._tokens += max(1, tokens)
            if self._answers >= WINDOW * self.limit:
                self._judge(self._tokens / max(1e-9, self._clock() - self._window))
                self._begin_window()

    def refused(self, started: float, pause: float) -> None:
        """Halve the number, and let nobody begin for so many seconds."""
        with self._changed:
            now = self._clock()
            self._not_before = max(self._not_before, now + pause)
            if started >= self._cut:
                self._cut = now
                self.limit = max(1, self.limit // 2)
                self._smaller, self._hold = None, REST
            self._begin_window()

    def _judge(self, rate: float) -> None:
        if self._hold:
            self._hold -= 1
        elif self._smaller is not None and rate < GAIN * self._smaller[1]:
            self.limit, self._hold, self._smaller = self._smaller[0], HOLD, None
        elif self.limit < self.most:
            self._smaller = self.limit, rate
            self.limit = min(self.most, max(self.limit + 1, self.limit * 3 // 2))
            self._changed.notify_all()

    def _begin_window(self) -> None:
        self._window, self._answers, self._tokens = self._clock(), 0, 0
