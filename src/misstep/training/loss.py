"""The loss on completion tokens: its value and gradient equal the plain loss to rounding.

The head runs only at positions that predict a completion token, a chunk at a time: with a
vocabulary of 152k the plain logits of 2,048 tokens take 1.2 GB in fp32, here 39 MB at most on a
processor; a GPU gets larger chunks, so that it does not wait for the next.
Rows are padded on the right and no attention mask is made: under causal attention no token sees
what stands to its right. Both short cuts are tested on the model itself before training; where
one does not hold, the model's own logits are used, and where it is the latter, of one row at a
time.

This module knows torch and a causal language model; it knows no adapter, optimiser or record.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from misstep.models.weights import halve
from misstep.training.lanes import side_by_side
from misstep.training.rows import Row, Unit, micro_batches, padded

T = TypeVar("T")

TARGETS_AT_ONCE = {"cpu": 256, "cuda": 2048}
"""Tokens of a chunk, by device: enough for products of matrices to be fast."""
LINES_AT_ONCE = {"cpu": 16, "cuda": 2048}
"""Of these so many are taken to fp32 at once: what a processor's cache holds."""

MicroBatch = dict[str, Tensor]
"""`ids`, one row a line; `positions` in the flattened lines that predict; their `targets`; and
their `owners`, the rows as given, by number."""


def collate(rows: Sequence[Row]) -> MicroBatch:
    """Pad rows on the right and list what is to be predicted where."""
    width = max(len(row.ids) for row in rows)
    # Token 0 stands for nothing: a pad is never a target and no token attends to it.
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for line, row in enumerate(rows):
        ids[line, : len(row.ids)] = torch.tensor(row.ids)
        first = line * width + row.prompt_length - 1
        positions.extend(range(first, first + row.learned))
        targets.extend(row.ids[row.prompt_length :])
        owners.extend([line] * row.learned)
    return {
        "ids": ids,
        "positions": torch.tensor(positions),
        "targets": torch.tensor(targets),
        "owners": torch.tensor(owners),
    }


class RowLoss(nn.Module):  # type: ignore[misc]
    """A causal language model whose forward pass gives the summed loss of one micro-batch."""

    def __init__(self, model: Any, lm: Any) -> None:
        super().__init__()
        self.model = model
        """What is trained: the language model, or PEFT's wrapper around it."""
        # In a tuple, so that its parameters are not registered a second time.
        self._lm = (lm,)
        self.collate: Callable[[Sequence[Row]], MicroBatch] = collate
        """How rows become a micro-batch that this model reads."""
        self.lanes = 1
        """How many micro-batches may be computed at once."""

    @property
    def lm(self) -> Any:
        """The language model itself, with the adapter's layers in it."""
        return self._lm[0]


class CompletionLoss(RowLoss):
    """The loss on completions."""

    def __init__(self, model: Any, lm: Any) -> None:
        super().__init__(model, lm)
        self.pads, self.skips_logits = short_cuts(lm)
        """Whether rows may be padded, and whether body and head may run apart."""

    def forward(self, **batch: Tensor) -> Tensor:
        """The loss summed over the targets, in fp32."""
        return self.row_losses(**batch).sum()

    def count(self, rows: Sequence[Row]) -> int:
        """What the loss is a mean over: completion tokens."""
        return sum(row.learned for row in rows)

    def row_losses(
        self, ids: Tensor, positions: Tensor, targets: Tensor, owners: Tensor, **layout: Tensor
    ) -> Tensor:
        """Each row's loss, summed over its targets; `layout` is the model's own affair.

        It is the negative log-probability of the row's completion.
        """
        if not self.pads and len(ids) > 1:
            lines = range(len(ids))
            return torch.cat([self._alone(line, ids, positions, targets) for line in lines])
        losses = self._token_losses(ids, positions, targets, **layout)
        # Every row has a target, so the last owner is the last row.
        return losses.new_zeros(int(owners.max()) + 1).index_add(0, owners, losses)

    def _alone(self, line: int, ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """The loss of one row of a micro-batch, without its padding."""
        own = positions // ids.shape[1] == line
        places = positions[own] % ids.shape[1]
        # The last target is the row's last token.
        row = ids[line : line + 1, : int(places.max()) + 2]
        return self._token_losses(row, places, targets[own]).sum(0, keepdim=True)

    def _token_losses(
        self, ids: Tensor, positions: Tensor, targets: Tensor, **layout: Tensor
    ) -> Tensor:
        lm = self.lm
        if not self.skips_logits:
            logits = lm(input_ids=ids, use_cache=False, **layout).logits.flatten(0, 1)[
                positions
            ]
            return nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        body = body_of(lm)(input_ids=ids, use_cache=False, **layout)
        hidden = body.last_hidden_state.flatten(0, 1)[positions]
        losses: Tensor = ChunkedCrossEntropy.apply(
            hidden, lm.get_output_embeddings().weight, targets
        )
        return losses


def body_of(lm: Any) -> Any:
    """A language model without its head."""
    body = lm.get_decoder()
    # Of Llama 4 and of Mllama's text model transformers gives the whole.
    return lm.model if body is lm else body


class ShortCuts(NamedTuple):
    """What holds for a model."""

    pads: bool
    """No token's logits depend on what stands to its right."""
    skips_logits: bool
    """head(body(padded row)) gives the model's own logits of that row."""


def short_cuts(lm: Any) -> ShortCuts:
    """Which short cuts hold for a model, by trying them.

    They do not where it mixes tokens other than causally, or scales or caps its logits. Each is
    seen between two passes of one shape, so that rounding, which in bf16 can reach a third of a
    logit between shapes, does not blur it.
    """
    head = lm.get_output_embeddings()
    was_training = lm.training
    lm.eval()
    row = torch.arange(1, 9, device=lm.device) % lm.config.get_text_config().vocab_size
    padded = torch.stack([torch.cat([row, row * 0]), torch.cat([row, row.flip(0)])])
    with torch.no_grad():
        logits = lm(input_ids=padded, use_cache=False).logits
        pads = _close(logits[0, : len(row)], logits[1, : len(row)])
        skips = pads and type(head) is nn.Linear and head.bias is None
        if skips:
            hidden = body_of(lm)(input_ids=padded, use_cache=False).last_hidden_state
            # Some keep what runs between the layers in fp32, and the head takes it down itself.
            skips = hidden.dtype == head.weight.dtype and _close(head(hidden), logits)
    lm.train(was_training)
    return ShortCuts(pads, skips)


def _close(found: Tensor, expected: Tensor) -> bool:
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= 1e-3 * expected.abs().max())


