"""The training loop: transformers' Trainer, with steps of whole rows and checkpoints that hold.

One step takes `batch_size` rows whatever their length and however many processes there are;
each splits its share into micro-batches, and the loss is the mean over all completion tokens of
the step, or over its labels or pairs. A checkpoint counts only with its marker, written last,
so a killed process leaves none that is torn. It holds what is trained as safetensors, and
optimiser, scheduler and random state, which Trainer reads with `weights_only`: nothing in it
can execute code. DeepSpeed's own checkpoints can, so under it there are none.

This module knows Trainer; it knows no record, no recipe and no folder but the checkpoints'.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from misstep.errors import TrainingError
from misstep.models.weights import free, halve
from misstep.records import write_text
from misstep.training.label_loss import EncoderLoss, LabelLoss
from misstep.training.lanes import side_by_side
from misstep.training.loss import CompletionLoss, MicroBatch
from misstep.training.preference import PreferenceLoss
from misstep.training.processes import like, on_one_device, whole
from misstep.training.rows import PairRow, Row, longest, padded, shares

MARKER = "complete.json"
WEIGHTS = "trained.safetensors"
QUICK = 3.0
"""Seconds in which a checkpoint is written; of one that takes longer there are fewer."""


def training_arguments(folder: Path, **own: Any) -> TrainingArguments:
    """Trainer's arguments for a `CompletionTrainer`; `own` are of one kind of training."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        # The rows come in the order of all epochs, so for Trainer there is one.
        num_train_epochs=1,
        per_device_train_batch_size=1,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **own,
    )
    return on_one_device(arguments)


