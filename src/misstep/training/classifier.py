"""A classifier made of a language model's lower layers, or of an encoder, trained by Trainer.

It reads a prompt and an answer and gives the log-odds of yes. A language model's upper layers,
which only choose words, are left out; an encoder is kept whole. An adapter on what stays is
trained with the head and then merged. What is written is an ordinary sequence classifier of
transformers with one output.

This module knows torch, transformers and tokens; it knows no record and no judge.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import nn
from transformers import TrainerCallback

from misstep.errors import ModelError, TrainingError
from misstep.models.locate import Model, is_encoder
from misstep.models.precision import device, fastest_dtype, weights_dtype
from misstep.models.weights import make_readable, no_progress_bars
from misstep.training.encoder import read_classifier
from misstep.training.kernels import fast_layers
from misstep.training.label_loss import EncoderLoss, Labelled, LabelLoss, balance
from misstep.training.lora import adapted
from misstep.training.loss import body_of, mean_loss, on_device, without_gradient
from misstep.training.processes import place
from misstep.training.rows import Row, in_epochs
from misstep.training.scoring import ScoreHead, classifier
from misstep.training.trainer import CompletionTrainer, Steps, trained, training_arguments

PATIENCE = 2
"""Measurements on the dev part without a gain, after which training stops."""
EVERY = 0.5
"""Epochs between two measurements."""
HOTTEST = 5.0
"""Temperatures are sought from its inverse to here."""


class Calibration(NamedTuple):
    """What log-odds are divided by, after what is taken from them."""

    temperature: float
    shift: float


class Measurement(NamedTuple):
    """The loss on the dev part, so many epochs into the training."""

    epoch: float
    loss: float


@dataclass(frozen=True)
class Fit:
    """How a classifier is trained."""

    epochs: float
    learning_rate: float
    batch_size: int
    seed: int
    micro_tokens: int
    """Tokens that are computed at once."""
    checkpoints: Path
    """A folder for the while."""
    notify: Callable[[int, int], None]


def keep_lower_layers(lm: Any, share: float) -> None:
    """Take a language model's upper layers away, in place.

    Raises:
        ModelError: the layers are not found.
    """
    body, config = body_of(lm), lm.config.get_text_config()
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"no classifier can be made of {config.model_type} models: expected a list of "
            "layers in the model's body. Use a model of another family, such as Llama or Qwen."
        )
    count = max(1, round(share * len(layers)))
    body.layers = layers[:count]
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]


def of_language_model(
    lm: Any, labels: Sequence[bool], rank: int, seed: int, share: float = 1.0
) -> LabelLoss:
    """The loss of a language model's body with an adapter and a head; consumes the model.

    The adapter is on this share of the layers, from above. Nothing below it has a gradient, so
    there a step costs what reading costs.
    """
    modules = None if share == 1 else _upper_linear(lm, share)
    return LabelLoss(adapted(lm, rank, 2 * rank, seed, modules), lm, balance(labels))


def _upper_linear(lm: Any, share: float) -> list[str]:
    """The names of the linear layers in this share of a model's layers, from above."""
    layers = body_of(lm).layers
    upper = layers[len(layers) - max(1, round(share * len(layers))) :]
    inside = {module for layer in upper for module in layer.modules()}
    return [
        name
        for name, module in lm.named_modules()
        if isinstance(module, nn.Linear) and module in inside
    ]


def fit(
    loss: LabelLoss | EncoderLoss, train: Sequence[Labelled], dev: Sequence[Labelled], how: Fit
) -> list[Measurement]:
    """Leave the weights as they were best on the dev part; gives the losses there.

    Raises:
        TrainingError: a loss is no finite number.
    """
    order = in_epochs([row.row for row in train], how.epochs, how.seed)
    steps = math.ceil(len(train) / how.batch_size)
    watch = Watch(loss, [row.row for row in dev], how.micro_tokens, steps)
    arguments = training_arguments(
        how.checkpoints,
        learning_rate=how.learning_rate,
        warmup_steps=0.06,
        # Of products of fp32 weights.
        bf16=fastest_dtype() == torch.bfloat16 and _can_mix(loss, dev[0].row),
        seed=how.seed,
        report_to="none",
    )
    # What makes layers fast depends on the device that they are on.
    place(loss, loss.model, arguments)
    with fast_layers(loss) if isinstance(loss, LabelLoss) else nullcontext():
        trainer = CompletionTrainer(
            loss,
            arguments,
            order,
            batch_size=how.batch_size,
            micro_tokens=how.micro_tokens,
            callbacks=[watch, Steps(how.notify)],
        )
        with no_progress_bars():
            trainer.train()
    shutil.rmtree(how.checkpoints, ignore_errors=True)
    watch.restore()
    return watch.found


