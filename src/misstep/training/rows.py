"""Training rows: which are kept, in which order they come, and which share a micro-batch.

This module knows token numbers and how long rows are; it loads no library and knows no weights.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from misstep.models.rendering import Renderer
from misstep.records import Example, Pair

GROUP_COST = 256
"""Tokens that could be computed in the time that a further group costs: reading all weights
again, and products with too few lines. Of 32 to 1,000 the fastest, in one noisy pass."""


@dataclass(frozen=True)
class Row:
    """One training row as tokens; loss falls on what follows the prompt."""

    ids: tuple[int, ...]
    prompt_length: int
    kind: str

    @property
    def learned(self) -> int:
        """How many tokens are targets."""
        return len(self.ids) - self.prompt_length

    @property
    def lines(self) -> tuple["Row", ...]:
        """What must be in one micro-batch: the row alone."""
        return (self,)


@dataclass(frozen=True)
class PairRow:
    """Two rows of one prompt, of which the first is to become the likelier one."""

    chosen: Row
    rejected: Row
    reference: float = 0.0
    """By how much the chosen completion's log-probability exceeds the rejected one's before
    training."""

    @property
    def kind(self) -> str:
        """Both rows are of one kind."""
        return self.chosen.kind

    @property
    def lines(self) -> tuple[Row, ...]:
        """What must be in one micro-batch: both rows."""
        return self.chosen, self.rejected


Unit = TypeVar("Unit", bound=Row | PairRow)
"""What training takes whole: a row, or the two rows of a pair."""


@dataclass(frozen=True)
class Rows(Generic[Unit]):
    """The rows, or pairs, that can be trained on, and how many cannot, or not whole."""

    kept: tuple[Unit, ...]
    given: int
    dropped: int
    """Rows without a completion, or whose whole completion lies beyond the longest length."""
    truncated: int
    """Kept rows that lost the end of a completion, the end token with it."""


def render_rows(renderer: Renderer, examples: Sequence[Example], max_length: int) -> Rows[Row]:
    """Render every example; prompts are never shortened, completions only at their end."""
    rendered = [renderer.example(e.messages, e.completion, e.prefill) for e in examples]
    kept: list[Row] = []
    truncated = 0
    for example, row in zip(examples, rendered, strict=True):
        if not example.completion.strip() or row.prompt_length >= max_length:
            continue
        truncated += len(row.ids) > max_length
        kept.append(Row(row.ids[:max_length], row.prompt_length, example.kind))
    return Rows(tuple(kept), len(rendered), len(rendered) - len(kept), truncated)


def render_pairs(renderer: Renderer, pairs: Sequence[Pair], max_length: int) -> Rows[PairRow]:
    """Render every pair; one whose halves are equal within `max_length` teaches nothing."""
    kept: list[PairRow] = []
    truncated = 0
    for pair in pairs:
        examples = [
            Example(messages=pair.messages, completion=completion, kind=pair.kind)
            for completion in (pair.chosen, pair.rejected)
        ]
        both = render_rows(renderer, examples, max_length)
        if both.dropped or both.kept[0] == both.kept[1]:
            continue
        truncated += both.truncated > 0
        kept.append(PairRow(both.kept[0], both.kept[1]))
    return Rows(tuple(kept), len(pairs), len(pairs) - len(kept), truncated)


def in_epochs(rows: Sequence[Unit], epochs: float, seed: int) -> list[Unit]:
    """The rows as training meets them: every epoch is a shuffle of its own."""
    wanted = max(1, round(len(rows) * epochs))
    shuffler = random.Random(seed)
    order: list[Unit] = []
    while len(order) < wanted:
        order += shuffler.sample(rows, len(rows))
    return order[:wanted]


def micro_batches(rows: Sequence[Unit], most: int) -> list[list[Unit]]:
    """Split rows into groups of similar length that hold at most `most` padded tokens.

    The split is the cheapest one, where a group costs its padded tokens and `GROUP_COST` more.
    A row longer than `most` is a group of its own. Pairs are not parted.
    """
    by_length = sorted(rows, key=longest)
    costs, starts = [0], [0]
    for end in range(1, len(by_length) + 1):
        last = by_length[end - 1]
        width = longest(last) * len(last.lines)
        # So many of this width fit; nothing that starts earlier does.
        first = max(0, end - max(1, most // width))
        start = min(range(first, end), key=lambda s: costs[s] + (end - s) * width)
        costs.append(costs[start] + (end - start) * width + GROUP_COST)
        starts.append(start)
    groups: list[list[Unit]] = []
    end = len(by_length)
    while end:
        groups.append(by_length[starts[end] : end])
        end = starts[end]
    return groups


def padded(group: Sequence[Unit]) -> int:
    """Tokens of a micro-batch whose lines are filled up to the longest."""
    return sum(len(unit.lines) for unit in group) * max(map(longest, group))


def shares(rows: Sequence[Unit], processes: int, most: int) -> list[list[list[Unit]]]:
    """The micro-batches of one step for each process, or lane: for all of them equally many.

    Rows are dealt out by length, so that all have about as much to do. One that has nothing
    left to do while others have gets empty micro-batches.
    """
    by_length = sorted(rows, key=longest)
    dealt = [micro_batches(by_length[n::processes], most) for n in range(processes)]
    steps = max(map(len, dealt))
    return [groups + [[] for _ in range(steps - len(groups))] for groups in dealt]


def longest(unit: Row | PairRow) -> int:
    """Tokens of a row, or of the longer row of a pair."""
    return max(len(row.ids) for row in unit.lines)


def sample_by_kind(rows: Sequence[Unit], most: int) -> dict[str, list[Unit]]:
    """At most `most` rows of each kind, evenly spread over the rows as given."""
    kinds = sorted({row.kind for row in rows})
    of = {kind: [row for row in rows if row.kind == kind] for kind in kinds}
    return {kind: found[:: -(-len(found) // most)] for kind, found in of.items()}
