"""The training loop: transformers' Trainer, with steps of whole rows and checkpoints that hold.

One step takes `batch_size` rows whatever their length; each process splits its share into
micro-batches, and the loss is the mean over all completion tokens of the step, or over its
pairs. A checkpoint counts only with its marker, written last, so a killed process leaves none
that is torn. It holds what is trained as safetensors, and optimiser, scheduler and random
state, which Trainer reads with `weights_only`: nothing in it can execute code.

This module knows Trainer; it knows no record, no recipe and no folder but the checkpoints'.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from misstep.errors import TrainingError
from misstep.records import write_text
from misstep.training.loss import CompletionLoss, MicroBatch
from misstep.training.preference import PreferenceLoss
from misstep.training.rows import PairRow, Row, micro_batches

MARKER = "complete.json"
WEIGHTS = "trained.safetensors"
STEPS_BETWEEN_CHECKPOINTS = 50
"""With several processes, which must agree without a clock."""


class CompletionTrainer(Trainer):  # type: ignore[misc]
    """Trains a loss on its rows, or on its pairs, in the order in which they are given."""

    def __init__(
        self,
        model: CompletionLoss | PreferenceLoss,
        args: TrainingArguments,
        rows: Sequence[Row] | Sequence[PairRow],
        micro_tokens: int,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=lambda found: {
                "micro": [model.collate(group) for group in micro_batches(found, micro_tokens)]
            },
            callbacks=callbacks,
        )
        self.count = model.count
        self.remove_callback(PrinterCallback)
        self.seconds_before = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long training took, the processes before an interruption included."""
        return self.seconds_before + time.monotonic() - self._started

    def train_or_resume(self) -> int:
        """Train to the end; gives the step of the checkpoint that it went on from, else 0."""
        found = last_checkpoint(Path(self.args.output_dir))
        if found is not None:
            self.seconds_before = json.loads((found / MARKER).read_text())["seconds"]
        self._started = time.monotonic()
        self.train(resume_from_checkpoint=str(found) if found else None)
        return _step(found) if found else 0

    def training_step(
        self, model: Any, inputs: dict[str, list[MicroBatch]], *_: object, **__: object
    ) -> Tensor:
        """Forward and backward of all micro-batches of one step."""
        model.train()
        micro = [self._prepare_inputs(batch) for batch in inputs["micro"]]
        count = torch.tensor(sum(map(self.count, micro)), device=self.args.device)
        # DDP averages gradients over the processes; the loss is to be summed over them.
        scale = self.args.world_size / self.accelerator.reduce(count, "sum").float()
        total = torch.zeros((), device=self.args.device)
        for batch in micro[:-1]:
            with self.accelerator.no_sync(model):
                total += self._backward(model, batch, scale)
        total += self._backward(model, micro[-1], scale)
        if not math.isfinite(total.item()):
            raise TrainingError(
                f"training, step {self.state.global_step + 1}: the loss is {total.item()}, "
                "expected a finite number. Lower train.learning_rate, or for pairs "
                "train.preferences.learning_rate."
            )
        return total

    def _backward(self, model: Any, batch: MicroBatch, scale: Tensor) -> Tensor:
        with self.compute_loss_context_manager():
            loss = model(**batch) * scale
        self.accelerator.backward(loss)
        return loss.detach()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        """Only what is trained; the base weights are where they were."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {n: p.detach().contiguous() for n, p in trained(self.model).items()}
            save_file(tensors, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        parameters = trained(model or self.model)
        assert saved.keys() == parameters.keys()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            write_text(folder / MARKER, json.dumps({"seconds": self.seconds}))


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint when so many seconds have passed since the last one."""

    def __init__(self, seconds: float) -> None:
        self.every = seconds
        self.last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide; the end of training needs no checkpoint, since the result is written then."""
        if args.world_size > 1:
            due = state.global_step % STEPS_BETWEEN_CHECKPOINTS == 0
        else:
            due = time.monotonic() - self.last >= self.every
        if due and state.global_step < state.max_steps:
            control.should_save = True
            self.last = time.monotonic()


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
