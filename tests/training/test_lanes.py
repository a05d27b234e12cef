"""Micro-batches side by side: nothing but the time they take may differ."""

import threading

import pytest
import torch

from misstep.training.lanes import side_by_side


def test_results_come_in_the_order_of_the_items_whichever_is_done_first() -> None:
    first_may_end = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert first_may_end.wait(30)
        else:
            first_may_end.set()
        return item * 10

    # With one thread the first item would wait for the second for ever.
    assert side_by_side(work, [0, 1, 2], 2) == [0, 10, 20]


@pytest.mark.parametrize("wanted", [True, False])
def test_threads_know_whether_gradients_are_wanted(wanted: bool) -> None:
    with torch.set_grad_enabled(wanted):
        found = side_by_side(lambda _: torch.is_grad_enabled(), range(4), 2)
    assert found == [wanted] * 4


def test_cores_are_dealt_out_and_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert side_by_side(lambda _: torch.get_num_threads(), range(4), 2) == [2] * 4
        assert torch.get_num_threads() == 4
        with pytest.raises(ZeroDivisionError):
            side_by_side(lambda n: 1 / n, [1, 0], 2)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
