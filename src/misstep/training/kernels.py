"""A model made fast and small for the time of training: fused layers, shared beginnings, lanes.

They give what PEFT and transformers give, to rounding, and tests hold them to it. A layer or an
attention that is not of the plain kind is left as it is, and the model is afterwards as before.
PEFT's layer casts each input to fp32 and back; here an adapter is computed as the weights are.
What is cheap to compute again is not kept for the gradient: the norms' states in fp32, and,
where products are cheap, what a gated feed-forward layer makes of its input. On a processor
several micro-batches of an adapter may be computed at once.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from misstep.models.precision import products_are_cheap, products_dtype
from misstep.training import sharing
from misstep.training.label_loss import LabelLoss
from misstep.training.loss import CompletionLoss, body_of

SMALL = 0.1
"""The share of all parameters up to which those that are trained are few."""


@contextmanager
def fast_layers(
    loss: CompletionLoss | LabelLoss, checkpointing: bool = False, compiled: bool = False
) -> Iterator[None]:
    """Train faster, or in less memory, inside this context; afterwards all is as before."""
    from peft.tuners.lora import Linear

    lm = loss.lm
    layers = {m: _fused(m) for m in loss.modules() if isinstance(m, Linear) and _is_plain(m)}
    fused: dict[Any, Callable[[Tensor], Tensor]] = dict(layers)
    fused |= {m: _frozen(m) for m in loss.modules() if _is_plain_norm(m)}
    fused |= {m: _gated(m) for m in loss.modules() if _is_plain_mlp(m, layers)}
    attention, collate = lm.config._attn_implementation, loss.collate
    shares = sharing.can_share(lm)
    for layer, forward in fused.items():
        layer.forward = forward
    if shares:
        sharing.register()
        lm.set_attn_implementation(sharing.ATTENTION)
        loss.collate = sharing.collate_shared
    # What does not share may have dropout, whose random numbers threads would take by turns.
    if shares and not checkpointing and not compiled and _is_mostly_frozen(loss):
        loss.lanes = sharing.lanes_of(lm)
    if checkpointing:
        lm.activation_checkpointing_enable()
    blocks = _blocks(lm) if compiled else []
    for block in blocks:
        block.compile(dynamic=True)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        # Also where memory asked for it on the way.
        if lm.is_activation_checkpointing:
            lm.activation_checkpointing_disable()
        for layer in fused:
            del layer.forward
        loss.lanes = 1
        if shares:
            lm.set_attn_implementation(attention)
            loss.collate = collate


def _blocks(lm: Any) -> list[Any]:
    """The layers of a model, which are its body's outermost list, whatever that is called."""
    lists = (m for m in body_of(lm).modules() if isinstance(m, nn.ModuleList))
    return list(next(lists, ()))


def _is_mostly_frozen(loss: nn.Module) -> bool:
    """Whether the gradients of several micro-batches take little memory beside the weights."""
    sizes = [(p.numel(), p.requires_grad) for p in loss.parameters()]
    learned, total = sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)
    return bool(learned < SMALL * total)


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
    base, down, up, scale = _parts(layer)

    def forward(x: Tensor) -> Tensor:
        y: Tensor = FusedLora.apply(x, base.weight, base.bias, down.weight, up.weight, scale)
        # A view that a Function makes may not be added to, as Llama 4 does.
        return y.view(*x.shape[:-1], -1)

    return forward


def _parts(layer: Any) -> tuple[Any, Any, Any, float]:
    """The frozen layer, the adapter's two, and what their product is multiplied by."""
    name = layer.active_adapters[0]
    return layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.scaling[name]


def _is_plain_norm(module: Any) -> bool:
    """Whether a module is RMSNorm as Llama has it, by its name and by what it computes."""
    weight, epsilon = (getattr(module, name, None) for name in ("weight", "variance_epsilon"))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or epsilon is None:
        return False
    if not _is_whole(weight):
        return False
    x = _some_states(weight, len(weight))
    with torch.no_grad():
        same = torch.equal(module(x), FrozenNorm.apply(x, weight, epsilon))
    return bool(same) and not weight.requires_grad