def finished(loss: LabelLoss | EncoderLoss, pad: int) -> Any:
    """The classifier, its adapter merged.

    Raises:
        ModelError: transformers has no classifier of this kind.
    """
    merged = loss.model.merge_and_unload()
    if isinstance(loss, EncoderLoss):
        return merged
    made = classifier(merged, pad)
    made.score.load_state_dict(loss.score.state_dict())
    return made


class Watch(TrainerCallback):  # type: ignore[misc]
    """Measures on the dev part, keeps the best weights, and stops where nothing is gained."""

    def __init__(
        self, loss: LabelLoss | EncoderLoss, dev: Sequence[Row], micro_tokens: int, steps: int
    ) -> None:
        self.loss, self.dev, self.micro_tokens = loss, dev, micro_tokens
        self.steps = steps
        """Of an epoch."""
        self.found: list[Measurement] = []
        self._best: dict[str, torch.Tensor] = {}

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Every so many steps, and after the last."""
        every = max(1, round(EVERY * self.steps))
        if state.global_step % every and state.global_step < state.max_steps:
            return
        lost = mean_loss(self.loss, self.dev, self.micro_tokens)
        if not math.isfinite(lost):
            raise TrainingError(
                f"training a judge: the loss on the dev part is {lost}, expected a finite "
                "number. Lower learning_rate."
            )
        epoch = round(state.global_step / self.steps, 3)
        self.found.append(Measurement(epoch, round(lost, 5)))
        losses = [measured.loss for measured in self.found]
        best = losses.index(min(losses))
        if best == len(losses) - 1:
            self._best = {n: p.detach().clone() for n, p in trained(self.loss).items()}
        control.should_training_stop |= len(losses) - 1 - best >= PATIENCE

    def restore(self) -> None:
        """Give the loss its best weights back."""
        with torch.no_grad():
            for name, parameter in trained(self.loss).items():
                parameter.copy_(self._best[name])


def _can_mix(loss: LabelLoss | EncoderLoss, row: Row) -> bool:
    """Whether products of fp32 weights can be computed in bf16, by trying it.

    DeBERTa's first version then masks with a number that bf16 cannot hold.
    """
    if not isinstance(loss, EncoderLoss):
        return False
    batch = on_device(loss, [row])
    with without_gradient(loss), torch.autocast(batch["ids"].device.type, torch.bfloat16):
        try:
            loss(**batch)
        except RuntimeError:
            return False
    return True


def calibration(odds: Sequence[float], labels: Sequence[bool]) -> Calibration:
    """The temperature and the shift that fit the labels best.

    A temperature alone (Guo et al., arXiv 1706.04599) leaves verdicts as they are; the shift is
    Platt's, and takes back what the balance of the labels in training has moved.
    """
    given = torch.tensor(odds, dtype=torch.float64)
    wanted = torch.tensor(labels, dtype=torch.float64)

    def loss(sought: NDArray[np.float64]) -> float:
        scaled = (given - sought[1]) / math.exp(sought[0])
        return float(nn.functional.binary_cross_entropy_with_logits(scaled, wanted))

    heat = (-math.log(HOTTEST), math.log(HOTTEST))
    shift = (float(given.min()), float(given.max()))
    first = (0.0, min(max(shift[0], 0.0), shift[1]))
    found = minimize(loss, first, method="Nelder-Mead", bounds=(heat, shift))
    return Calibration(math.exp(float(found.x[0])), float(found.x[1]))


def save_classifier(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write it as transformers reads it, in the type that the model was loaded in."""
    model.to(model.dtype)
    with no_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    make_readable(folder)


def load_classifier(folder: Path) -> Any:
    """A classifier that was saved, for scoring.

    Raises:
        ModelError: transformers cannot read it.
    """
    if is_encoder(Model(str(folder), folder)):
        model, _ = read_classifier(folder, torch.float32)
        return model.to(device()).eval()
    model, _ = read_classifier(folder, weights_dtype())
    head = ScoreHead(model.score.in_features)
    head.load_state_dict(model.score.state_dict())
    model.score = head
    # Whole rows are scored, once.
    model.config.use_cache = False
    return model.to(device()).eval()
