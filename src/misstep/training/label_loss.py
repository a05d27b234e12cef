"""The loss of labels: a row's last token is a label, and a head of one number guesses it.

Of a language model, what stands before it is read as any row is, so all that makes training on
completions fast serves here too: no padding, beginnings that rows share, fused adapters. Under
causal attention no token sees the label. An encoder's tokens would see it, and each other's
padding, so there the label is taken off and the padding hidden.

This module knows torch and rows; it knows no adapter, optimiser or record.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from misstep.training.loss import MicroBatch, RowLoss, body_of
from misstep.training.rows import Row
from misstep.training.scoring import ScoreHead, padded_right


class Labelled(NamedTuple):
    """Tokens and their label."""

    ids: tuple[int, ...]
    label: bool

    @property
    def row(self) -> Row:
        """With the label in the place of what follows."""
        return Row((*self.ids, int(self.label)), len(self.ids), "labelled")


class LabelLoss(RowLoss):
    """The loss of labels: a language model's body, and a head that is trained beside it."""

    def __init__(self, model: Any, lm: Any, weights: tuple[float, float]) -> None:
        super().__init__(model, lm)
        self.score = ScoreHead(lm.config.get_text_config().hidden_size)
        # At random, a model whose states are large would begin far from even odds.
        nn.init.zeros_(self.score.weight)
        self.weights = weights
        """What a row labelled 0 counts, and one labelled 1."""

    def count(self, rows: Sequence[Row]) -> int:
        """What the loss is a mean over: rows."""
        return len(rows)

    def forward(
        self, ids: Tensor, positions: Tensor, targets: Tensor, owners: Tensor, **layout: Tensor
    ) -> Tensor:
        """The cross-entropy summed over the rows, in fp32."""
        del owners
        body = body_of(self.lm)(input_ids=ids, use_cache=False, **layout)
        odds = self.score(body.last_hidden_state.flatten(0, 1)[positions])[:, 0]
        return _summed(odds, targets, self.weights)


class EncoderLoss(nn.Module):  # type: ignore[misc]
    """An encoder's classifier; the forward pass gives the summed loss of labels."""

    def __init__(self, model: Any, pad: int, weights: tuple[float, float]) -> None:
        super().__init__()
        self.model = model
        """What is trained: PEFT's wrapper around the classifier."""
        self.pad = pad
        self.weights = weights
        """What a row labelled 0 counts, and one labelled 1."""
        self.lanes = 1
        """Micro-batches are computed one after the other."""

    def count(self, rows: Sequence[Row]) -> int:
        """What the loss is a mean over: rows."""
        return len(rows)

    def collate(self, rows: Sequence[Row]) -> MicroBatch:
        """Pad rows on the right, without their labels: `ids`, `mask` and `targets`."""
        ids, mask = padded_right([row.ids[:-1] for row in rows], self.pad)
        return {"ids": ids, "mask": mask, "targets": torch.tensor([r.ids[-1] for r in rows])}

    def forward(self, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy summed over the rows, in fp32."""
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        return _summed(logits[:, 0].float(), targets, self.weights)


def _summed(odds: Tensor, targets: Tensor, weights: tuple[float, float]) -> Tensor:
    each = torch.where(targets > 0, weights[1], weights[0])
    return nn.functional.binary_cross_entropy_with_logits(
        odds, targets.float(), each, reduction="sum"
    )


def balance(labels: Sequence[bool]) -> tuple[float, float]:
    """What a row labelled 0, and one labelled 1, counts: both labels the same in all."""
    ones = sum(labels)
    return len(labels) / (2 * (len(labels) - ones)), len(labels) / (2 * ones)
