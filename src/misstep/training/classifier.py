"""A classifier made of the lower layers of a language model, trained by transformers' Trainer.

It reads a prompt and an answer and gives the log-odds of yes. The upper layers, which only
choose words, are left out; the lowest ones stay as they are, so that no gradient is computed
for them; those between are trained in fp32, or by autocast where the processor has bf16. What
is written is an ordinary sequence classifier of transformers with one output.

This module knows torch, transformers and tokens; it knows no record and no judge.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from misstep.errors import ModelError, TrainingError
from misstep.models import no_progress_bars, weights_dtype
from misstep.rendering import Renderer
from misstep.training.scoring import ScoreHead, classifier
from misstep.training.trainer import Steps

PATIENCE = 2
"""Measurements on the dev part without a gain, after which training stops."""
EVERY = 0.5
"""Epochs between two measurements."""
HOTTEST = 5.0
"""Temperatures are sought from its inverse to here."""


class Texts(NamedTuple):
    """A prompt and an answer as tokens, and whether either had to be cut."""

    ids: tuple[int, ...]
    cut: bool


class Labelled(NamedTuple):
    """Tokens and their label."""

    ids: tuple[int, ...]
    label: bool


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
    checkpoints: Path
    """A folder for the while."""
    notify: Callable[[int, int], None]


def read_texts(renderer: Renderer, prompt: str, answer: str, most: int) -> Texts:
    """The tokens of a prompt, an answer and the end of a turn, at most so many.

    A long answer loses its end. A prompt keeps its beginning, at least half of all tokens if
    it is as long. What spells a control token in either is plain text.
    """
    asked = renderer.plain(f"Question: {prompt}")
    answered = renderer.plain(f"\n\nAnswer: {answer}")
    room = most - 1
    kept = asked[: max(room - len(answered), room // 2)]
    ids = [*kept, *answered[: room - len(kept)], renderer.end_of_turn]
    return Texts(tuple(ids), len(ids) < len(asked) + len(answered) + 1)


def lower_layers(lm: Any, pad: int, kept: float, trained: float, seed: int) -> Any:
    """A classifier of a language model's lower layers: that share is kept, that one trained.

    Raises:
        ModelError: transformers has no classifier of this kind, or the layers are not found.
    """
    body, config = lm.get_decoder(), lm.config.get_text_config()
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"no classifier can be made of {config.model_type} models: expected a list of "
            "layers in the model's body. Use a model of another family, such as Llama or Qwen."
        )
    count = max(1, round(kept * len(layers)))
    body.layers = layers[:count]
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = classifier(lm, pad)
    body.requires_grad_(False)
    # In fp32, since the optimiser's steps are too small for bf16 to hold.
    for part in (*body.layers[count - max(1, round(trained * count)) :], body.norm):
        part.float().requires_grad_(True)
    return model


def fit(
    model: Any, train: Sequence[Labelled], dev: Sequence[Labelled], how: Fit
) -> list[Measurement]:
    """Train, leave the model as it was best on the dev part, and give its losses there.

    Raises:
        TrainingError: a loss is no finite number.
    """
    weights = balance([row.label for row in train])
    steps = math.ceil(len(train) / how.batch_size)
    trainer = Trainer(
        model=model,
        args=_arguments(how, max(1, round(EVERY * steps))),
        train_dataset=_rows(train),
        eval_dataset=_rows(dev),
        data_collator=lambda rows: _collate(rows, model.config.pad_token_id),
        compute_loss_func=lambda out, labels, **_: _loss(out.logits[:, 0], labels, weights),
        callbacks=[EarlyStoppingCallback(PATIENCE), Steps(how.notify)],
    )
    trainer.remove_callback(PrinterCallback)
    with no_progress_bars():
        trainer.train()
    # Or the model would go on computing by autocast.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    shutil.rmtree(how.checkpoints, ignore_errors=True)
    history = trainer.state.log_history
    found = [
        Measurement(round(entry["epoch"], 3), round(entry["eval_loss"], 5))
        for entry in history
        if "eval_loss" in entry
    ]
    if not all(math.isfinite(measured.loss) for measured in found):
        raise TrainingError(
            f"training a judge: the loss on the dev part is {found[-1].loss}, expected a "
            "finite number. Lower learning_rate."
        )
    return found


def _arguments(how: Fit, steps: int) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(how.checkpoints),
        num_train_epochs=how.epochs,
        per_device_train_batch_size=how.batch_size,
        per_device_eval_batch_size=how.batch_size,
        learning_rate=how.learning_rate,
        warmup_steps=0.06,
        weight_decay=0.01,
        # The trained layers are in fp32, and each is cast once a step.
        bf16=weights_dtype() == torch.bfloat16,
        use_cpu=not on_gpu,
        eval_strategy="steps",
        eval_steps=steps,
        save_strategy="steps",
        save_steps=steps,
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        train_sampling_strategy="group_by_length",
        label_names=["labels"],
        seed=how.seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def _rows(rows: Sequence[Labelled]) -> list[dict[str, Any]]:
    return [{"input_ids": row.ids, "label": float(row.label)} for row in rows]


def _collate(rows: Sequence[dict[str, Any]], pad: int) -> dict[str, Tensor]:
    """Without an attention mask: what stands behind a causal model's last token is not seen."""
    width = max(len(row["input_ids"]) for row in rows)
    filled = [[*row["input_ids"], *[pad] * (width - len(row["input_ids"]))] for row in rows]
    labels = [row["label"] for row in rows]
    return {"input_ids": torch.tensor(filled), "labels": torch.tensor(labels)}


def balance(labels: Sequence[bool]) -> tuple[float, float]:
    """What a case labelled 0, and one labelled 1, counts: both labels the same in all."""
    ones = sum(labels)
    return len(labels) / (2 * (len(labels) - ones)), len(labels) / (2 * ones)


def _loss(logits: Tensor, labels: Tensor, weights: tuple[float, float]) -> Tensor:
    each = torch.where(labels > 0.5, weights[1], weights[0])
    return nn.functional.binary_cross_entropy_with_logits(logits.float(), labels, each)


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
    found = minimize(loss, (0.0, 0.0), method="Nelder-Mead", bounds=(heat, shift))
    return Calibration(math.exp(float(found.x[0])), float(found.x[1]))


def save_classifier(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write it as transformers reads it, in the type that models are loaded in."""
    model.to(weights_dtype())
    with no_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def load_classifier(folder: Path) -> Any:
    """A classifier that was saved, for scoring.

    Raises:
        ModelError: transformers cannot read it.
    """
    try:
        with no_progress_bars():
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=weights_dtype(), use_safetensors=True, trust_remote_code=False
            )
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"judge {folder}: transformers cannot load it: {error}") from error
    head = ScoreHead(model.score.in_features)
    head.load_state_dict(model.score.state_dict())
    model.score = head
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()
