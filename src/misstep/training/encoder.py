"""An encoder, such as BERT, as a classifier of one label: how it is loaded and what is trained.

The head is trained whole, and so is all that the model's files do not have, as BERT's pooler;
the rest learns by an adapter. Weights are in fp32: what is trained whole takes steps that are
too small for bf16 to hold.

This module knows torch, PEFT and transformers; it knows no training loop, record or judge.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from misstep.errors import ModelError
from misstep.models.weights import no_progress_bars
from misstep.training.label_loss import EncoderLoss, balance
from misstep.training.lora import drawn_by, lora_config, with_peft


class Encoder(NamedTuple):
    """An encoder with a classifier's head, as transformers makes it."""

    model: Any
    head: frozenset[str]
    """The parameters that are trained whole: those of the head, and what the files lacked."""


def load_encoder(folder: Path, seed: int = 0) -> Encoder:
    """An encoder as a classifier of one label, in fp32; what its files lack is drawn anew.

    Raises:
        ModelError: transformers cannot read it, has no classifier of this kind, or the files
            lack more than a head.
    """
    with drawn_by(seed):
        model, found = read_classifier(
            folder, torch.float32, num_labels=1, ignore_mismatched_sizes=True
        )
    drawn = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    body = f"{model.base_model_prefix}."
    lacking = sorted(n for n in drawn if n.startswith(body) and "pooler" not in n)
    if lacking:
        raise ModelError(
            f"{folder}: expected the weights of {model.config.model_type} as transformers "
            f"names them, {len(lacking)} are missing, the first is {lacking[0]}. Save it "
            "again with model.save_pretrained(FOLDER)."
        )
    outside = {n for n, _ in model.named_parameters() if not n.startswith(body)}
    return Encoder(model, frozenset(drawn | outside))


def of_encoder(
    encoder: Encoder, pad: int, labels: Sequence[bool], rank: int, seed: int
) -> EncoderLoss:
    """The loss of an encoder with an adapter, and its head; consumes the encoder."""
    model = encoder.model
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in encoder.head
    ]
    config = lora_config(model, rank, 2 * rank, target_modules=layers)
    with drawn_by(seed):
        adapted = with_peft(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in encoder.head)
    return EncoderLoss(adapted, pad, balance(labels))


def read_classifier(
    folder: Path, dtype: torch.dtype, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A classifier of transformers, and what it says of the loading.

    Raises:
        ModelError: transformers cannot read it, or has no classifier of this kind.
    """
    try:
        with no_progress_bars(), quiet_loading():
            model, found = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{folder}: transformers cannot load a classifier: {error}") from error
    return model, found


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from warning of a head that the files lack: that it is new is known."""
    shown = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(shown)
