"""Several processes of one training, as `accelerate launch` starts them: one leads.

The leader alone runs the command line, reads recipes and writes results. The others hear what
is to be trained and train it with the leader, until it dismisses them. What they are told is
text: nothing that is sent can execute code. They may wait for days while the leader generates,
so orders have a channel of their own; the trainer's keeps its limits.

This module knows torch's process groups and accelerate; it knows no row, recipe or trainer.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from misstep.errors import InputError

PATIENCE = timedelta(days=30)
"""How long the others wait for an order."""
FSDP = {
    "FSDP_VERSION": ("fsdp_version", "2"),
    "FSDP_STATE_DICT_TYPE": ("fsdp_state_dict_type", "FULL_STATE_DICT"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("fsdp_cpu_ram_efficient_loading", "false"),
}
"""What a configuration of FSDP must say, for adapters and checkpoints to be whole: variables of
the environment, the keys that accelerate makes them of, and their values."""


@dataclass
class Channel:
    """Through which the leader tells the others what to do."""

    group: Any
    busy: bool = False
    """Whether the others are training, and so do not listen."""


_channels: list[Channel] = []


def count() -> int:
    """How many processes were launched; 1 where nothing launched this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_leader() -> bool:
    """Whether this process runs the command line and writes what is written."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def leading() -> Iterator[None]:
    """Lead the others, if there are any, and dismiss them at the end of the work inside.

    Where the work fails in the middle of a step, they cannot hear: the launcher ends them.
    """
    _check()
    if count() == 1:
        yield
        return
    channel = _open()
    try:
        yield
    finally:
        if not channel.busy:
            _send(channel, "")
            _close()


@contextmanager
def together(order: str) -> Iterator[None]:
    """Have the others obey an order while the work inside is done."""
    channel = _channels[0] if _channels and is_leader() else None
    if channel is not None:
        _send(channel, order)
        channel.busy = True
    yield
    if channel is not None:
        channel.busy = False


def follow(obey: Callable[[str], None]) -> None:
    """Obey orders until dismissed."""
    _check()
    channel = _open()
    while order := _send(channel, ""):
        obey(order)
    _close()


def _check() -> None:
    """Refuse what accelerate may be configured to and this trainer does not do.

    Raises:
        InputError: names the key of accelerate's configuration.
    """
    wanted = {"ACCELERATE_MIXED_PRECISION": ("mixed_precision", "no")}
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        wanted |= FSDP
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        wanted |= {"ACCELERATE_DEEPSPEED_ZERO_STAGE": ("zero_stage", "2")}
    for name, (key, value) in wanted.items():
        found = os.environ.get(name, value)
        if found.lower() != value.lower():
            raise InputError(
                f"accelerate's configuration: {key}: expected {value}, found {found}. "
                "Start from one of those in recipes/accelerate."
            )


def _open() -> Channel:
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    _channels.append(Channel(group))
    return _channels[0]


def _send(channel: Channel, text: str) -> str:
    """Give all processes the leader's text; what the others pass is not looked at."""
    import torch

    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    size = torch.tensor([len(data)])
    torch.distributed.broadcast(size, 0, group=channel.group)
    if not size:
        return ""
    if not is_leader():
        data = torch.empty(int(size), dtype=torch.uint8)
    torch.distributed.broadcast(data, 0, group=channel.group)
    return bytes(data.tolist()).decode()


def _close() -> None:
    import torch

    _channels.clear()
    torch.distributed.destroy_process_group()


def on_one_device(arguments: Any) -> Any:
    """Trainer's arguments, by which a process trains on one GPU however many it sees.

    By itself Trainer would put `nn.DataParallel` around the model, which divides every tensor
    of a micro-batch at its first dimension: rows and positions apart. Several GPUs take
    several processes.
    """
    # Reading it settles the device; 0 is a processor.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def place(loss: Any, lm: Any, arguments: Any) -> None:
    """Move a loss to where it is trained: to this device, or in parts to all of them."""
    from accelerate import Accelerator
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    accelerator = Accelerator(mixed_precision="bf16" if arguments.bf16 else "no")
    if accelerator.is_fsdp2:
        # Each layer is put together when it is computed, embeddings and head with the whole.
        loss._no_split_modules = lm._no_split_modules
        # Measured before training, all must be in parts again when the optimiser is made.
        fsdp2_prepare_model(accelerator, loss).set_reshard_after_forward(True)
    else:
        loss.to(arguments.device)


def whole(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors, those that lie in parts put together; all processes must ask at once.

    The leader gets them, on its processor, since all of a model together need not fit on one
    device; the others get none. Parameters that are one stay one, as a head that is tied to the
    embeddings.
    """
    from torch.distributed.tensor import DTensor

    found: dict[int, Any] = {}
    for tensor in tensors.values():
        if id(tensor) not in found:
            held = tensor.detach()
            one = held.full_tensor() if isinstance(held, DTensor) else held
            found[id(tensor)] = one.cpu() if is_leader() else None
    return {name: found[id(t)] for name, t in tensors.items()} if is_leader() else {}


def like(tensor: Any, model: Any) -> Any:
    """A whole tensor, divided as the model is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(model, DTensor):
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)
