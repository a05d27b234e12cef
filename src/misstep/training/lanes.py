"""Micro-batches side by side: threads that compute one each, with the cores dealt out to them.

A small model's layers are many short products, after each of which all cores wait for the
slowest. Waiting asleep, as the command line has it for machines that others use too, takes
about as long as the work. Threads that have a micro-batch each hardly ever wait.

What came of it beside other trainers stands in docs/bench.md.

This module knows torch; it knows no row, loss or trainer.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

MOST = 2
"""Each holds the memory of a micro-batch."""


def side_by_side(work: Callable[[T], R], items: Sequence[T], lanes: int) -> list[R]:
    """What is made of each item, in their order, whichever is done first.

    Each thread works with or without gradient as the caller does. With one core to a lane the
    results are, bit by bit, those of one lane with one core.
    """
    lanes = min(lanes, len(items))
    if lanes < 2:
        return [work(item) for item in items]
    # Each thread begins without knowing whether gradients are wanted.
    wanted = torch.is_grad_enabled()

    def in_lane(item: T) -> R:
        with torch.set_grad_enabled(wanted):
            return work(item)

    with _cores(max(1, torch.get_num_threads() // lanes)), ThreadPoolExecutor(lanes) as pool:
        return [*pool.map(in_lane, items)]


@contextmanager
def _cores(each: int) -> Iterator[None]:
    """So many cores for each thread that begins inside this context."""
    before = torch.get_num_threads()
    torch.set_num_threads(each)
    try:
        yield
    finally:
        torch.set_num_threads(before)