class CompletionTrainer(Trainer):  # type: ignore[misc]
    """Trains a loss on its rows, labels or pairs, in the order in which they are given."""

    def __init__(
        self,
        model: CompletionLoss | LabelLoss | EncoderLoss | PreferenceLoss,
        args: TrainingArguments,
        rows: Sequence[Row] | Sequence[PairRow],
        batch_size: int,
        micro_tokens: int,
        callbacks: list[TrainerCallback],
    ) -> None:
        starts = range(0, len(rows), batch_size)
        if len(starts) < 2:
            # A warm-up has whole steps and begins at 0: an only step would change nothing.
            args.warmup_steps = 0
        super().__init__(
            model=model,
            args=args,
            train_dataset=[rows[start : start + batch_size] for start in starts],
            data_collator=lambda steps: {"rows": steps[0]},
            callbacks=callbacks,
        )
        self.loss = model
        self.micro_tokens = micro_tokens
        self.remove_callback(PrinterCallback)
        if self.is_deepspeed_enabled:
            self.remove_callback(Checkpoints)
        self.seconds_before = 0.0
        self._started = time.monotonic()

    def get_train_dataloader(self) -> DataLoader:
        """One step at a time; accelerate would deal out whole steps, and fill the last one."""
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=self.data_collator)

    @property
    def seconds(self) -> float:
        """How long training took, the processes before an interruption included."""
        return self.seconds_before + time.monotonic() - self._started

    def train_or_resume(self) -> int:
        """Train to the end; gives the step of the checkpoint that it went on from, else 0."""
        with self.accelerator.main_process_first():
            found = last_checkpoint(Path(self.args.output_dir))
        if found is not None:
            self.seconds_before = json.loads((found / MARKER).read_text())["seconds"]
        self._started = time.monotonic()
        self.train(resume_from_checkpoint=str(found) if found else None)
        return _step(found) if found else 0

    def training_step(
        self, model: Any, inputs: dict[str, Any], *_: object, **__: object
    ) -> Tensor:
        """Forward and backward of this process's micro-batches of one step.

        Where a GPU's memory runs out the step begins anew, in smaller micro-batches, and where
        these are single rows with activations computed twice instead of kept.
        """
        model.train()
        rows = inputs["rows"]
        groups = self._groups(rows)
        while (total := self._tried(model, rows, groups)) is None:
            # Some gradients may be there already.
            model.zero_grad()
            if _are_single(groups):
                _compute_twice(self.loss.lm)
            else:
                self.micro_tokens = halve(max(map(padded, groups)))
            groups = self._groups(rows)
        # All stop together, whosever loss it is.
        loss = self.accelerator.reduce(total, "mean").item()
        if not math.isfinite(loss):
            raise TrainingError(
                f"training, step {self.state.global_step + 1}: the loss is {loss}, "
                "expected a finite number. Lower train.learning_rate, or for pairs "
                "train.preferences.learning_rate."
            )
        return total

    def _groups(self, rows: Sequence[Any]) -> list[list[Any]]:
        """The micro-batches of this process."""
        if self._lanes > 1:
            dealt = shares(rows, self._lanes, self.micro_tokens)
            found = [group for groups in dealt for group in groups if group]
            # The longest first, so that no lane begins it when the others are done.
            return sorted(found, key=padded, reverse=True)
        dealt = shares(rows, self.args.world_size, self.micro_tokens)
        return dealt[self.args.process_index]

    @property
    def _lanes(self) -> int:
        """How many micro-batches are computed at once; several processes are lanes already."""
        alone = self.accelerator.distributed_type == DistributedType.NO
        return self.loss.lanes if alone else 1

    def _tried(
        self, model: Any, rows: Sequence[Any], groups: Sequence[list[Any]]
    ) -> Tensor | None:
        """The loss of a step, or None where smaller micro-batches are to be tried.

        Raises:
            TrainingError: the memory of a GPU does not hold a row, or not what it is given
                beside other processes, which wait in the middle of the step.
        """
        try:
            return self._whole_step(model, rows, groups)
        except torch.OutOfMemoryError as error:
            alone = self.accelerator.distributed_type == DistributedType.NO
            if alone and not (_are_single(groups) and self._keeps_little):
                return None
            raise TrainingError(
                f"training, step {self.state.global_step + 1}: the GPU's memory ran out on "
                f"{max(map(len, groups))} rows of up to {max(map(longest, rows))} tokens. Set "
                "train.gradient_checkpointing to true, lower train.max_length, or among "
                "several processes train.batch_size; or see what else is on the GPU."
            ) from error

    @property
    def _keeps_little(self) -> bool:
        """Whether no activation is kept that could be computed twice; an encoder's all are."""
        lm = None if isinstance(self.loss, EncoderLoss) else self.loss.lm
        return lm is None or bool(lm.is_activation_checkpointing)

    def _whole_step(
        self, model: Any, rows: Sequence[Any], groups: Sequence[list[Any]]
    ) -> Tensor:
        # Who has nothing left computes something small for nothing: all must take part.
        idle = [min(rows, key=longest)]
        micro = [self._prepare_inputs(self.loss.collate(group or idle)) for group in groups]
        # Gradients are averaged over the processes; the loss is to be summed over them.
        scale = self.args.world_size / self.loss.count(rows)
        if self._lanes > 1:
            return self._side_by_side(model, micro, scale)
        total = torch.zeros((), device=self.args.device)
        for batch, group in zip(micro[:-1], groups, strict=False):
            self.accelerator.gradient_state._set_sync_gradients(False)
            with self.accelerator.no_sync(model):
                total += self._backward(model, batch, scale * bool(group))
        self.accelerator.gradient_state._set_sync_gradients(True)
        return total + self._backward(model, micro[-1], scale * bool(groups[-1]))

    def _side_by_side(self, model: Any, micro: Sequence[MicroBatch], scale: float) -> Tensor:
        """As one after the other: gradients are summed in the order of the micro-batches."""
        parameters = list(trained(model).values())

        def derived(batch: MicroBatch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            loss = self._loss(model, batch, scale)
            return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

        found = side_by_side(derived, micro, self._lanes)
        for _, gradients in found:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    held = parameter.grad
                    parameter.grad = gradient if held is None else held.add_(gradient)
        return torch.stack([loss for loss, _ in found]).sum()

    def _loss(self, model: Any, batch: MicroBatch, scale: float) -> Tensor:
        with self.compute_loss_context_manager():
            loss: Tensor = model(**batch) * scale
        return loss

    def _backward(self, model: Any, batch: MicroBatch, scale: float) -> Tensor:
        loss = self._loss(model, batch, scale)
        self.accelerator.backward(loss)
        return loss.detach()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only what is trained; the base weights are where they were."""
        tensors = whole(trained(self.model))
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        parameters = trained(model or self.model)
        assert saved.keys() == parameters.keys()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(like(saved[name], parameter))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer

        # Trainer would write all weights beside it.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # Each process writes its own random state.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            write_text(folder / MARKER, json.dumps({"seconds": self.seconds}))


def _compute_twice(lm: Any) -> None:
    """Compute layers again in the backward pass, since a GPU lacked memory; says so."""
    free()
    lm.activation_checkpointing_enable()
    logging.getLogger(__name__).warning(
        "The GPU's memory ran out on a single row. Layers are computed twice from here on "
        "instead of kept, as by train.gradient_checkpointing; this takes a third longer."
    )


def _are_single(groups: Sequence[Sequence[Any]]) -> bool:
    """Whether no micro-batch can be made smaller."""
    return all(len(group) < 2 for group in groups)


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint when so many seconds have passed since the last one was written.

    Where writing one takes long, the next is later in proportion: writing takes a small share
    of the time.
    """

    def __init__(self, seconds: float) -> None:
        self.every = self.wait = seconds
        self.last = self.asked = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide; the end of training needs no checkpoint, since the result is written then."""
        self.asked = time.monotonic()
        due = torch.tensor(self.asked - self.last >= self.wait, device=args.device)
        # By the leader's clock.
        if broadcast(due) and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """It is written: the time until the next one begins."""
        self.last = time.monotonic()
        self.wait = self.every * max(1.0, (self.last - self.asked) / QUICK)


class Steps(TrainerCallback):  # type: ignore[misc]
    """Tells a function how many steps are done."""

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        self.tell = tell

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """One step more."""
        if state.is_world_process_zero:
            self.tell(state.global_step, state.max_steps)


def trained(model: Any) -> dict[str, Tensor]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; torn ones are removed, since Trainer would count them."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    whole = [path for path in found if (path / MARKER).is_file()]
    for path in set(found) - set(whole):
        shutil.rmtree(path, ignore_errors=True)
    return max(whole, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