def _frozen(norm: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y: Tensor = FrozenNorm.apply(x, norm.weight, norm.variance_epsilon)
        return y

    return forward


def _is_plain_mlp(module: Any, plain: Container[Any]) -> bool:
    """Whether a module is `down(silu(gate(x)) * up(x))` of plain layers, as it computes."""
    parts: list[Any] = [getattr(module, f"{n}_proj", None) for n in ("gate", "up", "down")]
    if not all(part in plain for part in parts):
        return False
    gate, up, down = parts
    if not all(_is_whole(part.base_layer.weight) for part in parts):
        return False
    x = _some_states(up.base_layer.weight, up.in_features)
    with torch.no_grad():
        return bool(torch.equal(module(x), down(nn.functional.silu(gate(x)) * up(x))))


def _is_whole(weight: Tensor) -> bool:
    """Whether a weight lies here as a whole; of a sharded one nothing can be tried out."""
    return type(weight.data) is Tensor


def _some_states(like: Tensor, width: int) -> Tensor:
    """Two states that no module computes as another one would."""
    steps = torch.arange(2 * width, dtype=torch.float32, device=like.device)
    return steps.sin().view(1, 2, width).to(like.dtype)


def _gated(mlp: Any) -> Callable[[Tensor], Tensor]:
    parts = [_parts(part) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]

    def forward(x: Tensor) -> Tensor:
        weights = [
            t
            for base, down, up, _ in parts
            for t in (base.weight, base.bias, down.weight, up.weight)
        ]
        y: Tensor = GatedLora.apply(x, [scale for *_, scale in parts], *weights)
        return y.view(x.shape)

    return forward


class FusedLora(torch.autograd.Function):  # type: ignore[misc]
    """A frozen linear layer plus its adapter; both are computed in the type of products."""

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
        """`x W^T + bias + (x down^T) (scale * up)^T`, all rows of it below each other."""
        dtype = products_dtype(x.dtype, x.device.type)
        (layer,) = _layers((weight, bias, down, up), [scale], dtype)
        rows = x.flatten(0, -2)
        wide = rows.to(dtype)
        inner = wide @ layer.down.t()
        ctx.save_for_backward(rows, weight, bias, down, up, inner)
        ctx.scale, ctx.shape = scale, x.shape
        return _output(wide, layer, inner).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, where one is wanted, and of the adapter."""
        rows, *weights, inner = ctx.saved_tensors
        (layer,) = _layers(weights, [ctx.scale], inner.dtype)
        by_y = above[0].to(inner.dtype)
        wide = rows.to(inner.dtype)
        by_rows, *by_adapter = _by_linear(by_y, wide, layer, inner, ctx.needs_input_grad[0])
        by_x = None if by_rows is None else by_rows.to(rows.dtype).view(ctx.shape)
        by_down, by_up = (by.to(weights[2].dtype) for by in by_adapter)
        return by_x, None, None, by_down, by_up * ctx.scale, None


class GatedLora(torch.autograd.Function):  # type: ignore[misc]
    """`down(silu(gate(x)) * up(x))` of frozen layers with their adapters.

    Keeps `x`, and what gate and up make of it where products are not cheap; in the type of `x`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Sequence[float], *weights: Tensor | None
    ) -> Tensor:
        """As `FusedLora`, of three layers.

        `weights` are weight, bias and the adapter's two matrices: of gate, of up, of down.
        """
        dtype = products_dtype(x.dtype, x.device.type)
        gate, up, down = _layers(weights, scales, dtype)
        rows = x.flatten(0, -2)
        wide = rows.to(dtype)
        opened, raised = (_output(wide, one, wide @ one.down.t()) for one in (gate, up))
        again = products_are_cheap(x.device.type)
        kept = () if again else (opened.to(x.dtype), raised.to(x.dtype))
        ctx.save_for_backward(rows, *weights, *kept)
        ctx.scales, ctx.shape, ctx.dtype = scales, x.shape, dtype
        product = nn.functional.silu(opened, inplace=again).mul_(raised)
        return _output(product, down, product @ down.down.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Any, ...]:
        """Gradients of the input and of the adapters."""
        rows, *weights = ctx.saved_tensors
        weights, parted = weights[:12], weights[12:]
        gate, up, down = _layers(weights, ctx.scales, ctx.dtype)
        wide = rows.to(ctx.dtype)
        of_gate, of_up = wide @ gate.down.t(), wide @ up.down.t()
        if parted:
            opened, raised = (kept.to(ctx.dtype) for kept in parted)
        else:
            opened, raised = _output(wide, gate, of_gate), _output(wide, up, of_up)
        open_ = nn.functional.silu(opened)
        product = open_ * raised
        by_y = above[0].to(ctx.dtype)
        of_down = product @ down.down.t()
        by_product, *by_down = _by_linear(by_y, product, down, of_down, True)
        assert by_product is not None
        by_opened = torch.ops.aten.silu_backward(by_product * raised, opened)
        by_x, *by_gate = _by_linear(by_opened, wide, gate, of_gate, True)
        by_x_too, *by_up = _by_linear(by_product * open_, wide, up, of_up, True)
        assert by_x is not None and by_x_too is not None
        matrices = [
            (None, None, one.to(weights[2].dtype), other.to(weights[2].dtype) * scale)
            for (one, other), scale in zip((by_gate, by_up, by_down), ctx.scales, strict=True)
        ]
        by_rows = (by_x + by_x_too).to(rows.dtype)
        return by_rows.view(ctx.shape), None, *chain.from_iterable(matrices)


class Layer(NamedTuple):
    """A frozen layer and its adapter, in the type that products are computed in."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    """Scaled."""


def _layers(weights: Sequence[Any], scales: Sequence[float], dtype: torch.dtype) -> list[Layer]:
    """The layers of weights as modules have them, four for each."""
    found = []
    for i, scale in zip(range(0, len(weights), 4), scales, strict=True):
        weight, bias, down, up = weights[i : i + 4]
        bias = None if bias is None else bias.to(dtype)
        found.append(Layer(weight.to(dtype), bias, down.to(dtype), (up * scale).to(dtype)))
    return found


def _output(rows: Tensor, layer: Layer, inner: Tensor) -> Tensor:
    """What a layer makes of rows; `inner` is what the adapter's first matrix makes of them."""
    weight, bias, _, up = layer
    y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
    return y.addmm_(inner, up.t())


def _by_linear(
    by_y: Tensor, rows: Tensor, layer: Layer, inner: Tensor, wanted: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the rows, where they are wanted, and of the adapter's matrices."""
    weight, _, down, up = layer
    by_inner = by_y @ up
    by_rows = (by_y @ weight).addmm_(by_inner, down) if wanted else None
    return by_rows, by_inner.t() @ rows, by_y.t() @ inner


class FrozenNorm(torch.autograd.Function):  # type: ignore[misc]
    """RMSNorm whose weight is frozen; keeps its input as it came, and not in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """`weight * x / rms(x)`, the quotient in fp32."""
        wide = x.to(torch.float32)
        by = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, by)
        return weight * (wide * by).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the input."""
        x, weight, by = ctx.saved_tensors
        normed = x.to(torch.float32) * by
        wide = (above[0] * weight).to(torch.float32)
        along = (wide * normed).mean(-1, keepdim=True)
        return (wide - normed * along).mul_(by).to(x.dtype), None, None
