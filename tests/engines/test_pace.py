"""The pace settles near what a server bears; time is a number here, no test waits."""

import threading

import pytest

from misstep.engines.pace import REST, Pace


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def rounds(pace: Pace, clock: Clock, capacity: float, answers: int) -> list[int]:
    """Answers of ten tokens from a server that gives `capacity` of them a second at most.

    One request alone takes a second, so that up to the capacity more at once are faster.
    """
    pace._waiting = 1  # Others want a turn throughout.
    limits = []
    for _ in range(answers):
        clock.now += 1 / min(pace.limit, capacity)
        pace.answered(10)
        limits.append(pace.limit)
    return limits


@pytest.mark.parametrize("capacity", [1, 6, 20])
def test_the_number_settles_where_more_brings_nothing(capacity: int) -> None:
    clock = Clock()
    limits = rounds(Pace(64, clock=clock), clock, capacity, 4000)[2000:]
    typical = sorted(limits)[len(limits) // 2]
    assert min(capacity, 4) <= typical <= max(4, 1.6 * capacity)
    assert max(limits) <= max(6, 2.3 * capacity)


def test_it_grows_to_the_most_where_the_server_bears_all() -> None:
    clock = Clock()
    assert rounds(Pace(64, clock=clock), clock, 1000, 2000)[-1] >= 63


def test_a_refusal_halves_once_for_all_that_were_under_way() -> None:
    clock = Clock()
    pace = Pace(64, first=32, clock=clock)
    started = [pace.begin() for _ in range(8)]
    clock.now = 5.0
    for start in started:
        pace.refused(start, 2.0)
    assert pace.limit == 16
    clock.now = 7.5
    later = pace.begin()
    pace.refused(later, 0.0)
    assert pace.limit == 8


def test_after_a_refusal_it_waits_some_windows_before_it_grows() -> None:
    clock = Clock()
    pace = Pace(64, first=8, clock=clock)
    pace.refused(0.0, 0.0)
    limits = rounds(pace, clock, 1000, 2 * 4 * (REST + 1))
    assert set(limits[:-1]) == {4} and limits[-1] == 6


def test_the_last_answers_of_a_batch_change_nothing() -> None:
    clock = Clock()
    pace = Pace(64, clock=clock)
    for _ in range(100):
        clock.now += 10
        pace.answered(10)
    assert pace.limit == 4


def test_no_more_than_the_limit_begin_and_a_stop_wakes_the_rest() -> None:
    pace, end, begun = Pace(64, first=2), threading.Event(), threading.Semaphore(0)

    def one() -> None:
        pace.begin(end)
        begun.release()

    threads = [threading.Thread(target=one, daemon=True) for _ in range(5)]
    for thread in threads:
        thread.start()
    assert begun.acquire(timeout=5) and begun.acquire(timeout=5)
    assert not begun.acquire(timeout=0.1)
    pace.end()
    assert begun.acquire(timeout=5)
    end.set()
    pace.wake()
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)
