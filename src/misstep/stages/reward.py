"""A reward model from pairs, by TRL: into a folder, with a report of how it ranks.

The ranking is measured on pairs whose prompts were held out. A folder that is finished and was
made from the same model, pairs, settings and seed gives its report at once; one that is not is
begun anew. One process; TRL is an optional library.

This module knows settings, files and reports; the model itself is in `misstep.training.reward`.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from misstep.documents import Settings
from misstep.errors import MissingExtra, TrainingError
from misstep.models.locate import Model
from misstep.models.precision import device, fastest_dtype, micro_tokens
from misstep.models.rendering import Renderer
from misstep.models.weights import free, load_weights
from misstep.records import Pair, digest, write_text
from misstep.stages.base import Notify
from misstep.stages.train import finished, usable_pairs
from misstep.stages.train_settings import HOW, TrainSettings, naming
from misstep.training.report import RewardReport
from misstep.training.rows import PairRow, Rows

if TYPE_CHECKING:
    from misstep.training.scoring import Scorer

FORMAT = 1
"""Raised when equal inputs no longer give an equal reward model."""
REPORT = "reward.json"


class RewardSettings(Settings):
    """How a reward model is trained; adapter, batch and longest row are those of `train`."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """The reward model's; TRL 1.16's."""
    epochs: Annotated[float, Field(gt=0)] = 1
    """Passes over the pairs; in more, reward models learn the pairs by heart (InstructGPT,
    arXiv 2203.02155, C.2)."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The share of the prompts whose pairs only measure the ranking."""


@dataclass(frozen=True)
class Setup:
    """What reward models and the policy have in common."""

    model: Model
    renderer: Renderer
    train: TrainSettings
    seed: int
    notify: Notify

    @cached_property
    def tokenizer(self) -> Any:
        """A copy that pads with `pad` and ends somehow: TRL takes both from the tokenizer."""
        tokenizer = copy.deepcopy(self.renderer.tokenizer)
        tokenizer.pad_token_id = self.renderer.pad
        if tokenizer.eos_token_id is None:
            tokenizer.eos_token_id = self.renderer.end_of_turn
        return tokenizer

    def arguments(self, folder: Path, learning_rate: float, steps: float) -> dict[str, Any]:
        """What both of TRL's trainers are told alike, of so many steps or fewer."""
        return {
            "output_dir": str(folder),
            "learning_rate": learning_rate,
            "lr_scheduler_type": self.train.scheduler,
            # A warm-up begins at 0, so that an only step would change nothing.
            "warmup_steps": self.train.warmup_ratio if steps > 1 else 0,
            "weight_decay": self.train.weight_decay,
            # The adapter is computed in the weights' type without autocast.
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": device() == "cpu",
            "seed": self.seed,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": list(self.train.report_to) or "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }

    def steps(self, what: str) -> Any:
        """A callback that tells how many steps are done."""
        from misstep.training.trainer import Steps

        return Steps(lambda done, total: self.notify(what, done, total))


def require_trl() -> None:
    """Pass where TRL is installed.

    Raises:
        MissingExtra: it is not.
    """
    if find_spec("trl") is None:
        raise MissingExtra("TRL", "rlhf")


def used(train: TrainSettings) -> dict[str, Any]:
    """The settings of `train` that reward models and policies share with other methods."""
    return naming(train).model_dump(
        mode="json", exclude={"learning_rate", "epochs", "preferences", "report_to", *HOW}
    )


def train_reward(
    setup: Setup, settings: RewardSettings, pairs: Sequence[Pair], folder: Path, what: str
) -> RewardReport:
    """Train a reward model into a folder, or give the report of one that is finished.

    Raises:
        TrainingError: pairs of one prompt only, or too many of them unusable.
        ModelError: the weights cannot be loaded, or transformers has no classifier for them.
    """
    named = [used(setup.train), settings.model_dump(mode="json"), setup.seed]
    ids = [pair.id for pair in pairs]
    inputs = digest(["reward", FORMAT, setup.model.digest, ids, *named])
    report = finished(folder / REPORT, RewardReport, inputs)
    if report is None:
        require_trl()
        rows = _split(setup, settings, pairs, what)
        report = _train(setup, settings, rows, folder, inputs, what)
        free()
    return report


class Split(NamedTuple):
    """Pairs to train on and pairs to measure on."""

    rows: Rows[PairRow]
    """All of them, counted."""
    trained: list[PairRow]
    measured: list[PairRow]


def _split(setup: Setup, settings: RewardSettings, pairs: Sequence[Pair], what: str) -> Split:
    from misstep.training.reward import split_by_prompt

    rows = usable_pairs(setup.renderer, pairs, setup.train)
    trained, measured = split_by_prompt(rows.kept, settings.held_out, setup.seed)
    if not trained:
        raise TrainingError(
            f"{what}: expected pairs of two prompts or more, since those of one are held out "
            f"to measure the ranking; found {len(measured)} pairs of one. Give more prompts."
        )
    return Split(rows, trained, measured)


def _train(
    setup: Setup,
    settings: RewardSettings,
    split: Split,
    folder: Path,
    inputs: str,
    what: str,
) -> RewardReport:
    from misstep.training.lora import save_adapter
    from misstep.training.reward import accuracy, fit, scale, with_reward_adapter
    from misstep.training.scoring import Scorer

    (folder / REPORT).unlink(missing_ok=True)
    lm, train = load_weights(setup.model).to(fastest_dtype()), setup.train
    model = with_reward_adapter(lm, setup.renderer.pad, train.rank, train.alpha, setup.seed)
    started = time.monotonic()
    curve = fit(
        model,
        split.trained,
        setup.tokenizer,
        train.batch_size,
        [setup.steps(f"{what} steps")],
        num_train_epochs=settings.epochs,
        **setup.arguments(
            folder,
            settings.learning_rate,
            len(split.trained) * settings.epochs / train.batch_size,
        ),
    )
    seconds = time.monotonic() - started
    scorer = Scorer(model, setup.renderer.pad, micro_tokens())
    mean, deviation = scale(scorer, split.trained)
    report = RewardReport(
        inputs=inputs,
        pairs=len(split.trained),
        dropped=split.rows.dropped,
        truncated=split.rows.truncated,
        held_out=len(split.measured),
        accuracy=accuracy(scorer, split.measured),
        accuracy_trained=accuracy(scorer, split.trained),
        mean=mean,
        deviation=deviation,
        loss_curve=tuple(curve),
        seconds=round(seconds, 1),
    )
    save_adapter(model, setup.model.published, folder)
    write_text(folder / REPORT, report.model_dump_json(indent=2) + "\n")
    return report


def load_scorer(setup: Setup, folder: Path, report: RewardReport) -> "Scorer":
    """A trained reward model, whose scores are standardised."""
    from misstep.training.reward import load_reward_model
    from misstep.training.scoring import Scorer

    lm = load_weights(setup.model).to(fastest_dtype())
    model = load_reward_model(lm, setup.renderer.pad, folder)
    model.to(device())
    return Scorer(model, setup.renderer.pad, micro_tokens(), report.mean, report.deviation)
