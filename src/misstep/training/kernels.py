"""Two pieces of a model's arithmetic, written for speed: LoRA layers and attention on a CPU.

Both give what PEFT and transformers give, to rounding, and tests hold them to it. They are put
into a model for the time of training and taken out again. A layer or an attention that is not
of the plain kind is left as it is.

What was measured (SmolLM2-135M in bf16, rank 16, rows of 190 tokens, one core): PEFT's layer
casts each input to fp32 and back, 146 tokens/s; fused in the weights' type 174; with the
attention below, where torch's CPU kernel is slow on bf16 and on short rows, 218.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from misstep.training.loss import CompletionLoss

QUERIES_AT_ONCE = 128
"""Queries of one block; a block's keys end where its queries end."""
LONGEST = 2048
"""Beyond it the attention weights, kept for the gradient, cost more memory than time is won."""
ATTENTION = "misstep_blocks"


@contextmanager
def fast_layers(loss: CompletionLoss) -> Iterator[None]:
    """Train faster inside this context; the model is as before afterwards."""
    from peft.tuners.lora import Linear

    lm = loss.lm
    layers = [m for m in loss.modules() if isinstance(m, Linear) and _is_plain(m)]
    attention = lm.config._attn_implementation
    blocks = attention == "sdpa" and lm.device.type == "cpu"
    for layer in layers:
        layer.forward = _fused(layer)
    if blocks:
        _register()
        lm.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
        if blocks:
            lm.set_attn_implementation(attention)


def _is_plain(layer: Any) -> bool:
    """Whether a LoRA layer is `base(x) + scale * B(A(x))` and nothing else."""
    active = layer.active_adapters
    return (
        len(active) == 1
        and type(layer.base_layer) is nn.Linear
        and not layer.base_layer.weight.requires_grad
        and isinstance(layer.lora_dropout[active[0]], nn.Identity)
        and not layer.lora_variant
        and not layer.lora_bias[active[0]]
    )


def _fused(layer: Any) -> Callable[[Tensor], Tensor]:
    name = layer.active_adapters[0]
    base, scale = layer.base_layer, layer.scaling[name]
    down, up = layer.lora_A[name], layer.lora_B[name]

    def forward(x: Tensor) -> Tensor:
        y: Tensor = FusedLora.apply(x, base.weight, base.bias, down.weight, up.weight, scale)
        return y

    return forward


class FusedLora(torch.autograd.Function):  # type: ignore[misc]
    """A frozen linear layer plus its adapter; the adapter is computed in the input's type."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        """`x W^T + bias + (x down^T) (scale * up)^T`."""
        rows = x.flatten(0, -2)
        down_, up_ = down.to(x.dtype), (up * scale).to(x.dtype)
        inner = rows @ down_.t()
        y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        y.addmm_(inner, up_.t())
        ctx.save_for_backward(rows, weight, down_, up_, inner)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, down.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, where one is wanted, and of the adapter."""
        rows, weight, down, up, inner = ctx.saved_tensors
        by_y = above[0].reshape(len(rows), -1)
        by_inner = by_y @ up
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = (by_y @ weight).addmm_(by_inner, down).view(ctx.shape)
        by_down = (by_inner.t() @ rows).to(ctx.dtype)
        by_up = (by_y.t() @ inner).to(ctx.dtype) * ctx.scale
        return by_x, None, None, by_down, by_up, None


def _register() -> None:
    """Make the attention known to transformers, under a name of its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, block_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def block_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention in blocks of queries, without mask; anything else goes to SDPA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = {"dropout", "scaling", "position_ids", "use_cache"}
    unusual = [k for k, v in options.items() if k not in plain and v is not None]
    length = query.shape[2]
    if (
        attention_mask is not None
        or unusual
        or options.get("dropout")
        or not module.is_causal
        or not length == key.shape[2] <= LONGEST
    ):
        attended, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return attended, None
    scale = options.get("scaling") or query.shape[3] ** -0.5
    return causal_attention(query * scale, key, value).transpose(1, 2).contiguous(), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of scaled queries; heads that share a key are rows of one product."""
    batch, heads, length, width = query.shape
    shared = batch * key.shape[1]
    queries = query.reshape(shared, -1, length, width)
    keys = key.reshape(shared, length, width).transpose(1, 2)
    values = value.reshape(shared, length, value.shape[3])
    blocks = []
    for start in range(0, length, QUERIES_AT_ONCE):
        end = min(start + QUERIES_AT_ONCE, length)
        block = queries[:, :, start:end]
        shape = (shared, block.shape[1], end - start, end)
        scores = torch.bmm(block.reshape(shared, -1, width), keys[:, :, :end]).view(shape)
        later = query.new_full(shape[2:], float("-inf")).triu(start + 1)
        weights = torch.softmax(scores + later, dim=-1).view(shared, -1, end)
        blocks.append(torch.bmm(weights, values[:, :end]).view(*shape[:3], -1))
    return torch.cat(blocks, dim=2).view(batch, heads, length, -1)
