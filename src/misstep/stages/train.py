"""Fine-tuning on examples or pairs: rows in, an adapter in a folder out, and a report.

A folder that is finished and was made from the same model, rows, settings and seed gives its
report at once; one that a killed process left is gone on with from its last checkpoint, to the
same adapter, bit for bit. This module knows what names a training, and its files; it knows no
method: a row's kind only names a number in the report.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

from pydantic import ValidationError

from misstep import __version__
from misstep.errors import TrainingError
from misstep.models.adapter import CONFIG, TENSORS
from misstep.models.locate import Model
from misstep.models.rendering import Renderer
from misstep.models.weights import free, within_context
from misstep.records import Example, Pair, Record, digest, write_text
from misstep.stages.base import Notify
from misstep.stages.fit import CHECKPOINTS, Job, fit
from misstep.stages.train_settings import ASIDE, HOW, TrainSettings, check_trackers, naming
from misstep.training import processes
from misstep.training.card import card_head
from misstep.training.report import RewardReport, TrainReport
from misstep.training.rows import PairRow, Row, Rows, render_pairs, render_rows

if TYPE_CHECKING:
    from misstep.training.loss import CompletionLoss

TrainingRows = Sequence[Example] | Sequence[Pair]
"""All of one kind: completions to learn, or pairs to learn a preference from."""
Report = TypeVar("Report", TrainReport, RewardReport)
FORMAT = 2
"""Raised when equal inputs no longer give an equal adapter."""
REPORT = "train.json"
CARD = "README.md"
LOGS = "runs"
"""Where Trainer has TensorBoard write, in its output folder."""
OUTPUTS = (
    *(CARD, CONFIG, TENSORS),
    *("config.json", "generation_config.json", "model*.safetensors*"),
    *("tokenizer*", "special_tokens_map.json", "chat_template*"),
)


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
    report = finished(folder / REPORT, TrainReport, order.inputs)
    if report is not None:
        _refuse_many(report.rows, report.dropped, report.truncated, settings)
    else:
        check_trackers(settings)
        job = order.job()
        _clear(job)
        with processes.together(order.model_dump_json()):
            report = _train(job, notify)
        free()
    _keep_logs(folder)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return report


def _keep_logs(folder: Path) -> None:
    """Take what TensorBoard shows from beside the checkpoints to beside the adapter."""
    for logs in folder.glob(f"{CHECKPOINTS}/*/{LOGS}/*"):
        (folder / LOGS).mkdir(exist_ok=True)
        logs.replace(folder / LOGS / logs.name)


def follow(order: str) -> None:
    """Take part in a training that another process leads; it writes what comes of it."""
    _train(Order.model_validate_json(order).job(), None)
    free()


def input_digest(model: Model, rows: TrainingRows, settings: TrainSettings, seed: int) -> str:
    """What names a training by content: equal inputs, equal adapter."""
    used = naming(settings).model_dump(mode="json", exclude=_unused(_are_pairs(rows)))
    return digest([FORMAT, model.digest, [row.id for row in rows], used, seed])


def _are_pairs(rows: TrainingRows) -> TypeGuard[Sequence[Pair]]:
    return bool(rows) and isinstance(rows[0], Pair)


def _unused(on_pairs: bool) -> set[str]:
    """The settings that what comes of a training does not depend on, but for rounding."""
    return {"learning_rate" if on_pairs else "preferences", *HOW}


def finished(file: Path, kind: type[Report], inputs: str) -> Report | None:
    """The report of a training that was finished and had these inputs."""
    try:
        report = kind.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None
    return report if report.inputs == inputs else None


def fitting(settings: TrainSettings, model: Model) -> TrainSettings:
    """The settings with rows no longer than the model's context.

    Beyond it there are no positions, or none that it was made for, and no engine serves it.
    """
    longest = within_context(model, settings.max_length)
    return settings.model_copy(update={"max_length": longest})


def usable_rows(
    renderer: Renderer, given: TrainingRows, settings: TrainSettings
) -> Rows[Row] | Rows[PairRow]:
    """The rows, or pairs, as tokens.

    Raises:
        TrainingError: there are none, or a larger share than `max_dropped` is unusable, or
            there are pairs for a training of all weights.
    """
    if _are_pairs(given):
        return usable_pairs(renderer, given, settings)
    rows = render_rows(renderer, cast("Sequence[Example]", given), settings.max_length)
    _refuse_many(rows.given, rows.dropped, rows.truncated, settings)
    return rows


def usable_pairs(
    renderer: Renderer, given: Sequence[Pair], settings: TrainSettings
) -> Rows[PairRow]:
    """The pairs as tokens.

    Raises:
        TrainingError: as `usable_rows` does.
    """
    if settings.adapter == "full":
        raise TrainingError(
            "train.adapter: expected lora for training on preference pairs, found full. "
            "The reference that it compares with is the model without its adapter."
        )
    rows = render_pairs(renderer, given, settings.max_length)
    _refuse_many(rows.given, rows.dropped, rows.truncated, settings)
    return rows


def _refuse_many(given: int, dropped: int, truncated: int, settings: TrainSettings) -> None:
    if dropped == given or dropped + truncated > settings.max_dropped * given:
        raise TrainingError(
            f"training: of {given} rows {dropped} have nothing to learn within "
            f"{settings.max_length} tokens and {truncated} would lose the end of their "
            f"completion; expected at most {settings.max_dropped:.0%} of them, and one row at "
            "least to train on. Raise train.max_length as far as the model's context goes, "
            "shorten the rows, or raise train.max_dropped."
        )


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
        settings = fitting(self.settings, model)
        rows = usable_rows(renderer, self.rows, settings)
        given = (settings, self.seed, self.folder, self.inputs, self.datasets)
        return Job(model, renderer, rows, *given)


def _train(job: Job, notify: Notify | None) -> TrainReport:
    completion, report = fit(job, notify)
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
    from misstep.models.precision import weights_dtype
    from misstep.training.lora import save_adapter, save_all_weights

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
