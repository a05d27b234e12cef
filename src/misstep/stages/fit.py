"""One training, from a checked job to weights and a report: the loop around the losses.

Loss falls on completions and on nothing else; of pairs it is that of direct preference
optimisation, by the same trainer. This module knows settings and what is measured before and
after; tokens, losses and the trainer are in `misstep.training`, loaded when training begins.
It writes nothing but checkpoints.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

from misstep.machine import peak_memory_mb
from misstep.models.locate import Model
from misstep.models.precision import micro_tokens
from misstep.models.rendering import Renderer
from misstep.models.weights import load_weights
from misstep.stages.base import Notify
from misstep.stages.train_settings import TrainSettings
from misstep.training import processes
from misstep.training.report import RankReport, TrainReport
from misstep.training.rows import PairRow, Row, Rows, in_epochs, sample_by_kind

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from misstep.training.loss import CompletionLoss
    from misstep.training.preference import PreferenceLoss
    from misstep.training.trainer import CompletionTrainer

CHECKPOINTS = "checkpoints"
SECONDS_BETWEEN_CHECKPOINTS = 60.0
MEASURED_ROWS = 8
"""Of each kind, for the loss before and after."""
MEASURED_PAIRS = 64
"""Of each kind, for loss and ranking; a share of eight would be a coarse one."""


@dataclass(frozen=True)
class Job:
    """One training, checked and ready to begin."""

    model: Model
    renderer: Renderer
    rows: Rows[Row] | Rows[PairRow]
    settings: TrainSettings
    seed: int
    folder: Path
    inputs: str
    datasets: tuple[str, ...]

    @property
    def checkpoints(self) -> Path:
        """Named by the inputs, so that those of another training are never gone on from."""
        return self.folder / CHECKPOINTS / self.inputs

    @property
    def on_pairs(self) -> bool:
        """Whether this is preference training."""
        return isinstance(self.rows.kept[0], PairRow)

    @property
    def learning_rate(self) -> float:
        """That of the kind of training that this is."""
        own = self.settings.preferences.learning_rate
        return own if self.on_pairs else self.settings.learning_rate


def fit(job: Job, notify: Notify | None) -> "tuple[CompletionLoss, TrainReport]":
    """Train, from the last checkpoint where there is one: what was trained, and the report."""
    from misstep.training.kernels import fast_layers

    completion, arguments = _prepare(job), _arguments(job)
    loss = _objective(job, completion)
    # Trainer would do it too, but something is measured first.
    processes.place(loss, completion.lm, arguments)
    settings = job.settings
    with fast_layers(completion, settings.gradient_checkpointing, settings.compile):
        started = time.monotonic()
        rows = _with_reference(job, loss)
        reference_seconds = time.monotonic() - started
        order: list[Any] = in_epochs(rows, job.settings.epochs, job.seed)
        trainer = _trainer(job, loss, arguments, order, notify)
        sample = sample_by_kind(rows, MEASURED_PAIRS if job.on_pairs else MEASURED_ROWS)
        before = _losses(loss, sample)
        resumed_from = trainer.train_or_resume()
        seconds = trainer.seconds
        after = _losses(loss, sample)
        ranks = _ranks(loss, sample, reference_seconds) if job.on_pairs else None
    report = _report(
        job,
        _curve(trainer),
        loss_before=before,
        loss_after=after,
        seconds=round(seconds, 1),
        tokens_per_second=round(_tokens(order) / seconds, 1),
        resumed_from=resumed_from,
        ranks=ranks,
    )
    return completion, report


def _prepare(job: Job) -> "CompletionLoss":
    from misstep.training.lora import with_adapter, with_all_weights

    lm, settings = load_weights(job.model), job.settings
    if settings.adapter == "full":
        return with_all_weights(lm)
    return with_adapter(lm, settings.rank, settings.alpha, job.seed)


def _objective(job: Job, completion: "CompletionLoss") -> "CompletionLoss | PreferenceLoss":
    if not job.on_pairs:
        return completion
    from misstep.training.preference import PreferenceLoss

    return PreferenceLoss(completion, job.settings.preferences.beta)


def _with_reference(job: Job, loss: Any) -> Sequence[Any]:
    """What the loss is a loss of: rows, or pairs with the margins of the reference."""
    if not job.on_pairs:
        return job.rows.kept
    from misstep.training.preference import with_reference

    return with_reference(loss, cast("Sequence[PairRow]", job.rows.kept), micro_tokens())


def _trainer(
    job: Job,
    loss: "CompletionLoss | PreferenceLoss",
    arguments: "TrainingArguments",
    order: Sequence[Any],
    notify: Notify | None,
) -> "CompletionTrainer":
    from misstep.training.trainer import Checkpoints, CompletionTrainer, Steps

    tell = notify or (lambda *_: None)
    return CompletionTrainer(
        loss,
        arguments,
        order,
        job.settings.batch_size,
        micro_tokens(),
        [
            Checkpoints(SECONDS_BETWEEN_CHECKPOINTS),
            Steps(lambda done, total: tell("training steps", done, total)),
        ],
    )


def _arguments(job: Job) -> "TrainingArguments":
    import torch

    from misstep.training.trainer import training_arguments

    settings, on_gpu = job.settings, torch.cuda.is_available()
    return training_arguments(
        job.checkpoints,
        learning_rate=job.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        # Autocast is slow on a CPU; an adapter is computed in the weights' type without it.
        bf16=on_gpu and settings.adapter == "full" and torch.cuda.is_bf16_supported(),
        seed=job.seed,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(settings.report_to) or "none",
    )


def _losses(loss: Any, sample: dict[str, list[Any]]) -> dict[str, float]:
    from misstep.training.loss import mean_loss

    return {k: round(mean_loss(loss, rows, micro_tokens()), 4) for k, rows in sample.items()}


def _ranks(loss: Any, sample: dict[str, list[PairRow]], seconds: float) -> RankReport:
    from misstep.training.preference import margins

    before = {kind: [pair.reference for pair in pairs] for kind, pairs in sample.items()}
    after = {kind: margins(loss, pairs, micro_tokens()) for kind, pairs in sample.items()}
    gains = {
        kind: [a - b for a, b in zip(after[kind], before[kind], strict=True)] for kind in sample
    }
    return RankReport(
        likelier_before={kind: _positive(found) for kind, found in before.items()},
        likelier_after={kind: _positive(found) for kind, found in after.items()},
        gained={kind: _positive(found) for kind, found in gains.items()},
        gain={kind: round(fmean(found), 4) for kind, found in gains.items()},
        reference_seconds=round(seconds, 1),
    )


def _positive(numbers: Sequence[float]) -> float:
    return round(fmean(number > 0 for number in numbers), 4)


def _curve(trainer: "CompletionTrainer") -> list[tuple[int, float]]:
    history = trainer.state.log_history
    return [(entry["step"], round(entry["loss"], 5)) for entry in history if "loss" in entry]


def _report(job: Job, curve: list[tuple[int, float]], **measured: Any) -> TrainReport:
    kept = job.rows.kept
    return TrainReport(
        inputs=job.inputs,
        rows=job.rows.given,
        trained=len(kept),
        dropped=job.rows.dropped,
        truncated=job.rows.truncated,
        tokens=_tokens(kept),
        completion_tokens=sum(row.learned for unit in kept for row in unit.lines),
        steps=len(curve),
        first_loss=curve[0][1],
        last_loss=curve[-1][1],
        loss_curve=tuple(curve),
        peak_memory_mb=peak_memory_mb(),
        **measured,
    )


def _tokens(units: Sequence[Row] | Sequence[PairRow]) -> int:
    return sum(len(row.ids) for unit in units for row in unit.lines)
