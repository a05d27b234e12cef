"""A model made fast for the time of training: fused LoRA layers, shared beginnings of rows.

Both give what PEFT and transformers give, to rounding, and tests hold them to it. A layer or an
attention that is not of the plain kind is left as it is, and the model is afterwards as before.

What was measured (SmolLM2-135M in bf16, rank 16, rows of 190 tokens, one core): PEFT's layer
casts each input to fp32 and back, 146 tokens/s; fused in the weights' type 174.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from misstep.training import sharing
from misstep.training.label_loss import LabelLoss
from misstep.training.loss import CompletionLoss


@contextmanager
def fast_layers(
    loss: CompletionLoss | LabelLoss, checkpointing: bool = False, compiled: bool = False
) -> Iterator[None]:
    """Train faster, or in less memory, inside this context; afterwards all is as before."""
    from peft.tuners.lora import Linear

    lm = loss.lm
    layers = [m for m in loss.modules() if isinstance(m, Linear) and _is_plain(m)]
    attention, collate = lm.config._attn_implementation, loss.collate
    shares = sharing.can_share(lm)
    for layer in layers:
        layer.forward = _fused(layer)
    if shares:
        sharing.register()
        lm.set_attn_implementation(sharing.ATTENTION)
        loss.collate = sharing.collate_shared
    if checkpointing:
        lm.activation_checkpointing_enable()
    blocks = list(lm.get_decoder().layers) if compiled else []
    for block in blocks:
        block.compile(dynamic=True)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        if checkpointing:
            lm.activation_checkpointing_disable()
        for layer in layers:
            del layer.forward
        if shares:
            lm.set_attn_implementation(attention)
            loss.collate = collate


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
