"""Fine-tuning on examples or pairs: rows in, an adapter in a folder out, and a report.

Loss falls on completions and on nothing else; of pairs it is that of direct preference
optimisation, by the same trainer. A folder that is finished and was made from the
same model, rows, settings and seed gives its report at once; one that a killed process left is
gone on with from its last checkpoint, to the same adapter, bit for bit. The paper's learning
rate, epochs and batch size are not public; the defaults start from the same authors' MoTE.

This module knows settings, files and reports. Tokens, loss and loop are in `misstep.training`,
loaded when training begins; it knows no method: a row's kind only names a number in the report.
"""

import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeGuard, cast

from pydantic import Field, ValidationError

from misstep import __version__
from misstep.errors import RecipeError, TrainingError
from misstep.models import Model, free, load_weights
from misstep.records import Example, Pair, Record, digest, write_text
from misstep.rendering import Renderer
from misstep.stages.base import Notify, Settings
from misstep.training import processes
from misstep.training.card import card_head
from misstep.training.report import RankReport, ReinforceReport
from misstep.training.rows import (
    PairRow,
    Row,
    Rows,
    in_order,
    render_pairs,
    render_rows,
    sample_by_kind,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from misstep.training.loss import CompletionLoss
    from misstep.training.preference import PreferenceLoss
    from misstep.training.trainer import CompletionTrainer

TrainingRows = Sequence[Example] | Sequence[Pair]
"""All of one kind: completions to learn, or pairs to learn a preference from."""
FORMAT = 2
"""Raised when equal inputs no longer give an equal adapter."""
REPORT = "train.json"
CHECKPOINTS = "checkpoints"
CARD = "README.md"
OUTPUTS = (
    *(CARD, "adapter_config.json", "adapter_model.safetensors"),
    *("config.json", "generation_config.json", "model*.safetensors*"),
    *("tokenizer*", "special_tokens_map.json", "chat_template*"),
)
ASIDE = ("report_to", "max_dropped")
"""Settings of what is told and what is refused. A training is named as if they had their
defaults, which stand in the names of finished ones."""
HOW = ("gradient_checkpointing", "compile")
"""Settings that change the time and the memory of a training, and nothing that comes of it."""
SECONDS_BETWEEN_CHECKPOINTS = 60.0
MEASURED_ROWS = 8
"""Of each kind, for the loss before and after."""
MEASURED_PAIRS = 64
"""Of each kind, for loss and ranking; a share of eight would be a coarse one."""
MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Padded tokens of one micro-batch: what a processor needs to be busy, and not more memory."""


class PreferenceSettings(Settings):
    """What training on pairs does otherwise: direct preference optimisation."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How dear it is to leave the reference; the paper's value (arXiv 2305.18290) and TRL's."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """In place of `train.learning_rate`, at which pairs unlearn how to write. TRL 1.16 trains
    all weights at 1e-6 and adapters, in its example of a 0.5B, at 5e-6."""


class TrainSettings(Settings):
    """How a model is fine-tuned."""

    adapter: Literal["lora", "full"] = "lora"
    """`lora` trains an adapter on all linear layers; `full` trains all weights, in fp32."""
    rank: Annotated[int, Field(ge=1)] = 16
    """The adapter's rank; that of MoTE (arXiv 2405.00557) is 16."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The adapter's output is scaled by alpha / rank."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """MoTE trains a 7B at 2e-5. Ours is for models below 2B, whose adapters need larger steps;
    `full` wants about a tenth of it."""
    epochs: Annotated[float, Field(gt=0)] = 3
    """MoTE's is 3; parts of an epoch are allowed."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows, or pairs, of one optimiser step, over all processes; MoTE's is 16."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    """Tokens of prompt and completion together; what lies beyond is cut from the completion."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """The share of the steps in which the learning rate rises to its full height."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's."""
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """How the learning rate falls after the warm-up."""
    gradient_checkpointing: bool = False
    """Compute each layer a second time instead of keeping what it made: less memory, and about
    a third more time."""
    compile: bool = False
    """Compile the layers with torch; the first steps take minutes."""
    max_dropped: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Training is refused where a larger share of the rows is dropped or cut."""
    report_to: tuple[str, ...] = ()
    """Trackers that Trainer knows, such as trackio, tensorboard, wandb, mlflow."""
    preferences: PreferenceSettings = PreferenceSettings()
    """For training on pairs."""


class TrainReport(Record):
    """What was trained on, and what came of it; `train.json` holds it."""

    inputs: str
    """Names model, rows, settings and seed by content."""
    rows: int
    """Rows, or pairs, that were given."""
    trained: int
    """Rows that were trained on."""
    dropped: int
    """Rows with nothing to learn within `max_length`."""
    truncated: int
    """Rows that were trained on without the end of their completion."""
    tokens: int
    """Tokens of the rows that were trained on, once each."""
    completion_tokens: int
    """Those of them that are learned."""
    steps: int
    first_loss: float
    last_loss: float
    loss_curve: tuple[tuple[int, float], ...]
    """Mean loss of a completion token, or of a pair, step by step."""
    loss_before: dict[str, float]
    """The same on a few rows of each kind, before training."""
    loss_after: dict[str, float]
    """The same after training, on the same rows."""
    seconds: float
    """Of training, without loading; what was done before an interruption is counted."""
    tokens_per_second: float
    """Tokens of the rows, padding not counted, epochs counted."""
    peak_memory_mb: int
    """The largest resident memory of the process up to the end of training."""
    resumed_from: int
    """The step of the checkpoint that training went on from; 0 where it was not interrupted."""
    ranks: RankReport | None = None
    """Of training on pairs."""
    reinforced: ReinforceReport | None = None
    """Of training for a reward."""


def train(
    model: Model,
    rows: TrainingRows,
    settings: TrainSettings,
    seed: int,
    folder: Path,
    notify: Notify | None = None,
    datasets: Sequence[str] = (),
) -> TrainReport:
    """Fine-tune a model and write the adapter, its card and the report into a folder.

    Args:
        model: the base.
        rows: what is learned.
        settings: how.
        seed: of the order of the rows, and of what the adapter begins with.
        folder: of the result; checkpoints lie in it until it is there.
        notify: told of the steps.
        datasets: of the Hub, for the card: where the rows come from.

    Raises:
        RecipeError: a tracker is not installed.
        TrainingError: no rows, too many of them unusable, pairs where all weights are to be
            trained, or a loss that is not a number.
        ModelError: the weights cannot be loaded.
    """
    order = Order(
        model=model.name,
        path=model.path,
        rows=tuple(rows),
        settings=settings,
        seed=seed,
        folder=folder,
        inputs=input_digest(model, rows, settings, seed),
        datasets=tuple(datasets),
    )
    report = finished(folder, order.inputs)
    if report is not None:
        _refuse_many(report.rows, report.dropped, report.truncated, settings)
    else:
        check_trackers(settings)
        job = order.job()
        _clear(job)
        with processes.together(order.model_dump_json()):
            report = _train(job, notify)
        free()
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return report


def follow(order: str) -> None:
    """Take part in a training that another process leads; it writes what comes of it."""
    _train(Order.model_validate_json(order).job(), None)
    free()


def input_digest(model: Model, rows: TrainingRows, settings: TrainSettings, seed: int) -> str:
    """What names a training by content: equal inputs, equal adapter."""
    used = naming(settings).model_dump(mode="json", exclude=_unused(_are_pairs(rows)))
    return digest([FORMAT, model.digest, [row.id for row in rows], used, seed])


def naming(settings: TrainSettings) -> TrainSettings:
    """The settings as they stand in a training's name."""
    default = TrainSettings()
    return settings.model_copy(update={key: getattr(default, key) for key in ASIDE})


def _are_pairs(rows: TrainingRows) -> TypeGuard[Sequence[Pair]]:
    return bool(rows) and isinstance(rows[0], Pair)


def _unused(on_pairs: bool) -> set[str]:
    """The settings that what comes of a training does not depend on, but for rounding."""
    return {"learning_rate" if on_pairs else "preferences", *HOW}


def finished(folder: Path, inputs: str) -> TrainReport | None:
    """The report of a folder whose training was finished and had these inputs."""
    try:
        text = (folder / REPORT).read_text(encoding="utf-8")
        report = TrainReport.model_validate_json(text)
    except (OSError, ValidationError):
        return None
    return report if report.inputs == inputs else None


def usable_rows(
    renderer: Renderer, given: TrainingRows, settings: TrainSettings
) -> Rows[Row] | Rows[PairRow]:
    """The rows, or pairs, as tokens.

    Raises:
        TrainingError: there are none, or a larger share than `max_dropped` is unusable, or
            there are pairs for a training of all weights.
    """
    rows: Rows[Row] | Rows[PairRow]
    if _are_pairs(given):
        if settings.adapter == "full":
            raise TrainingError(
                "train.adapter: expected lora for training on preference pairs, found full. "
                "The reference that it compares with is the model without its adapter."
            )
        rows = render_pairs(renderer, given, settings.max_length)
    else:
        rows = render_rows(renderer, cast("Sequence[Example]", given), settings.max_length)
    _refuse_many(rows.given, rows.dropped, rows.truncated, settings)
    return rows


def _refuse_many(given: int, dropped: int, truncated: int, settings: TrainSettings) -> None:
    if dropped == given or dropped + truncated > settings.max_dropped * given:
        raise TrainingError(
            f"training: of {given} rows {dropped} have nothing to learn within "
            f"{settings.max_length} tokens and {truncated} would lose the end of their "
            f"completion; expected at most {settings.max_dropped:.0%} of them, and one row at "
            "least to train on. Raise train.max_length, shorten the rows, or raise "
            "train.max_dropped."
        )


def check_trackers(settings: TrainSettings) -> None:
    """Pass where all trackers are installed.

    Raises:
        RecipeError: names those that are not, and those that are.
    """
    if not settings.report_to:
        return
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    missing = sorted(set(settings.report_to) - set(installed))
    if missing:
        raise RecipeError(
            f"train.report_to: expected trackers that are installed "
            f"({', '.join(installed) or 'there are none'}), found {', '.join(missing)}."
        )


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


class Order(Record):
    """What the processes of one training must know, for the leader to tell the others."""

    model: str
    path: Path | None
    rows: tuple[Example, ...] | tuple[Pair, ...]
    settings: TrainSettings
    seed: int
    folder: Path
    inputs: str
    datasets: tuple[str, ...]

    def job(self) -> Job:
        """The training, checked and ready to begin."""
        model = Model(self.model, self.path)
        renderer = Renderer.for_model(model)
        rows = usable_rows(renderer, self.rows, self.settings)
        given = (self.settings, self.seed, self.folder, self.inputs, self.datasets)
        return Job(model, renderer, rows, *given)


def _train(job: Job, notify: Notify | None) -> TrainReport:
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
        order: list[Any] = in_order(rows, job.settings.epochs, job.seed)
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
    weights = processes.whole(_weights(job, completion))
    if processes.is_leader():
        _save(job, completion, weights, report)
    return report


def _clear(job: Job) -> None:
    """Remove what a finished training of other inputs left; files not of ours stay."""
    job.checkpoints.mkdir(parents=True, exist_ok=True)
    for other in job.checkpoints.parent.iterdir():
        if other.name != job.inputs:
            shutil.rmtree(other, ignore_errors=True)
    clear_outputs(job.folder)


def clear_outputs(folder: Path) -> None:
    """Remove a finished training's files from a folder that holds its report."""
    report, old = folder / REPORT, folder / f"{REPORT}.old"
    if report.exists():
        # Renamed first and removed last: a kill in between leaves a folder that is unfinished
        # and known to be ours.
        report.replace(old)
    if old.exists():
        for pattern in OUTPUTS:
            for file in folder.glob(pattern):
                file.unlink(missing_ok=True)
        old.unlink(missing_ok=True)


def _prepare(job: Job) -> "CompletionLoss":
    from misstep.training.weights import with_adapter, with_all_weights

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
    from transformers import TrainingArguments

    settings, on_gpu = job.settings, torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(job.checkpoints),
        # The rows come in the order of all epochs, so for Trainer there is one.
        num_train_epochs=1,
        per_device_train_batch_size=1,
        learning_rate=job.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        # Autocast is slow on a CPU; an adapter is computed in the weights' type without it.
        bf16=on_gpu and settings.adapter == "full" and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        seed=job.seed,
        save_strategy="no",
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    return processes.on_one_device(arguments)


def micro_tokens() -> int:
    """Padded tokens of one micro-batch on this machine."""
    import torch

    return MICRO_TOKENS["cuda" if torch.cuda.is_available() else "cpu"]


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


def peak_memory_mb() -> int:
    """The largest resident memory that the process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 2**20 if sys.platform == "darwin" else peak // 2**10


def _weights(job: Job, loss: "CompletionLoss") -> dict[str, Any]:
    """What is to be written: what is trained, and of a whole model all else."""
    from misstep.training.trainer import trained

    if job.settings.adapter == "full":
        return dict(loss.model.state_dict(keep_vars=True))
    return dict(trained(loss.model))


def _save(
    job: Job, loss: "CompletionLoss", weights: dict[str, Any], report: TrainReport
) -> None:
    """Write weights, card and, last, the report: with it the folder is finished."""
    from misstep.models import weights_dtype
    from misstep.training.weights import save_adapter, save_all_weights

    if job.settings.adapter == "full":
        tokenizer = job.renderer.tokenizer
        save_all_weights(loss.model, weights, weights_dtype(), tokenizer, job.folder)
    else:
        save_adapter(loss.model, job.model.published, job.folder, weights)
    write_text(job.folder / CARD, model_card(job.model, job.settings, report, job.datasets))
    write_text(job.folder / REPORT, report.model_dump_json(indent=2) + "\n")


def model_card(
    base: Model, settings: TrainSettings, report: TrainReport, datasets: Sequence[str] = ()
) -> str:
    """The card of an adapter: what it is based on, and how it was trained."""
    lora, what = settings.adapter == "lora", "pairs" if report.ranks else "rows"
    on_pairs = report.ranks is not None
    left_out = {"adapter", "preferences", *ASIDE, *HOW}
    tags = ["lora" if lora else "full-fine-tune", *(["dpo"] if on_pairs else [])]
    values = settings.model_dump(exclude=left_out)
    if on_pairs:
        values |= settings.preferences.model_dump()
    if not lora:
        values = {k: v for k, v in values.items() if k not in ("rank", "alpha")}
    losses = [
        f"| {kind} | {before:.3f} | {report.loss_after[kind]:.3f} |"
        for kind, before in report.loss_before.items()
    ]
    return "\n".join(
        [
            card_head(base, tags, datasets),
            "",
            f"# {base.published}, trained on {report.trained} {what} with misstep",
            "",
            "Loss fell on completions only. "
            + "Direct preference optimisation (arXiv 2305.18290). " * on_pairs
            + ("A LoRA adapter on all linear layers." if lora else "All weights were trained."),
            "",
            f"| mean loss of a {'pair' if on_pairs else 'completion token'} | before | after |",
            "|---|---|---|",
            *losses,
            "",
            f"{report.steps} steps, {report.tokens:,} tokens an epoch, of them "
            f"{report.completion_tokens:,} learned. {what.capitalize()} given {report.rows}, "
            f"dropped {report.dropped}, cut {report.truncated}.",
            "",
            *(f"- {key.replace('_', ' ')}: {value}" for key, value in values.items()),
            f"- misstep {__version__}, inputs `{report.inputs}`",
            "",
        ]
    )
