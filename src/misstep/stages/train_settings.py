"""How a model is fine-tuned: the recipe's key `train`.

The paper's learning rate, epochs and batch size are not public; the defaults start from the
same authors' MoTE. This module knows keys and their defaults, and loads no library to check
them but for trackers that a recipe names.
"""

from typing import Annotated, Literal

from pydantic import Field

from misstep.documents import Settings
from misstep.errors import RecipeError

ASIDE = ("report_to", "max_dropped")
"""Settings of what is told and what is refused. A training is named as if they had their
defaults, which stand in the names of finished ones."""
HOW = ("gradient_checkpointing", "compile")
"""Settings that change the time and the memory of a training, and nothing that comes of it."""


class PreferenceSettings(Settings):
    """What training on pairs does otherwise: direct preference optimisation."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the model is held to the reference; the paper's value (arXiv 2305.18290) and
    TRL's."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """In place of `train.learning_rate`, at which training on pairs makes a model forget how to
    write. TRL 1.16 trains all weights at 1e-6 and adapters, in its example of a 0.5B, at 5e-6.
    """


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
    a third more time. Not of `rlhf`, which TRL trains."""
    compile: bool = False
    """Compile the layers with torch; the first steps take minutes. Not of `rlhf` either."""
    max_dropped: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Training is refused where a larger share of the rows is dropped or cut."""
    report_to: tuple[str, ...] = ()
    """Trackers that Trainer knows, such as trackio, tensorboard, wandb, mlflow."""
    preferences: PreferenceSettings = PreferenceSettings()
    """For training on pairs."""


def naming(settings: TrainSettings) -> TrainSettings:
    """The settings as they stand in a training's name."""
    default = TrainSettings()
    return settings.model_copy(update={key: getattr(default, key) for key in ASIDE})


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
