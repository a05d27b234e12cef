"""Rows that begin alike share the tokens they begin with: each is computed once.

Chat templates, system prompts and analysis requests open many rows with the same tokens. Under
causal attention a token's state depends on nothing but the tokens before it, so the rows of a
micro-batch form a tree, and every layer but attention runs on the tree's tokens, without
padding and without repetition. Attention alone sees whole rows: queries, keys and values are
copied to where rows need them. Loss and gradients are those of separate rows, to rounding.

This module knows torch, transformers' attention interface and rows; it knows no adapter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from misstep.models.rendering import shared_prefix
from misstep.models.weights import attends_plainly
from misstep.training.lanes import MOST
from misstep.training.loss import MicroBatch
from misstep.training.rows import Row

ATTENTION = "misstep_shared"
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2"})
"""Whose positions come from `position_ids` and whose attention goes through the interface; a
test holds each of them to the plain loss."""
QUERIES_AT_ONCE = 64
"""Queries of one block; a block's keys end where its queries end. Of 32 to 256 none
was clearly faster on eight rows of 100 to 600 tokens, one core of an EPYC; torch's own kernel
took twice as long and more, and as long on one row of 2,000."""
TOKENS, LENGTH = 64, 16
"""Tokens of a micro-batch, and of its longest row, are filled up to a multiple of these: what a
processor's library compiles for each shape of a product, it then compiles less often and keeps
less of."""


def can_share(lm: Any) -> bool:
    """Whether a model's attention is the plain causal one that this module replaces."""
    config = lm.config
    return bool(
        config.model_type in FAMILIES
        and config._attn_implementation == "sdpa"
        and lm.device.type == "cpu"
        and attends_plainly(config)
        and not getattr(config, "attention_dropout", 0.0)
    )


def lanes_of(lm: Any) -> int:
    """How many micro-batches are computed side by side: several of a plain model on a CPU.

    What other models keep from one layer for the next, threads might mix up.
    """
    plain = lm.device.type == "cpu" and lm.config.get_text_config().model_type in FAMILIES
    return min(MOST, torch.get_num_threads()) if plain else 1


