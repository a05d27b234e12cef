"""One at a time on this machine's GPUs.

vLLM takes nine tenths of a GPU when it starts, so no second engine fits beside it. Who loads
something onto a GPU takes the turn; who had it gives its memory back, and loads again when it
is asked again. Of one process only: others on the same GPU are not known here.
"""

from typing import Protocol


class Holder(Protocol):
    """Has something on the GPUs that can be loaded again."""

    def give_up(self) -> None:
        """Give back the memory; nothing happens where there is nothing."""


_holders: list[Holder] = []
"""The one whose turn it is, if any."""


def take(taker: Holder) -> None:
    """Take the turn from whoever has it."""
    for before in _holders:
        if before is not taker:
            before.give_up()
    _holders[:] = [taker]
