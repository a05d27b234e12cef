"""A language model's body with a head of one number, and how it gives rows their scores.

The score is read at the last token that is no pad. The head is computed in fp32: in bf16 two
scores near 1 that differ by less than 0.004 are equal.

This module knows torch and transformers; it knows no record and no folder.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from misstep.errors import ModelError
from misstep.training.loss import body_of, measured
from misstep.training.rows import Row as TokenRow
from misstep.training.sharing import lanes_of


class ScoreHead(nn.Linear):  # type: ignore[misc]
    """A linear layer of one output, in fp32 whatever the body's type."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(self.weight, std=(width + 1) ** -0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """The score at every position."""
        return nn.functional.linear(hidden.float(), self.weight.float())


def classifier(lm: Any, pad: int) -> Any:
    """A sequence classifier of one label around a language model's body; the head is new.

    Raises:
        ModelError: transformers has no classifier for models of this kind.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(lm.config)
    config.num_labels, config.pad_token_id = 1, pad
    # Whole rows are scored, once.
    config.use_cache = False
    # What was read from GGUF is plain by now.
    config.__dict__.pop("quantization_config", None)
    body = body_of(lm)
    try:
        # On no device, since its body is replaced at once.
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise ModelError(f"transformers has no classifier of this kind: {error}") from error
    if type(getattr(model, model.base_model_prefix)) is not type(body):
        raise ModelError(
            f"the classifier of {config.model_type} models has another body than their "
            "language model, so no reward model can be made of it. Use one of another family."
        )
    body.config = config
    setattr(model, model.base_model_prefix, body)
    model.score = ScoreHead(config.get_text_config().hidden_size)
    return model


def padded_right(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids (rows, longest), filled up with the pad, and the mask of what is none."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


@dataclass(frozen=True)
class Scorer:
    """Gives rows their scores, standardised where a mean and a deviation are known."""

    model: Any
    pad: int
    micro_tokens: int
    mean: float = 0.0
    deviation: float = 1.0

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """One number a row, without dropout and gradient."""
        found: dict[tuple[int, ...], float] = {}
        wanted = [TokenRow(tuple(row), 0, "scored") for row in rows]
        was_training = self.model.training
        self.model.eval()
        for group, scores in measured(
            wanted, self.micro_tokens, self._scores, lanes_of(self.model)
        ):
            found |= {row.ids: score for row, score in zip(group, scores, strict=True)}
        self.model.train(was_training)
        return [(found[row.ids] - self.mean) / self.deviation for row in wanted]

    def _scores(self, group: Sequence[TokenRow]) -> list[float]:
        ids, mask = padded_right([row.ids for row in group], self.pad)
        device = next(self.model.parameters()).device
        with torch.no_grad():
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        scores: list[float] = logits[:, 0].float().tolist()
        return scores
