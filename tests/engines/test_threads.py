"""Work that goes on in another thread: in order, meanwhile, and no further than is wanted."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from misstep.engines.threads import behind

SECONDS = 20


def test_results_come_in_order_and_items_are_taken_where_they_are_asked_for() -> None:
    here, there = set[int](), set[int]()

    def items() -> Iterator[int]:
        for item in range(50):
            here.add(threading.get_ident())
            yield item

    def work(item: int) -> int:
        there.add(threading.get_ident())
        return item * item

    assert list(behind(work, items(), 3)) == [item * item for item in range(50)]
    assert here == {threading.get_ident()}
    assert len(there) == 1
    assert not here & there


def test_the_next_item_is_waited_for_meanwhile() -> None:
    asked = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for item, event in enumerate(asked):
            event.set()
            yield item

    def work(item: int) -> bool:
        return asked[min(item + 1, 3)].wait(SECONDS)

    assert all(behind(work, items(), 2))


def test_no_more_items_are_taken_than_may_wait() -> None:
    taken, may_go = list[int](), threading.Event()

    def items() -> Iterator[int]:
        for item in range(10):
            taken.append(item)
            # Work begins when the third has been taken, which is one more than may wait.
            if item == 2:
                may_go.set()
            yield item

    def work(item: int) -> int:
        assert may_go.wait(SECONDS)
        return item

    found = behind(work, items(), 2)
    assert next(found) == 0
    assert taken == [0, 1, 2]
    assert list(found) == list(range(1, 10))


def test_a_failure_is_raised_in_its_turn_and_nothing_after_it_is_begun() -> None:
    begun = list[int]()

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise ValueError("the third")
        return item

    found = behind(work, range(6), 9)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(found)
    assert begun == [0, 1, 2]


def test_a_failure_of_the_items_is_the_callers() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(behind(str, items(), 1))


def test_who_looks_no_further_leaves_no_thread_behind() -> None:
    before = {*threading.enumerate()}
    found = behind(str, iter(range(9)), 2)
    assert next(found) == "0"
    (ours,) = {*threading.enumerate()} - before or {threading.Thread()}
    found.close()
    if ours.ident is not None:
        ours.join(SECONDS)
    assert not ours.is_alive()


def test_ctrl_c_waits_for_no_work_under_way() -> None:
    code = (
        # A background job of a shell ignores the signal, and so would what it starts.
        "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from misstep.engines.threads import behind\n"
        "def work(item):\n"
        "    print('under way', flush=True)\n"
        "    time.sleep(600)\n"
        "list(behind(work, [1], 1))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout and run.stdout.readline() == "under way\n"
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=SECONDS)
        assert run.returncode != 0 and "KeyboardInterrupt" in said