def measured(
    rows: Sequence[Unit],
    micro_tokens: int,
    measure: Callable[[list[Unit]], T],
    lanes: int = 1,
) -> Iterator[tuple[list[Unit], T]]:
    """Each micro-batch with what is measured of it; smaller ones where memory runs out.

    Where there are lanes, so many are measured at once.
    """
    waiting = micro_batches(rows, micro_tokens)
    while waiting:
        tried = side_by_side(lambda group: _tried(measure, group), waiting, lanes)
        again: list[list[Unit]] = []
        for group, found in zip(waiting, tried, strict=True):
            if found is None:
                again += micro_batches(group, halve(padded(group)))
            else:
                yield group, found
        waiting = again


def _tried(measure: Callable[[list[Unit]], T], group: list[Unit]) -> T | None:
    try:
        return measure(group)
    except torch.OutOfMemoryError:
        if len(group) == 1:
            raise
        # Nothing is tried again from here: the error holds what fills the memory.
        return None


def mean_loss(loss: Any, rows: Sequence[Unit], micro_tokens: int) -> float:
    """The mean loss of a completion token, or of a pair; without dropout and gradient."""
    with without_gradient(loss):
        parts = measured(
            rows, micro_tokens, lambda g: loss(**on_device(loss, g)).item(), loss.lanes
        )
        total = sum(found for _, found in parts)
    return float(total / loss.count(rows))


@contextmanager
def without_gradient(loss: nn.Module) -> Iterator[None]:
    """Measure inside this context: no dropout, no gradient."""
    was_training = loss.training
    loss.eval()
    with torch.no_grad():
        yield
    loss.train(was_training)


def on_device(loss: Any, group: Sequence[Unit]) -> MicroBatch:
    """A micro-batch where the loss's weights are."""
    device = next(loss.parameters()).device
    return {name: tensor.to(device) for name, tensor in loss.collate(group).items()}


class ChunkedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Cross-entropy of `hidden @ weight.T`, whose gradient is made on the way forward.

    So each chunk's logits are computed once and overwritten by their gradient. The gradient of
    `weight` is summed there, before it is known what each target's loss counts for: all must
    count alike where `weight` is trained.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """The loss of each target; keeps the gradients of what needs one."""
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        by_hidden = torch.empty_like(hidden) if wants_hidden else None
        by_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        losses = hidden.new_empty(len(targets), dtype=torch.float32)
        place = "cuda" if weight.is_cuda else "cpu"
        for part in torch.arange(len(targets)).split(TARGETS_AT_ONCE[place]):
            chunk = slice(int(part[0]), int(part[-1]) + 1)
            logits = hidden[chunk] @ weight.t()
            losses[chunk] = _made_gradient(logits, targets[chunk], LINES_AT_ONCE[place])
            if by_hidden is not None:
                by_hidden[chunk] = logits @ weight
            if by_weight is not None:
                by_weight += logits.t() @ hidden[chunk]
        ctx.gradients, ctx.weight_dtype = (by_hidden, by_weight), weight.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The kept gradients, scaled."""
        by_hidden, by_weight = ctx.gradients
        scale = above[0]
        assert by_weight is None or bool((scale == scale[0]).all())
        return (
            None if by_hidden is None else (by_hidden * scale[:, None]).to(by_hidden.dtype),
            None if by_weight is None else (by_weight * scale[0]).to(ctx.weight_dtype),
            None,
        )


def _made_gradient(logits: Tensor, targets: Tensor, at_once: int) -> Tensor:
    """The loss of each target, in fp32; the logits become its gradient, in their place."""
    losses = []
    for lines, wanted in zip(logits.split(at_once), targets.split(at_once), strict=True):
        wide = lines.float()
        shares = torch.softmax(wide, dim=-1)
        # By the likeliest token, whose share is never rounded to 0.
        total = wide.amax(1) - shares.amax(1).log()
        losses.append(total - wide.gather(1, wanted.unsqueeze(1)).squeeze(1))
        less = shares.new_full((len(wanted), 1), -1.0)
        lines.copy_(shares.scatter_add_(1, wanted.unsqueeze(1), less))
    return torch.cat(losses)
