"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290, equation 7).

The loss of a pair is -log sigmoid(beta * (m - r)): m is by how much the chosen completion's
log-probability exceeds the rejected one's, summed over their tokens and the end of the turn; r
is the same of the reference, which is the model before training. An adapter that is new changes
nothing, so r is measured once, before the first step, and no second model is held.

This module knows torch and the loss of rows; it knows no adapter, optimiser or record.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from misstep.training.loss import (
    CompletionLoss,
    MicroBatch,
    measured,
    on_device,
    without_gradient,
)
from misstep.training.rows import PairRow


class PreferenceLoss(nn.Module):  # type: ignore[misc]
    """A loss on completions, whose forward pass gives the summed DPO loss of pairs."""

    def __init__(self, completion: CompletionLoss, beta: float) -> None:
        super().__init__()
        self.completion = completion
        self.beta = beta

    @property
    def lm(self) -> Any:
        """The language model itself, with the adapter's layers in it."""
        return self.completion.lm

    @property
    def lanes(self) -> int:
        """How many micro-batches may be computed at once."""
        return self.completion.lanes

    def collate(self, pairs: Sequence[PairRow]) -> MicroBatch:
        """The rows of pairs, chosen before rejected, with the pairs' `reference`."""
        batch = self.completion.collate([row for pair in pairs for row in pair.lines])
        return batch | {"reference": torch.tensor([pair.reference for pair in pairs])}

    def count(self, pairs: Sequence[PairRow]) -> int:
        """What the loss is a mean over: pairs."""
        return len(pairs)

    def forward(self, reference: Tensor, gains: bool = False, **batch: Tensor) -> Tensor:
        """The loss summed over the pairs, in fp32; or by how much each pair's margin gained."""
        chosen, rejected = self.completion.row_losses(**batch).view(-1, 2).unbind(1)
        gained = rejected - chosen - reference
        return gained if gains else -nn.functional.logsigmoid(self.beta * gained).sum()


def margins(loss: PreferenceLoss, pairs: Sequence[PairRow], micro_tokens: int) -> list[float]:
    """By how much the model prefers each chosen completion, as log-probabilities."""
    found: dict[PairRow, float] = {}

    def gains_of(group: Sequence[PairRow]) -> list[float]:
        gains: list[float] = loss(gains=True, **on_device(loss, group)).tolist()
        return gains

    with without_gradient(loss):
        for group, gains in measured(pairs, micro_tokens, gains_of, loss.lanes):
            found |= {p: gain + p.reference for p, gain in zip(group, gains, strict=True)}
    return [found[pair] for pair in pairs]


def with_reference(
    loss: PreferenceLoss, pairs: Sequence[PairRow], micro_tokens: int
) -> list[PairRow]:
    """The pairs with the margins that the model gives them now, which is before training."""
    found = margins(loss, pairs, micro_tokens)
    return [replace(pair, reference=m) for pair, m in zip(pairs, found, strict=True)]