def collate_shared(rows: Sequence[Row]) -> MicroBatch:
    """A micro-batch as a tree of tokens, in one line.

    `ids` and `position_ids` are (1, tokens); `rows` (rows, longest) says which token of the
    line stands where in a row; `first` (tokens) where in the flattened rows a token is first.
    """
    numbers = sorted(range(len(rows)), key=lambda number: rows[number].ids)
    ordered = [rows[number] for number in numbers]
    longest = _filled(max(len(row.ids) for row in ordered), LENGTH)
    ids: list[int] = []
    depths: list[int] = []
    first: list[int] = []
    table = torch.zeros(len(ordered), longest, dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    before: tuple[int, ...] = ()
    path: list[int] = []
    for line, row in enumerate(ordered):
        common = shared_prefix(before, row.ids)
        path = path[:common] + list(range(len(ids), len(ids) + len(row.ids) - common))
        ids += row.ids[common:]
        depths += range(common, len(row.ids))
        first += range(line * longest + common, line * longest + len(row.ids))
        table[line, : len(path)] = torch.tensor(path)
        positions += path[row.prompt_length - 1 : -1]
        targets += row.ids[row.prompt_length :]
        before = row.ids
    # No row has these tokens, so that nothing depends on them.
    spare = _filled(len(ids), TOKENS) - len(ids)
    ids += [0] * spare
    depths += [0] * spare
    first += [0] * spare
    return {
        "ids": torch.tensor(ids).unsqueeze(0),
        "positions": torch.tensor(positions),
        "targets": torch.tensor(targets),
        "owners": torch.tensor([n for n in numbers for _ in range(rows[n].learned)]),
        "position_ids": torch.tensor(depths).unsqueeze(0),
        "rows": table,
        "first": torch.tensor(first),
    }


def _filled(count: int, to: int) -> int:
    """The next multiple."""
    return -(-count // to) * to


class Spread(torch.autograd.Function):  # type: ignore[misc]
    """Copy lines of a matrix to where they are needed; gradients of the copies are summed.

    In fp32, since a system prompt has as many copies as there are rows.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, where: Tensor) -> Tensor:
        """`tokens[where]`, of shape (len(where), ...)."""
        ctx.save_for_backward(where)
        ctx.count = len(tokens)
        return tokens.index_select(0, where)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:
        """The sum over the copies of each line."""
        (where,) = ctx.saved_tensors
        copies = above[0]
        # As contiguous lines, or the sum takes six times as long.
        lines = copies.flatten(1).to(torch.float32, memory_format=torch.contiguous_format)
        total = lines.new_zeros(ctx.count, lines.shape[1]).index_add_(0, where, lines)
        return total.to(copies.dtype).view(-1, *copies.shape[1:]), None


def register() -> None:
    """Make the attention known to transformers, under a name of its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, shared_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def shared_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    rows: Tensor | None = None,
    first: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row; (1, heads, tokens, width) to (1, tokens, heads, width).

    Without rows it is transformers' own.
    """
    if rows is None or first is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return plain, None
    where = rows.flatten()
    scale = options.get("scaling") or query.shape[3] ** -0.5
    query, key, value = (
        Spread.apply(t[0].transpose(0, 1), where)
        .view(*rows.shape, t.shape[1], t.shape[3])
        .transpose(1, 2)
        for t in (query * scale, key, value)
    )
    attended = CausalAttention.apply(query, key, value)
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, first).unsqueeze(0), None


class CausalAttention(torch.autograd.Function):  # type: ignore[misc]
    """Attention of scaled queries; heads that share a key are rows of one product.

    Shapes are (rows, heads, length, width). Torch's own kernel is slow on many short rows. The
    weights are computed again on the way back: kept, they would grow with the square of the
    length.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`softmax(query key^T) value`, where a query sees the keys up to its own."""
        keys, values = (t.flatten(0, 1).contiguous() for t in (key, value))
        queries = query.reshape(len(keys), -1, *query.shape[2:])
        ctx.save_for_backward(queries, keys, values)
        found = torch.empty_like(queries)
        for block in _blocks(query.shape[2]):
            weights = _weights(queries[:, :, block], keys, block)
            seen = values[:, : block.stop]
            found[:, :, block] = torch.bmm(weights, seen).view_as(found[:, :, block])
        return found.view(query.shape)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, ...]:
        """The gradients of all three."""
        queries, keys, values = ctx.saved_tensors
        by_found = above[0].reshape(queries.shape)
        by_queries = torch.empty_like(queries)
        by_keys, by_values = torch.zeros_like(keys), torch.zeros_like(values)
        for block in _blocks(queries.shape[2]):
            seen, asking = slice(0, block.stop), queries[:, :, block]
            weights = _weights(asking, keys, block)
            by_block = by_found[:, :, block].flatten(1, 2)
            by_values[:, seen] += weights.transpose(1, 2) @ by_block
            by_weights = by_block @ values[:, seen].transpose(1, 2)
            by_scores = torch.ops.aten._softmax_backward_data(
                by_weights, weights, -1, weights.dtype
            )
            by_queries[:, :, block] = (by_scores @ keys[:, seen]).view_as(asking)
            by_keys[:, seen] += by_scores.transpose(1, 2) @ asking.flatten(1, 2)
        shape = above[0].shape
        by_both = (by.view(shape[0], -1, *shape[2:]) for by in (by_keys, by_values))
        return by_queries.view(shape), *by_both


def _blocks(length: int) -> list[slice]:
    """Queries that are computed at once."""
    starts = range(0, length, QUERIES_AT_ONCE)
    return [slice(start, min(start + QUERIES_AT_ONCE, length)) for start in starts]


def _weights(queries: Tensor, keys: Tensor, block: slice) -> Tensor:
    """What each query of a block gives each key that one of them sees.

    `queries` are (keys' rows, heads, block, width); the result has heads and block in one. In
    fp32 softmax is faster on a processor than in bf16.
    """
    scores = torch.bmm(queries.flatten(1, 2), keys[:, : block.stop].transpose(1, 2))
    wide = scores.float().view(*queries.shape[:3], block.stop)
    wide += wide.new_full(wide.shape[2:], float("-inf")).triu(block.start + 1)
    return torch.softmax(wide, dim=-1).to(queries.dtype).flatten(1, 2)
